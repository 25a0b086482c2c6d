#!/usr/bin/env bash
# BERT-Large on 32 cards of four servers:
#
#     bash scripts/bert_large_32_cards.sh PHASE [FLAG…]
#
# recipe.sh explains PHASE, FLAG and the variables.  Here also:
#
#     HOSTS              10.10.100.101:16,10.10.100.102:16,10.10.100.103:16,10.10.100.104:16
#                        the servers, as mpirun's -H takes them: address:slots, at least one slot per card.  Rank 0 runs
#                        on the first
#     CARDS_PER_SERVER   8, half of them at each of two sockets
#     SSH_OPTIONS        "-p 3022": the port where sshd of the servers or containers listens; also -i KEY, and so on
#     NETWORK            10.10.100.101/16: the network that MPI uses between the servers, by any address in it
#     MPI_ROOT           the folder of Open MPI on every server (default: its folder here)
#     NODE_RANK          torchrun: 0 on the first server, 1, 2 and 3 on the others
#
# mpirun is started on the first server only, which must reach the others by ssh without a password; torchrun is started
# on every server.  Code, data and OUTPUT have the same paths on all servers.  A step has 32 × 2,048 sequences in phase 1
# and 32 × 1,024 in phase 2.  docs/many_cards.md has the set-up.
HOSTS=${HOSTS:-10.10.100.101:16,10.10.100.102:16,10.10.100.103:16,10.10.100.104:16}
MASTER_ADDR=${MASTER_ADDR:-${HOSTS%%[:,]*}}
source "$(dirname "$0")/recipe.sh"

case $PHASE in
    1) batch=(--train_batch_size=2048 --gradient_accumulation_steps=32) ;;   # micro-batches of 64
    2) batch=(--train_batch_size=1024 --gradient_accumulation_steps=128) ;;  # of 8
esac
cards=${CARDS_PER_SERVER:-8}
whole_number CARDS_PER_SERVER "$cards"
IFS=, read -ra servers <<< "$HOSTS"

over_mpirun() {
    local root=${MPI_ROOT:-$(dirname "$(dirname "$(command -v mpirun)")")} name
    launcher=(mpirun --allow-run-as-root)
    if [ "$(mpi_release)" = 4 ]; then
        launcher+=(--mca plm_rsh_args "${SSH_OPTIONS:--p 3022}")
    else
        launcher+=(--mca plm_ssh_args "${SSH_OPTIONS:--p 3022}")
        [ $((cards * ${#servers[@]})) -gt 8 ] && launcher+=(--mca ras_base_launch_orted_on_hn 1)  # as Gaudi's recipes do
    fi
    launcher+=(--prefix "$root"
              -n $((cards * ${#servers[@]})) $(binding "ppr:$((cards / 2)):socket")
              --mca btl_tcp_if_include "${NETWORK:-$MASTER_ADDR/16}" -H "$HOSTS")
    for name in $(compgen -e | sort); do  # mpirun passes on nothing by itself, and warns of names that are not set
        case $name in
            PT_HPU_*|HCCL_*|HABANA_*|GLOO_*|NCCL_*|FI_*|RDMAV_*|OMP_*|GC_KERNEL_PATH|MASTER_ADDR|MASTER_PORT|PATH|\
            PYTHONPATH|LD_LIBRARY_PATH|LD_PRELOAD) launcher+=(-x "$name") ;;
        esac
    done
    launcher+=("$interpreter")
}

over_torchrun() {
    if [ -z "${NODE_RANK:-}" ]; then
        echo "error: NODE_RANK is not set: use 0 on $MASTER_ADDR, and 1, 2, … on the other servers" >&2
        exit 2
    fi
    launcher=("$interpreter" -m torch.distributed.run --nnodes=${#servers[@]} --nproc_per_node="$cards"
              --node_rank="$NODE_RANK"
              --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
}

over_"$LAUNCHER"
pretrain "${launcher[@]}" -- --config_file=./bert_config.json "${batch[@]}" "$@"
