# Sourced by quickstart.sh and scripts/one_hour_cpu.sh: the stages that both have, on the sample of Wikipedia.
# They need $data_output, the folder of the samples, $output, that of the training, and $seed.  Both paths are absolute.

export BERT_PREP_WORKING_DIR=$data_output/data
dataset=wikicorpus_en_sample
vocabulary=$data_output/data/vocab/$dataset/vocab.txt
config=$output/bert_config.json
device=(--seed "$seed")

stage() { printf '\n=== %s\n' "$*"; }

choose_device() {
    "$PYTHON" -c 'import habana_frameworks.torch' 2>/dev/null && device+=(--use_habana)
    return 0
}

# The sample is so small that one process is faster than the start of several.
prepare() {  # prepare ACTION FLAG…: a stage of data preparation
    "$PYTHON" data/bertPrep.py --dataset "$dataset" --vocab_size 2048 --n_processes 1 --action "$@"
}

prepare_text() {  # text shards and vocabulary
    local action
    for action in estimate download text_formatting sharding create_vocabulary; do
        prepare "$action"
    done
    held_out_text=("$data_output"/data/sharded_*/"$dataset"/*_test_*.txt)
}

make_samples() {  # make_samples TOKENS PREDICTIONS FLAG…
    local tokens=$1 predictions=$2
    shift 2
    prepare create_hdf5_files --max_seq_length "$tokens" --max_predictions_per_seq "$predictions" \
        --vocab_file "$vocabulary" "$@"
}

# In training 40 % of the tokens are predicted, with new masks in every epoch; held out are 15 %, as everywhere.
make_training_samples() {  # make_training_samples TOKENS PREDICTIONS
    make_samples "$@" --masked_lm_prob 0.4 --dynamic_masking --dupe_factor 5
}

make_held_out_samples() {  # make_held_out_samples TOKENS
    make_samples "$1" "$(held_out_predictions "$1")" --input_files "${held_out_text[@]}"
}

held_out_predictions() {  # held_out_predictions TOKENS
    case $1 in
        16) echo 3 ;;
        64) echo 10 ;;
        128) echo 20 ;;
    esac
}

folder_of() {  # folder_of TOKENS PREDICTIONS MASKED_SHARE: the folder of these shards
    local folder=hdf5_lower_case_1_seq_len_$1_max_pred_$2_masked_lm_prob_$3_random_seed_12345_dupe_factor_5
    [ "$3" = 0.4 ] && folder+=_dynamic_masking
    echo "$data_output/data/$folder/$dataset"
}

held_out() {  # held_out TOKENS: the folder of the held-out shards
    folder_of "$1" "$(held_out_predictions "$1")" 0.15
}

write_config() {  # write_config FILE: a model config with the number of tokens in the vocabulary
    sed "s/\"vocab_size\": .*/\"vocab_size\": $(wc -l < "$vocabulary")/" "$1" > "$config"
}

pack() {  # pack TOKENS PREDICTIONS
    if [ -e "$data_output/packed/$1_metadata.json" ]; then
        echo "already packed: $data_output/packed/$1"
    else
        "$PYTHON" pack_pretraining_data_pytorch.py --n_processes 1 --input_dir "$(folder_of "$1" "$2" 0.4)" \
            --output_dir "$data_output/packed/$1" --max_sequence_length "$1" --max_predictions_per_sequence "$2"
    fi
}

train() {  # train PHASE TOKENS PREDICTIONS LAST_CHECKPOINT FLAG…
    local phase=$1 tokens=$2 predictions=$3 checkpoint=$output/checkpoints/ckpt_$4.pt
    shift 4
    if [ -e "$checkpoint" ]; then
        echo "already trained: $checkpoint"
    else
        "$PYTHON" run_pretraining.py --do_train --bert_model quickstart --config_file "$config" "${device[@]}" \
            --input_dir "$data_output/packed/$tokens" --output_dir "$output/checkpoints" --resume_from_checkpoint \
            --max_seq_length "$tokens" --max_predictions_per_seq "$predictions" --eval_dir "$(held_out "$tokens")" \
            --json_summary "$output/phase$phase.json" --use_fused_lamb --warmup_proportion 0.2 --log_freq 100 \
            --eval_freq 400 --num_steps_per_checkpoint 400 "$@"
    fi
}

evaluate() {  # evaluate TOKENS FLAG…: loss and accuracy of a model on the held-out shards
    local tokens=$1
    shift
    "$PYTHON" evaluate.py --config_file "$config" --eval_dir "$(held_out "$tokens")" "${device[@]}" \
        --input_dir "$data_output/packed/$tokens" "$@"
}

evaluate_before_and_after() {  # evaluate_before_and_after CHECKPOINT MARGIN TOKENS…; sets learned to yes or no
    local checkpoint=$1 margin=$2 tokens figures code
    shift 2
    learned=yes
    : > "$output/evaluation.txt"
    for tokens in "$@"; do
        figures=$(evaluate "$tokens")
        echo "$tokens tokens, before: $figures" | tee -a "$output/evaluation.txt"
        code=0
        figures=$(evaluate "$tokens" --checkpoint "$checkpoint" --json_file "$output/evaluation_$tokens.json" \
            --margin "$margin") || code=$?
        [ "$code" -le 1 ] || exit "$code"
        [ "$code" = 0 ] || learned=no
        echo "$tokens tokens, after:  $figures" | tee -a "$output/evaluation.txt"
    done
}

show_examples() {  # show_examples CHECKPOINT
    "$PYTHON" fill_mask.py --checkpoint "$1" --config_file "$config" --vocab_file "$vocabulary" \
        --random_from "${held_out_text[0]}" --json "$output/examples.json" \
        "Alabama is a state in the [MASK] States." "The book was published [MASK] 1995." \
        "It is the capital [MASK] Angola."
}

check_learned() {  # check_learned MARGIN: ends with exit code 1 where the model has not learned
    if [ "$learned" = no ]; then
        echo "error: nothing learned: the held-out MLM loss is not $1 nats below what is reached without context" >&2
        exit 1
    fi
    echo "The model has learned from context: its held-out MLM loss is at least $1 nats below what is reached without."
}
