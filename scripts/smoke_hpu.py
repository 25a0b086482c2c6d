"""The checks of smoke_hpu.sh: they compare short training runs on the CPU and on HPU by their logs.

This process neither imports torch nor holds a card: every run and every question to a card is a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE_LENGTH, PREDICTIONS, STEPS, WARM_UP = 128, 20, 12, 3
CONFIG = {"attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 64,
          "initializer_range": 0.02, "intermediate_size": 128, "max_position_embeddings": 128,
          "num_attention_heads": 4, "num_hidden_layers": 2, "type_vocab_size": 2, "vocab_size": 30522}
LISTS = ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt"]
# The largest difference of a step's loss that passes, as a fraction of how far the losses fall.  Devices differ by more
# than rounding: HPU's GELU is the tanh approximation.
BETWEEN_DEVICES, BETWEEN_OPTIMIZERS, BETWEEN_PRECISIONS, BETWEEN_RANKS = 2e-2, 1e-3, 5e-2, 1e-3


def main(argv=None) -> int | None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("all", "cards", "all_reduce"), default="all",
                        help="all checks; they start the other two: print the number of cards, all-reduce on one rank")
    parser.add_argument("--config_file", default="bert_config.json", help="config of the model to time")
    parser.add_argument("--train_batch_size", type=cli.positive_int, default=128,
                        help="sequences per step of the timed model, in 2 micro-batches")
    parser.add_argument("--folder", type=Path, help="folder for data and logs (default: a temporary folder, kept)")
    args = parser.parse_args(argv)
    if args.part == "cards":
        return print_cards()
    if args.part == "all_reduce":
        return check_all_reduce()
    return Checks(args, args.folder or Path(mkdtemp(prefix="smoke_hpu_"))).run()


@dataclass
class LoggedRun:
    """The log lines of a run's steps, or why it failed."""

    problem: str | None
    lines: list[dict]

    @property
    def losses(self) -> list[float]:
        return [line["step_loss"] for line in self.lines]


