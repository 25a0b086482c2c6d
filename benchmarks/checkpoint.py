"""What checkpoints cost: how long training stands still for one, its bytes, and the start of a run that resumes.

A training of BERT-mini or BERT-base on synthetic data, by the training command, with a checkpoint every four steps.

    python benchmarks/checkpoint.py [--model mini|base] [--json]

stall_seconds      training waits for so long until the state is copied and the next step may begin
copy_seconds       a bare copy of the same bytes in memory, for comparison
step_while_writing against step_seconds: what writing in the background takes from the steps beside it
bytes_ratio        the file against weights and two moments, 12 bytes a parameter
resume_seconds     from the start of the process to the end of the first step; start_seconds: without a checkpoint
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from measuring import ROOT, machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli

SHAPES = {  # layers, hidden size, heads, rows
    "mini": (4, 256, 4, 8),
    "base": (12, 768, 12, 4),
}
TOKENS, PREDICTIONS = 128, 20
EVERY = 4  # steps


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mini", help="which BERT")
    parser.add_argument("--checkpoints", type=cli.positive_int, default=5, help="how many to write")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"model": args.model, **measure(Path(folder), args)}
    figures["machine"] = machine()
    report(figures, args.json, lines(figures))


def lines(figures: dict) -> list[str]:
    return [f"BERT-{figures['model']}, {figures['parameters'] / 1e6:.1f} million parameters",
            *(f"  {name:20s}{found['median']:.3f} s ({found['min']:.3f} to {found['max']:.3f})"
              for name, found in figures.items() if isinstance(found, dict) and "median" in found),
            f"  first checkpoint, in fresh memory: {figures['first_stall_seconds']:.3f} s",
            f"  {figures['bytes']} bytes, {figures['bytes_ratio']:.4f} of 12 bytes a parameter",
            f"  first step {figures['start_seconds']:.1f} s after the start, "
            f"{figures['resume_seconds']:.1f} s where it resumes"]


def measure(folder: Path, args) -> dict:
    import torch

    torch.set_num_threads(args.threads)
    flags = write_inputs(folder, args)
    steps, stalls = timed_training(flags)
    newest = folder / f"out/ckpt_{args.checkpoints * EVERY}.pt"
    parameters, copy_seconds = parameters_and_copy(newest)
    return {
        "parameters": parameters, "stall_seconds": spread(stalls[1:]), "copy_seconds": spread(copy_seconds),
        "step_seconds": spread([seconds for seconds, writing in steps if not writing]),
        "step_while_writing": spread([seconds for seconds, writing in steps if writing]),
        "first_stall_seconds": stalls[0], "bytes": newest.stat().st_size,
        "bytes_ratio": newest.stat().st_size / (12 * parameters),
        "start_seconds": seconds_to_first_step([*flags, f"--output_dir={folder / 'new'}"], args.threads),
        "resume_seconds": seconds_to_first_step([*flags, "--resume_from_checkpoint"], args.threads)}


def write_inputs(folder: Path, args) -> list[str]:
    """Config and data; the flags of a training with them."""
    import numpy as np

    from tests.support.synthetic import VOCAB_SIZE, write_unpacked_shard

    layers, hidden, heads, rows = SHAPES[args.model]
    config = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
              "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 4 * hidden,
              "max_position_embeddings": 512, "num_attention_heads": heads, "num_hidden_layers": layers,
              "type_vocab_size": 2, "vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_unpacked_shard(folder / "data/a_training.hdf5", np.full(2000, TOKENS), 0, TOKENS, PREDICTIONS)
    values = {"config_file": folder / "config.json", "input_dir": folder / "data", "output_dir": folder / "out",
              "max_seq_length": TOKENS, "max_predictions_per_seq": PREDICTIONS, "train_batch_size": rows,
              "max_steps": 1000, "steps_this_run": args.checkpoints * EVERY + 2, "num_steps_per_checkpoint": EVERY,
              "json_summary": folder / "log.json", "peak_tflops": 1.0}
    return ["--do_train", "--no_cuda", "--use_fused_lamb", *(f"--{name}={value}" for name, value in values.items())]


def timed_training(flags: list[str]) -> tuple[list[tuple[float, bool]], list[float]]:
    """Seconds of each step after the warm-up, with whether a checkpoint was being written, and of each stall."""
    import run_pretraining
    from training import trainer as training

    steps, stalls = [], []
    train_step, save = training.Trainer.train_step, training.Trainer.save

    def timed_step(trainer, step):
        began, writing = time.perf_counter(), trainer.checkpoints.writing
        writing = writing is not None and not writing.done()
        losses = train_step(trainer, step)
        steps.append((time.perf_counter() - began, writing))
        return losses

    def timed_save(trainer, step):
        began = time.perf_counter()
        save(trainer, step)
        stalls.append(time.perf_counter() - began)

    with patch.object(training.Trainer, "train_step", timed_step), patch.object(training.Trainer, "save", timed_save):
        quietly(run_pretraining.main, flags)
    return steps[2:], stalls


def quietly(function, *arguments) -> None:
    """Call a function whose lines are for people; figures alone go to the screen."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, patch.object(sys, "stdout", nowhere):
        function(*arguments)


def parameters_and_copy(path: Path, repeats: int = 5) -> tuple[int, list[float]]:
    """How many parameters a checkpoint holds, and seconds for a bare copy of all its bytes."""
    from checkpoint.folder import read_checkpoint

    state = read_checkpoint(path)
    weights = {weight.data_ptr(): weight for weight in state["model"].values()}.values()
    tensors = [*weights, *(value for moments in state["optimizer"]["state"].values() for value in moments.values())]
    copies, seconds = [tensor.clone() for tensor in tensors], []
    for _ in range(repeats):
        began = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        seconds.append(time.perf_counter() - began)
    return sum(weight.numel() for weight in weights), seconds


def seconds_to_first_step(flags: list[str], threads: int) -> float:
    """From the start of a process to the log line of its first step."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "run_pretraining.py"), *flags, "--max_steps=1000", "--steps_this_run=1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)}) as process:
        for line in process.stdout:
            if line.startswith("epoch "):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    raise RuntimeError(f"the run ended with {process.returncode} before its first step")


if __name__ == "__main__":
    cli.run(main)
