"""What several ranks cost: bytes on the wire, the optimizer's memory, waiting for data; and that they lose nothing.

Bytes are the loopback interface's own count, in a network namespace that only the run uses (as root; else those of
this machine's, whoever sends them): a run of 30 steps less one of 10, by 20 steps and the ranks.  The losses of
the runs of 30 steps stand beside them.  The optimizer's memory is that of the rank with the largest share, after a real
step of BERT-Large whose collectives do nothing.  Waiting for data is as the log has it, of BERT-mini on 32 × 128 tokens
a step and rank.

    python benchmarks/scaling.py [--json] [--ranks 2 4 8]
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from measuring import machine, report  # puts the repository's root on the path

# isort: split
from common import cli
from common.errors import UserError

MODES = {
    "ddp": {},
    "flat": {"allreduce_post_accumulation": True},
    "flat_16_bits": {"allreduce_post_accumulation": True, "allreduce_post_accumulation_fp16": True},
    "zero": {"allreduce_post_accumulation": True, "use_zero_optimizer": "True"},
    "zero_16_bits": {"allreduce_post_accumulation": True, "allreduce_post_accumulation_fp16": True,
                     "use_zero_optimizer": "True"},
}
STEPS, SHORT = 30, 10
COUNT_AROUND = """
ip link set lo up 2>/dev/null
sent() { awk '$1 == "lo:" { print $10 }' /proc/net/dev; }
sent > sent; "$@"; code=$?; sent >> sent; exit $code
"""
MEMORY_RANKS = (1, 2, 4, 8)
MINI = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
        "max_position_embeddings": 128}
WAITING_STEPS, WARM_UP = 12, 3


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=cli.positive_int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    parser.add_argument("--share", type=cli.positive_int, help="print the state's bytes on the rank with the largest "
                        "share of so many; what the benchmark starts for itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.share:
        return print_state_bytes(args.share)
    with tempfile.TemporaryDirectory() as folder:
        runs = train_all(Path(folder), args.ranks)
        waiting = waiting_shares(Path(folder))
    memory = {count: state_bytes(count) for count in tqdm(MEMORY_RANKS, desc="optimizer memory")}
    flat, half = (mean(run["bytes"] for run in runs[mode].values()) for mode in ("flat", "flat_16_bits"))
    figures = {"fp16_wire_ratio": half / flat, "runs": runs, "optimizer_bytes_per_rank": memory,
               "data_waiting_share": waiting, "wire_counted_on": wire()[1], "machine": machine("numpy")}
    return report(figures, args.json, describe(figures))


def wire() -> tuple[list[str], str]:
    """How to start a command whose traffic alone is counted, and in words on which interface it is."""
    alone = ["unshare", "--net"]
    try:
        if subprocess.run([*alone, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0:
            return alone, "loopback of a network namespace of its own"
    except FileNotFoundError:
        pass
    return [], "this machine's loopback"


def train_all(folder: Path, counts: list[int]) -> dict[str, dict]:
    """mode → number of ranks → what its runs sent and how its losses went, as far as they differ from one rank's."""
    from tests.support import ranks

    ranks.write_workspace(folder)
    train(folder, 1, "one", STEPS, {})
    one = ranks.figures(folder / "one.json", "step_mean_loss")
    runs = {mode: {} for mode in MODES}
    for mode, count in tqdm([(mode, count) for mode in MODES for count in counts], desc="runs"):
        output = f"{mode}_{count}"
        long, short = (train(folder, count, f"{output}_{steps}", steps, MODES[mode]) for steps in (STEPS, SHORT))
        losses = ranks.figures(folder / f"{output}_{STEPS}.json", "step_mean_loss")
        runs[mode][count] = {
            "bytes": (long - short) / (STEPS - SHORT) / count, "last_loss": losses[STEPS],
            "largest_difference": max(abs(losses[step] - one[step]) for step in one)}
    return {"one_rank": {1: {"bytes": 0.0, "last_loss": one[STEPS], "largest_difference": 0.0}}, **runs}


def train(folder: Path, count: int, output: str, steps: int, mode: dict) -> int:
    """Train so many ranks to that step of the same schedule; the bytes that went over the wire."""
    from tests.support import ranks

    command = [*ranks.TRAIN, *ranks.flags(count, output, max_steps=STEPS, steps_this_run=steps, **mode)]
    if count > 1:
        command = ranks.mpirun(count, *command)
    counted = ["bash", "-c", COUNT_AROUND, "bash", *command]
    run_whole([*wire()[0], *counted], folder)
    before, after = (folder / "sent").read_text(encoding="utf-8").split()
    return int(after) - int(before)


