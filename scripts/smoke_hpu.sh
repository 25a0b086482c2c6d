#!/usr/bin/env bash
# For the day a Gaudi card is there: does everything run on it, and does it compute what a CPU computes?
# In minutes, on one card and then on all of the server; a line for each check, exit code 1 where one fails.
#
#     bash scripts/smoke_hpu.sh [--config_file bert_config.json] [--train_batch_size 128] [--folder FOLDER]
#
# $PYTHON is the interpreter (python3).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" scripts/smoke_hpu.py "$@"
