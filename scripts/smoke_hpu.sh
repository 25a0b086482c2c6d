#!/usr/bin/env bash
# The first test of a new Gaudi server: does everything run, are the losses those of a CPU, and how fast is it?
# It takes perhaps half an hour, first on one card, then on all cards of the server.  It prints one line per check; the
# exit code is 1 if one fails.
#
#     bash scripts/smoke_hpu.sh [GROUP…] [--config_file bert_config.json] [--train_batch_size 128] [--folder FOLDER] …
#
#     modes         losses of lazy, lazy with HPU graphs, eager and compiled mode against the CPU's; FusedLamb; bf16 op
#                   lists; graphs that compile after the start; ops that fall back to the host
#     checkpoints   saved in each mode and continued in the others; resumed with dropout
#     cache         a second start with the recipe cache
#     times         seconds per step of BERT-Large in four modes, share of host time, peak memory
#     shapes        512 tokens, 8 and 16 rows, packed and unpacked; 1.2 billion parameters
#     cards         all cards against one with torchrun and with mpirun: all-reduce, dropout, reductions, ZeRO, a killed
#                   rank
#
# PYTHON names the interpreter (default: python3).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" scripts/smoke_hpu.py "$@"
