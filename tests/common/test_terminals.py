"""What the commands print, in any locale and encoding, and where nobody reads it."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.folder import saved_steps
from tests.support import ranks, small_run
from tests.support.small_run import flags

ROOT = Path(__file__).resolve().parent.parent.parent
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TERMINALS = {"ascii": ASCII, "latin-1": {"PYTHONIOENCODING": "latin-1:strict"}, "utf-8": {"LC_ALL": "C.UTF-8"}}
HELP_OF_ALL = """
import importlib, os, sys
from common import cli
for name in sys.argv[1:]:
    for words in (["--help"], ["--no_such_flag", os.fsdecode(b"caf\\xc3\\xa9 \\xff")], [os.fsdecode(b"caf\\xe9")]):
        sys.argv = [name + "\\u2026", *words]
        try:
            cli.run(importlib.import_module(name).main)
        except SystemExit as end:
            print(end.code, file=sys.stderr)
"""
COMMANDS = ("run_pretraining", "evaluate", "fill_mask", "plot_training", "export_to_huggingface",
            "pack_pretraining_data_pytorch", "pytorch_packed_data_checker", "create_pretraining_data", "data.bertPrep")


def programs() -> dict[Path, str]:
    """The text of each file but the tests."""
    paths = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "tests"))]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a text file or pipe in the encoding of the locale."""
    name, words = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
    modes = [word.value for part in call.args[1:] for word in ast.walk(part)
             if isinstance(word, ast.Constant) and isinstance(word.value, str) and set(word.value) <= set("rwaxb+")]
    if "encoding" in words or any("b" in mode for mode in modes):
        return False
    return name in ("open", "os.fdopen") or name.endswith((".read_text", ".write_text")) or "text" in words


@pytest.mark.parametrize("terminal", TERMINALS)
def test_help_and_errors_of_all_commands_are_shown_on_any_terminal(terminal):
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL, *COMMANDS], cwd=ROOT, capture_output=True,
                          env=os.environ | TERMINALS[terminal])
    shown, said = done.stdout, done.stderr.decode("latin-1").splitlines()
    assert [line for line in said if line.isdigit()] == ["0", "2", "2"] * len(COMMANDS), said[-3:]
    assert not any("Traceback" in line for line in said)
    assert shown.count(b"usage: ") == len(COMMANDS)
    assert shown.isascii() == (terminal != "utf-8")
    assert (b"\\u2026" in shown) == shown.isascii()  # the … of the commands' name


def test_all_commands_run_through_cli_run():
    for path, text in programs().items():
        assert ('__name__ == "__main__"' in text) == ("cli.run(main)" in text), path


def test_text_files_are_opened_with_their_encoding():
    found = [f"{path.name}: {ast.unparse(node)}" for path, text in programs().items()
             for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and opens_text(node)]
    assert found == []
    assert opens_text(ast.parse("open(path, 'w')", mode="eval").body)


@pytest.mark.parametrize("words", ["create_pretraining_data.py --help", "data/bertPrep.py --action estimate --dataset "
                                   "wikicorpus_en", "plot_training.py --help"])
def test_where_nobody_reads_the_output_a_command_ends_without_a_word(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "plot_training.py", "--help"], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("plot_training.py: error: ") and "No space left on device" in done.stderr


def test_a_training_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    """Also where the terminal knows ASCII only."""
    small_run.write_workspace(tmp_path)
    command = f"{shlex.join([*ranks.TRAIN, *flags(max_steps=3)])} | head -2; exit ${{PIPESTATUS[0]}}"
    done = ranks.run(["bash", "-c", command], tmp_path, **ASCII)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == 2 and "Traceback" not in done.stdout
    assert saved_steps(tmp_path / "out") == [3]
