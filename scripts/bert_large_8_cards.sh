#!/usr/bin/env bash
# BERT-Large on the cards of one server:
#
#     bash scripts/bert_large_8_cards.sh PHASE [FLAG…]
#
# recipe.sh explains PHASE, FLAG and the variables.  Here also:
#
#     CARDS       8    ranks, one per card
#
# A step has 8 × 8,192 sequences in phase 1 and 8 × 4,096 in phase 2.  Gaudi2 has memory for micro-batches of 16 in
# phase 2: --train_batch_size=8192.  In fp32 (PRECISION=fp32), phase 1 fits with --gradient_accumulation_steps=256.
source "$(dirname "$0")/recipe.sh"

case $PHASE in
    1) batch=(--train_batch_size=8192 --gradient_accumulation_steps=128) ;;  # micro-batches of 64
    2) batch=(--train_batch_size=4096 --gradient_accumulation_steps=512) ;;  # of 8
esac
one_server "${CARDS:-8}"
pretrain "${launcher[@]}" -- --config_file=./bert_config.json "${batch[@]}" "$@"
