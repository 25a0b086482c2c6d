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
data_output=$output
source scripts/quickstart_stages.sh
last_checkpoint=$output/checkpoints/ckpt_$((phase1_steps + phase2_steps)).pt

stage "1/7  Environment"
make_environment requirements.txt
choose_device

stage "2/7  From text to samples: 106 articles of English Wikipedia, sequences of 16 and of 64 tokens"
prepare_text
make_training_samples 16 6
make_training_samples 64 26
make_held_out_samples 16
make_held_out_samples 64
write_config scripts/quickstart_config.json

stage "3/7  Packing: several short sequences share a row"
pack 16 6
pack 64 26

stage "4/7  Training, phase 1: $phase1_steps steps on 16 tokens, then phase 2: $phase2_steps steps on 64 tokens"
# A small model learns in minutes only from short rows: docs/convergence.md.
train 1 16 6 "$phase1_steps" --max_steps "$phase1_steps" --train_batch_size 64 --learning_rate 0.01
train 2 64 26 $((phase1_steps + phase2_steps)) --max_steps "$phase2_steps" --train_batch_size 16 \
    --learning_rate 0.007 --phase2 --phase1_end_step "$phase1_steps"

stage "5/7  Held-out articles, before and after training, against what a model without context reaches"
evaluate_before_and_after "$last_checkpoint" "$margin" 16 64

stage "6/7  The likeliest words for each [MASK], beside what their frequency alone would say"
show_examples "$last_checkpoint"

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
check_learned "$margin"
