#!/usr/bin/env bash
# All stages on a small scale: from Wikipedia text to a small BERT, trained through both phases and evaluated.
#
#     bash quickstart.sh
#
# Everything is written to quickstart_output/, or to the folder QUICKSTART_OUTPUT.  Run again, it skips what is there.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

phase1_steps=${QUICKSTART_PHASE1_STEPS:-3200}
phase2_steps=${QUICKSTART_PHASE2_STEPS:-1800}
seed=${QUICKSTART_SEED:-42}
# The training must end at least this far below the loss that is reached without context (nats).
margin=${QUICKSTART_MARGIN:-0.3}
output=${QUICKSTART_OUTPUT:-quickstart_output}
mkdir -p "$output"
output=$(cd "$output" && pwd)
export BERT_PREP_WORKING_DIR=$output/data
dataset=wikicorpus_en_sample
config=$output/bert_config.json
vocabulary=$output/data/vocab/$dataset/vocab.txt
last_checkpoint=$output/checkpoints/ckpt_$((phase1_steps + phase2_steps)).pt

stage() { printf '\n=== %s\n' "$*"; }

prepare() {  # prepare ACTION FLAG…: a stage of data preparation
    "$PYTHON" data/bertPrep.py --dataset "$dataset" --vocab_size 2048 --action "$@"
}

make_samples() {  # make_samples TOKENS PREDICTIONS FLAG…
    local tokens=$1 predictions=$2
    shift 2
    prepare create_hdf5_files --max_seq_length "$tokens" --max_predictions_per_seq "$predictions" \
        --vocab_file "$vocabulary" "$@"
}

folder_of() {  # folder_of TOKENS PREDICTIONS MASKED_SHARE: the folder of these shards
    local folder=hdf5_lower_case_1_seq_len_$1_max_pred_$2_masked_lm_prob_$3_random_seed_12345_dupe_factor_5
    [ "$3" = 0.4 ] && folder+=_dynamic_masking
    echo "$output/data/$folder/$dataset"
}

held_out() {  # held_out TOKENS: the folder of the held-out shards
    if [ "$1" = 16 ]; then folder_of 16 3 0.15; else folder_of 64 10 0.15; fi
}

pack() {  # pack TOKENS PREDICTIONS
    if [ -e "$output/packed/$1_metadata.json" ]; then
        echo "already packed: $output/packed/$1"
    else
        "$PYTHON" pack_pretraining_data_pytorch.py --input_dir "$(folder_of "$1" "$2" 0.4)" \
            --output_dir "$output/packed/$1" --max_sequence_length "$1" --max_predictions_per_sequence "$2"
    fi
}

train() {  # train PHASE TOKENS PREDICTIONS LAST_CHECKPOINT FLAG…
    local phase=$1 tokens=$2 predictions=$3 checkpoint=$output/checkpoints/ckpt_$4.pt
    shift 4
    if [ -e "$checkpoint" ]; then
        echo "already trained: $checkpoint"
    else
        "$PYTHON" run_pretraining.py --do_train --bert_model quickstart --config_file "$config" "${device[@]}" \
            --input_dir "$output/packed/$tokens" --output_dir "$output/checkpoints" --resume_from_checkpoint \
            --max_seq_length "$tokens" --max_predictions_per_seq "$predictions" --eval_dir "$(held_out "$tokens")" \
            --json_summary "$output/phase$phase.json" --use_fused_lamb --warmup_proportion 0.2 --log_freq 100 \
            --eval_freq 400 --num_steps_per_checkpoint 400 "$@"
    fi
}

evaluate() {  # evaluate TOKENS FLAG…: loss and accuracy of a model on the held-out shards
    local tokens=$1
    shift
    "$PYTHON" evaluate.py --config_file "$config" --eval_dir "$(held_out "$tokens")" "${device[@]}" \
        --input_dir "$output/packed/$tokens" "$@"
}

stage "1/7  Environment"
make_environment requirements.txt
device=(--seed "$seed")
"$PYTHON" -c 'import habana_frameworks.torch' 2>/dev/null && device+=(--use_habana)

stage "2/7  From text to samples: 106 articles of English Wikipedia, sequences of 16 and of 64 tokens"
for action in estimate download text_formatting sharding create_vocabulary; do
    prepare "$action"
done
held_out_text=("$output"/data/sharded_*/"$dataset"/*_test_*.txt)
# In training 40 % of the tokens are predicted, with new masks in every epoch; held out are 15 %, as everywhere.
for shape in "16 6" "64 26"; do
    read -r tokens predictions <<< "$shape"
    make_samples "$tokens" "$predictions" --masked_lm_prob 0.4 --dynamic_masking --dupe_factor 5
done
make_samples 16 3 --input_files "${held_out_text[@]}"
make_samples 64 10 --input_files "${held_out_text[@]}"
sed "s/\"vocab_size\": .*/\"vocab_size\": $(wc -l < "$vocabulary")/" scripts/quickstart_config.json > "$config"

stage "3/7  Packing: several short sequences share a row"
pack 16 6
pack 64 26

stage "4/7  Training, phase 1: $phase1_steps steps on 16 tokens, then phase 2: $phase2_steps steps on 64 tokens"
# A small model learns in minutes only from short rows: docs/convergence.md.
train 1 16 6 "$phase1_steps" --max_steps "$phase1_steps" --train_batch_size 64 --learning_rate 0.01
train 2 64 26 $((phase1_steps + phase2_steps)) --max_steps "$phase2_steps" --train_batch_size 16 \
    --learning_rate 0.007 --phase2 --phase1_end_step "$phase1_steps"

stage "5/7  Held-out articles, before and after training, against what a model without context reaches"
learned=yes
: > "$output/evaluation.txt"
for tokens in 16 64; do
    figures=$(evaluate "$tokens")
    echo "$tokens tokens, before: $figures" | tee -a "$output/evaluation.txt"
    code=0
    figures=$(evaluate "$tokens" --checkpoint "$last_checkpoint" --json_file "$output/evaluation_$tokens.json" \
        --margin "$margin") || code=$?
    [ "$code" -le 1 ] || exit "$code"
    [ "$code" = 0 ] || learned=no
    echo "$tokens tokens, after:  $figures" | tee -a "$output/evaluation.txt"
done

stage "6/7  The likeliest words for each [MASK], beside what their frequency alone would say"
"$PYTHON" fill_mask.py --checkpoint "$last_checkpoint" --config_file "$config" --vocab_file "$vocabulary" \
    --random_from "${held_out_text[0]}" --json "$output/examples.json" \
    "Alabama is a state in the [MASK] States." "The book was published [MASK] 1995." "It is the capital [MASK] Angola."

stage "7/7  Curves and a report"
"$PYTHON" plot_training.py "$output/phase1.json" "$output/phase2.json" --output "$output/curves.png" \
    --report "$output/report.html" --examples "$output/examples.json" \
    --evaluation "$output/evaluation_16.json" "$output/evaluation_64.json"

stage "Done"
cat <<END
vocabulary      $vocabulary
samples         $output/data
packed rows     $output/packed
checkpoints     $output/checkpoints
logs            $output/phase1.json, $output/phase2.json
evaluation      $output/evaluation.txt
curves          $output/curves.png
a page to open  $output/report.html
END
if [ "$learned" = no ]; then
    echo "error: the held-out MLM loss is not $margin nats below what a model without context reaches: nothing learned" >&2
    exit 1
fi
echo "The model has learned from context: its held-out MLM loss is at least $margin nats below what is reached without."
