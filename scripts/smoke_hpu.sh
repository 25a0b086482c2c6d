#!/usr/bin/env bash
# The first test of a new Gaudi card: does everything run, and are the losses those of a CPU?
# It takes minutes, first on one card, then on all cards of the server.  It prints one line per check; the exit code is 1
# if one fails.
#
#     bash scripts/smoke_hpu.sh [--config_file bert_config.json] [--train_batch_size 128] [--folder FOLDER]
#
# PYTHON names the interpreter (default: python3).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" scripts/smoke_hpu.py "$@"
