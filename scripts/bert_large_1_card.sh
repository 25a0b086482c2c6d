#!/usr/bin/env bash
# BERT-Large on one card:
#
#     bash scripts/bert_large_1_card.sh PHASE [FLAG…]
#
# recipe.sh explains PHASE, FLAG and the variables.
#
# A step has the batch of one of the 8 cards of bert_large_8_cards.sh.  Gaudi2 has memory for micro-batches of 16 in
# phase 2: --train_batch_size=8192.  In fp32 (PRECISION=fp32), phase 1 fits with --train_batch_size=512
# --gradient_accumulation_steps=32, phase 2 with --train_batch_size=128 --gradient_accumulation_steps=64.
source "$(dirname "$0")/recipe.sh"

case $PHASE in
    1) batch=(--train_batch_size=8192 --gradient_accumulation_steps=128) ;;  # micro-batches of 64
    2) batch=(--train_batch_size=4096 --gradient_accumulation_steps=512) ;;  # of 8
esac
pretrain "$interpreter" -- --config_file=./bert_config.json "${batch[@]}" "$@"