def run_whole(command: list[str], folder: Path) -> None:
    from tests.support import ranks

    done = ranks.run(command, folder)
    if done.returncode:
        raise UserError(f"a run failed: {done.stdout[-2000:]}")


def waiting_shares(folder: Path) -> dict[int, float]:
    """number of ranks → the share of a step that the first rank waits for data, after the warm-up."""
    import numpy as np

    from tests.support import ranks, samples, synthetic

    samples.write_config(folder / "mini.json", **MINI)
    for number in range(3):
        lengths = np.random.default_rng(number).integers(20, 129, 700)
        synthetic.write_unpacked_shard(folder / "mini" / f"part_training_{number}.hdf5", lengths, number)
    shares = {}
    for count in (1, 2):
        output = f"mini_{count}"
        command = [*ranks.TRAIN, *ranks.flags(
            count, output, config_file="mini.json", input_dir="mini", max_seq_length=128, max_predictions_per_seq=20,
            train_batch_size=32, gradient_accumulation_steps=1, max_steps=WAITING_STEPS,
            allreduce_post_accumulation=True)]
        run_whole(ranks.mpirun(count, *command) if count > 1 else command, folder)
        found = ranks.figures(folder / f"{output}.json", "data_waiting_share")
        shares[count] = mean(share for step, share in found.items() if step > WARM_UP)
    return shares


def state_bytes(count: int) -> dict:
    """What a process of its own finds: the state on the rank with the largest share of so many, and its memory."""
    done = subprocess.run([sys.executable, __file__, "--share", str(count)], check=True, encoding="utf-8",
                          stdout=subprocess.PIPE)
    state, resident = map(int, done.stdout.split())
    return {"state": state, "process_grew_by": resident}


def print_state_bytes(count: int) -> None:
    import torch

    from common.bert_config import BertConfig
    from modeling import BertForPreTraining
    from optim.zero import parameters

    config = BertConfig.from_json_file(Path(__file__).resolve().parent.parent / "bert_config.json")
    with torch.device("meta"):
        model = BertForPreTraining(config)
    shares = [sum(weight.numel() for weight in parameters(local_optimizer(model, rank, count)))
              for rank in range(count)]
    torch.manual_seed(1)
    model = BertForPreTraining(config)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer = local_optimizer(model, shares.index(max(shares)), count)
    before = peak_memory()
    optimizer.step()
    state = [value for moments in optimizer.state.values() for value in moments.values()]
    print(sum(value.nbytes for value in state), peak_memory() - before)


def local_optimizer(model, rank: int, count: int):
    """The optimizer over one rank's share, as zero.py shares the weights out."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from optim.build import parameter_groups
    from optim.fused_lamb import SlicedNVLAMB
    from optim.zero import ShardedOptimizer

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        return ShardedOptimizer(parameter_groups(model), SlicedNVLAMB).optim
    finally:
        dist.destroy_process_group()


def peak_memory() -> int:
    """The most memory that this process has had, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def describe(figures: dict) -> list[str]:
    return [
        f"sent per step and rank ({figures['wire_counted_on']}), loss of step {STEPS}, largest difference of a step's "
        f"loss to one rank's",
        *(f"  {mode:13s} {count:2d}   {run['bytes'] / 1e6:7.3f} MB   {run['last_loss']:.5f}   "
          f"{run['largest_difference']:.1e}"
          for mode, runs in figures["runs"].items() for count, run in runs.items()),
        f"  16 bits send {figures['fp16_wire_ratio']:.3f} of the bytes",
        "LAMB's state of BERT-Large on the rank with the largest share, and how much its process grew",
        *(f"  {count} ranks   {memory['state'] / 1e9:.3f} GB   {memory['process_grew_by'] / 1e9:.3f} GB"
          for count, memory in figures["optimizer_bytes_per_rank"].items()),
        "share of a step that BERT-mini waits for data",
        *(f"  {count} ranks   {share:.2%}" for count, share in figures["data_waiting_share"].items())]


if __name__ == "__main__":
    cli.run(main)
