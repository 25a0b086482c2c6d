# Sourced by quickstart.sh and run_tests.sh: makes a virtual environment and installs a requirements file in it.
# The folder is .venv, or what BERT_VENV names.  Afterwards $PYTHON is its interpreter.

make_environment() {  # make_environment REQUIREMENTS
    local requirements=$1 venv=${BERT_VENV:-.venv} base=${PYTHON:-python3}
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$base" "$venv" || return 1
    PYTHON=$(cd "$venv/bin" && pwd)/python
    export PYTHON
    local stamp="$venv/installed-$requirements"
    if ! cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
        echo "Installing the packages of $requirements into $venv"
        # A torch that is already installed, above all Gaudi's own build, is never replaced.
        "$PYTHON" -c 'import torch' 2>/dev/null || "$PYTHON" -m pip install --quiet torch==2.13.0
        "$PYTHON" -m pip install --quiet -r "$requirements"
        cat requirements.txt "$requirements" > "$stamp"
    fi
}

make_venv() {  # make_venv PYTHON FOLDER
    local base=$1 venv=$2 options=()
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' || {
        echo "error: $base is $("$base" --version 2>&1), but Python 3.10 or later is needed (set PYTHON to another one)" >&2
        return 1
    }
    echo "Making a virtual environment in $venv"
    "$base" -c 'import torch' 2>/dev/null && options=(--system-site-packages)
    # Debian's python3 lacks ensurepip.  There, the system's pip installs pip into the environment.
    "$base" -m venv ${options[@]+"${options[@]}"} "$venv" >/dev/null 2>&1 || {
        "$base" -m venv --without-pip ${options[@]+"${options[@]}"} "$venv" &&
            "$base" -m pip --python "$venv/bin/python" install --quiet --ignore-installed pip
    }
}
