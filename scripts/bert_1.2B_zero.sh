#!/usr/bin/env bash
# 1.2 billion parameters, with the optimizer's state sharded over the cards of one server:
#
#     bash scripts/bert_1.2B_zero.sh PHASE [FLAG…]
#
# recipe.sh explains PHASE, FLAG and the variables.  Here also:
#
#     CARDS       8                ranks, one per card; each keeps an eighth of LAMB's 9.5 GB
#     OUTPUT      results_1.2B     a folder of its own, not that of the BERT-Large recipes
#
# This is an example of the sharding: rate and batch were not tuned for this model.
OUTPUT=${OUTPUT:-results_1.2B}
source "$(dirname "$0")/recipe.sh"

case $PHASE in
    1) batch=(--train_batch_size=1024 --gradient_accumulation_steps=128) ;;  # micro-batches of 8
    2) batch=(--train_batch_size=1024 --gradient_accumulation_steps=512) ;;  # of 2
esac
one_server "${CARDS:-8}"
pretrain "${launcher[@]}" -- --config_file=./bert_config_1.2B.json --use_zero_optimizer=True "${batch[@]}" "$@"
