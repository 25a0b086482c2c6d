#!/usr/bin/env bash
# All stages on a small scale: from Wikipedia text to a small BERT, trained through both phases and evaluated.
#
#     bash quickstart.sh
#
# Everything is written to quickstart_output/, or to the folder QUICKSTART_OUTPUT.  Run again, it skips what is there.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

phase1_steps=${QUICKSTART_PHASE1_STEPS:-1200}
phase2_steps=${QUICKSTART_PHASE2_STEPS:-100}
output=${QUICKSTART_OUTPUT:-quickstart_output}
mkdir -p "$output"
output=$(cd "$output" && pwd)
export BERT_PREP_WORKING_DIR=$output/data
unset VOCAB_FILE DYNAMIC_MASKING  # they would change the data and the names of its folders
dataset=wikicorpus_en_sample
config=$output/bert_config.json
last_checkpoint=$output/checkpoints/ckpt_$((phase1_steps + phase2_steps)).pt

stage() { printf '\n=== %s\n' "$*"; }

samples() {  # samples LENGTH PREDICTIONS: print the folder of the unpacked shards
    echo "$output/data/hdf5_lower_case_1_seq_len_$1_max_pred_$2_masked_lm_prob_0.15_random_seed_12345_dupe_factor_5/$dataset"
}

pack() {  # pack LENGTH PREDICTIONS
    if [ -e "$output/packed/$1_metadata.json" ]; then
        echo "already packed: $output/packed/$1"
    else
        "$PYTHON" pack_pretraining_data_pytorch.py --input_dir "$(samples "$1" "$2")" --output_dir "$output/packed/$1" \
            --max_sequence_length "$1" --max_predictions_per_sequence "$2"
    fi
}

train() {  # train PHASE LENGTH PREDICTIONS LAST_CHECKPOINT FLAG…
    local phase=$1 length=$2 predictions=$3 checkpoint=$output/checkpoints/ckpt_$4.pt
    shift 4
    if [ -e "$checkpoint" ]; then
        echo "already trained: $checkpoint"
    else
        "$PYTHON" run_pretraining.py --do_train --bert_model quickstart --config_file "$config" "${device[@]}" \
            --input_dir "$output/packed/$length" --output_dir "$output/checkpoints" --resume_from_checkpoint \
            --max_seq_length "$length" --max_predictions_per_seq "$predictions" --warmup_proportion 0.2 \
            --eval_dir "$(samples "$length" "$predictions")" --json_summary "$output/phase$phase.json" "$@"
    fi
}

held_out() {  # held_out LENGTH PREDICTIONS FLAG…: print loss and accuracy of a model on the test shards
    local length=$1 predictions=$2
    shift 2
    "$PYTHON" evaluate.py --config_file "$config" --eval_dir "$(samples "$length" "$predictions")" "${device[@]}" "$@"
}

stage "1/7  Environment"
make_environment requirements.txt
device=(--seed 42)
"$PYTHON" -c 'import habana_frameworks.torch' 2>/dev/null && device+=(--use_habana)

stage "2/7  From text to samples: 106 articles of English Wikipedia, sequences of 128 and of 512 tokens"
# The sample gets a small vocabulary of its own: without one, the stages below use Google's, four times as large.
for action in download text_formatting sharding create_vocabulary; do
    "$PYTHON" data/bertPrep.py --action "$action" --dataset "$dataset"
done
bash data/create_datasets_from_start.sh sample
vocabulary=$output/data/vocab/$dataset/vocab.txt
sed "s/\"vocab_size\": .*/\"vocab_size\": $(wc -l < "$vocabulary")/" scripts/quickstart_config.json > "$config"

stage "3/7  Packing: several short sequences share a row"
pack 128 20
pack 512 80

stage "4/7  Training, phase 1: $phase1_steps steps on 128 tokens, then phase 2: $phase2_steps steps on 512 tokens"
train 1 128 20 "$phase1_steps" --max_steps "$phase1_steps" --learning_rate 0.01 --log_freq 25 --eval_freq 400 \
    --train_batch_size 32 --num_steps_per_checkpoint 200
train 2 512 80 $((phase1_steps + phase2_steps)) --max_steps "$phase2_steps" --learning_rate 0.004 --log_freq 10 \
    --train_batch_size 16 --gradient_accumulation_steps 2 --phase2 --phase1_end_step "$phase1_steps"

stage "5/7  Evaluation on held-out articles, before and after training"
for shape in "128 20" "512 80"; do
    read -r length predictions <<< "$shape"
    echo "$length tokens, before: $(held_out "$length" "$predictions")"
    echo "$length tokens, after:  $(held_out "$length" "$predictions" --checkpoint "$last_checkpoint")"
done | tee "$output/evaluation.txt"

stage "6/7  Curves"
"$PYTHON" plot_training.py "$output/phase1.json" "$output/phase2.json" --output "$output/curves.png"

stage "7/7  The five likeliest words for each [MASK]; after so short a training, hardly more than frequent words"
"$PYTHON" fill_mask.py --checkpoint "$last_checkpoint" --config_file "$config" --vocab_file "$vocabulary" \
    "Alabama is a state in the [MASK] States." "The book was published [MASK] 1995." "It is the capital [MASK] Angola."

stage "Done"
cat <<END
vocabulary      $vocabulary
samples         $output/data
packed rows     $output/packed
checkpoints     $output/checkpoints
logs            $output/phase1.json, $output/phase2.json
curves          $output/curves.png
evaluation      $output/evaluation.txt
END
