#!/usr/bin/env bash
# The first test of a new Gaudi card: does everything run, and does the card compute what a CPU computes?
# It takes minutes, first on one card, then on all cards of the server.  One line per check; exit code 1 if one fails.
#
#     bash scripts/smoke_hpu.sh [--config_file bert_config.json] [--train_batch_size 128] [--folder FOLDER]
#
# PYTHON names the interpreter (default: python3).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" scripts/smoke_hpu.py "$@"