class Checks:
    """Runs the training command in a folder, and prints one line per check."""

    def __init__(self, args, folder: Path):
        self.args = args
        self.folder = folder
        self.failed = 0

    def run(self) -> int:
        self.write_inputs()
        print(f"logs of all runs: {self.folder}")
        cpu = self.train("cpu", "--no_cuda")
        lazy = self.on_hpu("lazy", "--use_lazy_mode=True")
        self.compare("losses on hpu, lazy mode, against cpu", lazy, cpu, BETWEEN_DEVICES)
        self.check_graphs(lazy)
        for mode, flag in (("eager", "--use_lazy_mode=False"), ("compiled", "--use_torch_compile")):
            self.compare(f"losses on hpu, {mode}, against cpu", self.on_hpu(mode, flag), cpu, BETWEEN_DEVICES)
        fused = self.on_hpu("fused_lamb", "--use_lazy_mode=True", "--use_fused_lamb")
        self.compare("FusedLamb against NVLAMB", fused, lazy, BETWEEN_OPTIMIZERS)
        lists = self.on_hpu("op_lists", "--use_lazy_mode=True", *LISTS)
        self.compare("bf16 op lists against fp32", lists, lazy, BETWEEN_PRECISIONS, least=1e-6)  # less: no op was cast
        self.time_steps()
        self.check_all_cards()
        print(f"{self.failed} failed" if self.failed else "all passed")
        return 1 if self.failed else 0

    def write_inputs(self) -> None:
        import numpy as np

        from tests.support.synthetic import write_unpacked_shard

        lengths = np.random.default_rng(0).integers(SEQUENCE_LENGTH // 8, SEQUENCE_LENGTH + 1, 256)
        write_unpacked_shard(self.folder / "data" / "smoke_training_0.hdf5", lengths, 0, SEQUENCE_LENGTH, PREDICTIONS)
        (self.folder / "config.json").write_text(json.dumps(CONFIG))

    def on_hpu(self, name: str, *flags: str, launcher=()) -> LoggedRun:
        return self.train(name, "--use_habana", *flags, launcher=launcher)

    def train(self, name: str, *flags: str, launcher=()) -> LoggedRun:
        """Run the training command; `flags` override the common ones."""
        log = self.folder / f"{name}.json"
        command = [sys.executable, *launcher, "run_pretraining.py", "--do_train", f"--input_dir={self.folder / 'data'}",
                   f"--output_dir={self.folder / name}", f"--config_file={self.folder / 'config.json'}",
                   f"--json_summary={log}", f"--max_seq_length={SEQUENCE_LENGTH}", f"--max_steps={STEPS}",
                   f"--max_predictions_per_seq={PREDICTIONS}", "--train_batch_size=8",
                   "--gradient_accumulation_steps=2", "--learning_rate=0.05", "--warmup_proportion=0.1",
                   "--skip_checkpoint", *flags]
        done = start(command)
        (self.folder / f"{name}.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            return LoggedRun(error_line(done), [])
        logged = [json.loads(line.removeprefix("DLLL ")) for line in log.read_text().splitlines()]
        return LoggedRun(None, [line["data"] for line in logged if "step_loss" in line["data"]])

    def report(self, passed: bool, claim: str, detail: str) -> None:
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {claim}: {detail}", flush=True)

    def compare(self, claim: str, run: LoggedRun, reference: LoggedRun, limit: float, least: float = 0.0) -> None:
        """Compare the losses of all steps: the largest difference, as a fraction of how far the reference falls."""
        problem = run.problem or reference.problem
        if problem:
            return self.report(False, claim, problem)
        fall = reference.losses[0] - min(reference.losses)
        difference = max(abs(one - other) for one, other in zip(run.losses, reference.losses, strict=True)) / fall
        return self.report(least <= difference <= limit, claim,
                           f"losses differ by at most {difference:.1e} of their fall (limit {limit:.0e}; "
                           f"{reference.losses[0]:.3f} to {min(reference.losses):.3f} in {STEPS} steps)")

    def check_graphs(self, run: LoggedRun) -> None:
        if run.problem:
            return self.report(False, "graphs and fallbacks", run.problem)
        settled, last = run.lines[WARM_UP - 1], run.lines[-1]
        compiled = last["graph_compilation"] - settled["graph_compilation"]
        fallbacks = last["cpu_fallback"] / STEPS
        self.report(compiled == 0, f"graphs compiled after step {WARM_UP}", f"{compiled / (STEPS - WARM_UP):g} a step")
        return self.report(fallbacks == 0, "ops that ran on the host",
                           f"{fallbacks:g} a step {last['cpu_fallback_ops']}".rstrip())

    def time_steps(self) -> None:
        """Seconds per step of the real model with the recipe's flags."""
        size = self.args.train_batch_size
        run = self.on_hpu("timed", *LISTS, "--use_fused_lamb", f"--config_file={Path(self.args.config_file).resolve()}",
                          f"--train_batch_size={size}", f"--log_freq={STEPS // 2}")
        claim = f"seconds per step, {self.args.config_file}, {size} × {SEQUENCE_LENGTH} tokens, bf16"
        if run.problem:
            return self.report(False, claim, run.problem)
        last = run.lines[-1]  # averages over the second half of the steps: the first half compiles graphs
        return self.report(True, claim, f"{last['average_training_time_step']:.3f} s, "
                           f"{last['average_perf_per_step']:.1f} sequences/s")

    def check_all_cards(self) -> None:
        """An all-reduce over all cards; then training on them, against one card with the same global batch."""
        counted = self.process("cards")
        if counted.returncode:
            return self.report(False, "cards", error_line(counted))
        cards = int(counted.stdout.split()[-1])
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}"]
        reduced = self.process("all_reduce", launcher)
        good = reduced.returncode == 0 and reduced.stdout.count("all-reduce is right") == cards
        self.report(good, f"all-reduce over {cards} cards", "right on every rank" if good else error_line(reduced))
        if cards == 1:
            return self.report(True, "training on all cards", "there is one card only")
        alone = self.on_hpu("one_card", f"--train_batch_size={2 * cards}", f"--gradient_accumulation_steps={cards}")
        together = self.on_hpu("all_cards", "--train_batch_size=2", "--gradient_accumulation_steps=1",
                               "--allreduce_post_accumulation", launcher=launcher)
        return self.compare(f"training on {cards} cards against one", together, alone, BETWEEN_RANKS)

    def process(self, part: str, launcher=()) -> subprocess.CompletedProcess:
        return start([sys.executable, *launcher, "scripts/smoke_hpu.py", part], PT_HPU_LAZY_MODE="1")


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run a process to its end.  The flags of each run choose the mode, so the caller's PT_HPU_LAZY_MODE is removed."""
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    return subprocess.run(command, cwd=ROOT, env=environment | variables, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)


def error_line(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
    return lines[0] if lines else f"exit code {done.returncode}"


def print_cards() -> None:
    from devices.hpu import HpuDevice

    print(HpuDevice(lazy=True).cards())


def check_all_reduce() -> None:
    """On each rank: sum the numbers of all ranks in fp32 and in bf16, the types of the gradients on the wire."""
    import torch
    import torch.distributed as dist

    from devices.hpu import HpuDevice

    device = HpuDevice(lazy=True)
    device.register_backend()
    dist.init_process_group(device.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.full((1000,), rank + 1, dtype=dtype).to(device.torch_device)
        dist.all_reduce(values)
        device.mark_step()
        total = set(values.float().tolist())
        if total != {ranks * (ranks + 1) / 2}:
            raise UserError(f"rank {rank}: the {dtype} sum of 1 to {ranks} is {sorted(total)}")
    print(f"rank {rank}: all-reduce is right")
    dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
