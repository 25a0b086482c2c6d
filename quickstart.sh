#!/usr/bin/env bash
# The main job on a small scale: real Wikipedia text to a BERT trained through both phases, evaluated and drawn.
#
#     bash quickstart.sh
#
# Everything goes to quickstart_output/ (or the folder that QUICKSTART_OUTPUT names).  Run again, it reuses what is done.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

output=${QUICKSTART_OUTPUT:-quickstart_output}
phase1_steps=${QUICKSTART_PHASE1_STEPS:-240}
phase2_steps=${QUICKSTART_PHASE2_STEPS:-40}

stage() { printf '\n=== %s\n' "$*"; }

stage "1/6 Environment"
make_environment requirements.txt
mkdir -p "$output"
output=$(cd "$output" && pwd)
export BERT_PREP_WORKING_DIR=$output/data

stage "2/6 Text to samples: 106 articles of English Wikipedia, both sequence lengths"
(cd data && bash create_datasets_from_start.sh sample)
