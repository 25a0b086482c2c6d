# Sourced by the recipes bert_*.sh: the flags of both phases, and the commands that start the ranks.
#
#     bash scripts/bert_large_8_cards.sh PHASE [FLAG…]
#
# PHASE is 1 (128 tokens) or 2 (512 tokens, from phase 1's last checkpoint).  Each FLAG, one of run_pretraining.py,
# overrides the recipe's.  Run again, a recipe resumes from its newest checkpoint.  It prints its command and runs it at
# the root of the repository.  Variables:
#
#     PYTHON      python3    the interpreter, the same path on every server
#     LAUNCHER    mpirun     or torchrun
#     DEVICE      hpu        or cuda, or cpu
#     MODE        lazy       or compile, or eager: how Gaudi computes (docs/gaudi.md); on cuda and cpu compile, or neither
#     PRECISION   bf16       or fp32, which needs more memory: raise --gradient_accumulation_steps
#     INPUT_DIR   /data/pytorch/bert_pretraining/packed_data/phase1/train_packed_new (phase2/…): shards, packed or not
#     OUTPUT      results    folder for checkpoints and logs; several servers must share it
#     PE          7; 6 with Open MPI 5: cores for each rank, used by its data reader and its runtime's threads
#     MAPPING     mpirun's flags for cores and servers, instead of those made from PE
#     RECIPE_CACHE   /tmp/bert_recipe_cache_UID   Gaudi: folder on a local disk for compiled graphs; "" = none
#     MASTER_ADDR, MASTER_PORT   where the ranks meet: localhost (several servers: the first of HOSTS) and 12345
#
# Steps, warm-up and rates are those published for LAMB with batches of 65,536 and 32,768 sequences.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PHASE=${1:-none}
case $PHASE in
    1)  phase_flags=(--max_seq_length=128 --max_predictions_per_seq=20 --max_steps=7038 --warmup_proportion=0.2843
                     --learning_rate=0.006) ;;
    2)  phase_flags=(--max_seq_length=512 --max_predictions_per_seq=80 --max_steps=1563 --warmup_proportion=0.128
                     --learning_rate=0.004 --phase2 --phase1_end_step=7038) ;;
    *)  echo "usage: bash $0 PHASE [FLAG…], where PHASE is 1 or 2 (see scripts/recipe.sh)" >&2; exit 2 ;;
esac
shift

one_of() {  # one_of NAME VALUE CHOICE…: exit unless the value is one of the choices
    local name=$1 value=$2 choice
    shift 2
    for choice in "$@"; do [ "$value" = "$choice" ] && return; done
    echo "error: $name is '$value', not one of: $*" >&2
    exit 2
}

one_of LAUNCHER "${LAUNCHER:=mpirun}" mpirun torchrun
one_of DEVICE "${DEVICE:=hpu}" hpu cuda cpu
one_of MODE "${MODE:=lazy}" lazy compile eager
one_of PRECISION "${PRECISION:=bf16}" bf16 fp32
interpreter=$(command -v "${PYTHON:=python3}") || { echo "error: PYTHON is '$PYTHON': no such program" >&2; exit 2; }
INPUT_DIR=${INPUT_DIR:-/data/pytorch/bert_pretraining/packed_data/phase$PHASE/train_packed_new}
OUTPUT=${OUTPUT:-results}
export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-12345}

case $DEVICE in
    hpu)  device_flags=(--use_habana) ;;
    cuda) device_flags=() ;;
    cpu)  device_flags=(--no_cuda) ;;
esac
case $DEVICE-$MODE in
    *-compile)  device_flags+=(--use_torch_compile) ;;
    hpu-lazy)   device_flags+=(--use_lazy_mode=True) ;;
    hpu-eager)  device_flags+=(--use_lazy_mode=False) ;;
esac
RECIPE_CACHE=${RECIPE_CACHE-/tmp/bert_recipe_cache_$(id -u)}
if [ "$DEVICE" = hpu ] && [ -n "$RECIPE_CACHE" ]; then
    # Never deleted: a resumed run reads what the one before compiled.  The last field is its largest size in MB.
    export PT_HPU_RECIPE_CACHE_CONFIG=${PT_HPU_RECIPE_CACHE_CONFIG:-$RECIPE_CACHE,False,16384}
fi
case $PRECISION in
    bf16) precision_flags=(--hmp --hmp_bf16=./ops_bf16_bert_pt.txt --hmp_fp32=./ops_fp32_bert_pt.txt) ;;
    fp32) precision_flags=() ;;
esac

pretrain() {  # pretrain LAUNCHER… -- FLAG…: print the command, and exec it
    local launcher=()
    while [ "$1" != -- ]; do launcher+=("$1"); shift; done
    shift
    local command=("${launcher[@]}" run_pretraining.py --do_train --bert_model=bert-large-uncased
        "${device_flags[@]}" --use_fused_lamb "${precision_flags[@]}"
        --allreduce_post_accumulation --allreduce_post_accumulation_fp16
        --input_dir="$INPUT_DIR" --output_dir="$OUTPUT/checkpoints" --json_summary="$OUTPUT/phase$PHASE.json"
        --num_steps_per_checkpoint=200 --resume_from_checkpoint "${phase_flags[@]}" "$@")
    printf '%q ' "${command[@]}"; echo
    exec "${command[@]}"
}

mpi_release() {  # Open MPI's major version
    mpirun --version | sed -n 's/.*(Open MPI[^)]*) \([0-9]*\).*/\1/p'
}

binding() {  # binding UNIT: mpirun's flags that bind each rank to PE cores, mapped by UNIT (socket, ppr:4:socket)
    [ -n "${MAPPING:-}" ] && { echo "$MAPPING"; return; }
    case $(mpi_release) in
        4) echo "--bind-to core --map-by $1:PE=${PE:-7} --rank-by core --report-bindings" ;;
        *) echo "--bind-to core --map-by $1:PE=${PE:-6} --rank-by slot --report-bindings" ;;  # 5 has no --rank-by core
    esac
}

whole_number() {  # whole_number NAME VALUE: exit unless the value is a whole number of at least 1
    [[ $2 =~ ^[1-9][0-9]*$ ]] && return
    echo "error: $1 is '$2', not a whole number of at least 1" >&2
    exit 2
}

one_server() {  # one_server CARDS: set the array `launcher` to the command line before run_pretraining.py
    whole_number CARDS "$1"
    case $LAUNCHER in
        mpirun)   launcher=(mpirun --allow-run-as-root -n "$1" $(binding socket) "$interpreter") ;;
        torchrun) launcher=("$interpreter" -m torch.distributed.run --nproc_per_node="$1" --master_port="$MASTER_PORT") ;;
    esac
}
