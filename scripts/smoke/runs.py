"""Short training runs in processes of their own, their logs, and the report.  No torch here.

The process that checks holds no card: every run and every question to a card is a process of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SEQUENCE_LENGTH, PREDICTIONS, STEPS, WARM_UP = 128, 20, 8, 3
LONG_LENGTH, LONG_PREDICTIONS = 512, 80
CONFIG = {"attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 64,
          "initializer_range": 0.02, "intermediate_size": 128, "max_position_embeddings": 128,
          "num_attention_heads": 4, "num_hidden_layers": 2, "type_vocab_size": 2, "vocab_size": 30522}
LISTS = ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt"]
MODES = {"lazy": ["--use_lazy_mode=True"], "eager": ["--use_lazy_mode=False"], "compiled": ["--use_torch_compile"]}


@dataclass
class LoggedRun:
    """The log lines of a run's steps, or why it failed."""

    problem: str | None
    lines: list[dict] = field(default_factory=list)
    seconds_to_first_step: float = 0.0

    @property
    def losses(self) -> list[float]:
        return [line["step_mean_loss"] for line in self.lines]


class Report:
    """Prints a line for each check."""

    def __init__(self):
        self.failed = 0

    def line(self, passed: bool, claim: str, detail: str) -> None:
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {claim}: {detail}", flush=True)

    def note(self, claim: str, detail: str) -> None:
        print(f"NOTE  {claim}: {detail}", flush=True)

    def compare(self, claim: str, run: LoggedRun, reference: LoggedRun, limit: float, least: float = 0.0) -> None:
        """Compare the losses of the run's steps: the largest difference, as a fraction of how far the reference falls.
        """
        problem = run.problem or reference.problem
        if problem:
            return self.line(False, claim, problem)
        fall = reference.losses[0] - min(reference.losses)
        expected = reference.losses[-len(run.losses):]
        difference = max(abs(one - other) for one, other in zip(run.losses, expected, strict=True)) / fall
        return self.line(least <= difference <= limit, claim,
                         f"losses differ by at most {difference:.1e} of their fall (limit {limit:.0e}; "
                         f"{reference.losses[0]:.3f} to {min(reference.losses):.3f} in {len(reference.losses)} steps)")


class Runs:
    """Runs the training command in a folder of its own inputs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write_inputs(self) -> None:
        import numpy as np

        from tests.support.synthetic import write_unpacked_shard

        rng = np.random.default_rng(0)
        for name, length, predictions in (("data", SEQUENCE_LENGTH, PREDICTIONS),
                                          ("data_512", LONG_LENGTH, LONG_PREDICTIONS)):
            lengths = rng.integers(length // 8, length + 1, 256)
            write_unpacked_shard(self.folder / name / "smoke_training_0.hdf5", lengths, 0, length, predictions)
        start([sys.executable, "pack_pretraining_data_pytorch.py", f"--input_dir={self.folder / 'data_512'}",
               f"--output_dir={self.folder / 'packed_512'}", f"--max_sequence_length={LONG_LENGTH}",
               f"--max_predictions_per_sequence={LONG_PREDICTIONS}"])
        self.write_config("config", dropout=0.0)
        self.write_config("dropout", dropout=0.1)

    def write_config(self, name: str, dropout: float) -> None:
        config = {**CONFIG, "attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
        (self.folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")

    def command(self, name: str, *flags: str, launcher=(sys.executable,)) -> list[str]:
        """The training command; `flags` override the common ones."""
        return [*launcher, "run_pretraining.py", "--do_train", f"--input_dir={self.folder / 'data'}",
                f"--output_dir={self.folder / name}", f"--config_file={self.folder / 'config.json'}",
                f"--json_summary={self.folder / f'{name}_log.json'}", f"--max_seq_length={SEQUENCE_LENGTH}",
                f"--max_steps={STEPS}", f"--max_predictions_per_seq={PREDICTIONS}", "--train_batch_size=8",
                "--gradient_accumulation_steps=2", "--learning_rate=0.05", "--warmup_proportion=0.1", *flags]

    def train(self, name: str, *flags: str, launcher=(sys.executable,), checkpoint=False,
              **variables: str) -> LoggedRun:
        log = self.folder / f"{name}_log.json"
        log.unlink(missing_ok=True)
        flags = flags if checkpoint else (*flags, "--skip_checkpoint")
        began = time.time()
        done = start(self.command(name, *flags, launcher=launcher), **variables)
        (self.folder / f"{name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            return LoggedRun(error_line(done))
        logged = [json.loads(line.removeprefix("DLLL ")) for line in log.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in logged if "step_mean_loss" in line["data"]]
        return LoggedRun(None, [line["data"] for line in steps], float(steps[0]["timestamp"]) - began)

    def on_hpu(self, name: str, *flags: str, **options) -> LoggedRun:
        return self.train(name, "--use_habana", *flags, **options)

    def ask(self, part: str, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
        """Run a part of on_card.py to its end, on one card or on all."""
        return start([*launcher, "scripts/smoke/on_card.py", part], PT_HPU_LAZY_MODE="1")


def launchers(cards: int) -> dict[str, list[str] | None]:
    """The start of a command line on all cards, by launcher; None where there is no such launcher."""
    mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--oversubscribe", "-n", str(cards), sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}"]
    return {"torchrun": torchrun if importlib.util.find_spec("torch") else None,
            "mpirun": mpirun if shutil.which("mpirun") else None}


def environment(**variables: str) -> dict[str, str]:
    """The flags of each run choose the mode, so the caller's PT_HPU_LAZY_MODE is removed."""
    return {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"} | variables


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run a process to its end."""
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), encoding="utf-8", errors="replace",
                          capture_output=True, stdin=subprocess.DEVNULL)


def error_line(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
    return lines[0] if lines else f"exit code {done.returncode}"
