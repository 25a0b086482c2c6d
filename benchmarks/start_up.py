"""From the start of a process to the end of its first training step: BERT-mini, 8 × 128, on the CPU.

Beside it, by turns: `import torch` alone, which no such process can do without; a minimal script on transformers
(model, AdamW and a step on random tokens, no data); and with --other the same training by another checkout of this
repository, such as the version before.  A first round, which may compile the kernels and the modules, does not count.

    python benchmarks/start_up.py [--other FOLDER] [--json]

total     from the start of the process to the log line of its first step
imports   of which until all modules are there
building  then data, model and optimizer, until the run's parameters are logged
step      then the measurement of the peak for MFU, and the first step
end       from the last line of the log to the end of the process
help      all of `run_pretraining.py --help`
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli

ROWS, TOKENS, PREDICTIONS = 8, 128, 20
STAGES = ("total", "imports", "building", "step", "end", "help")
CONFIG = "bert_config_mini.json"
TRANSFORMERS = f"""
import json, time, torch
from transformers import BertConfig, BertForPreTraining
config = json.load(open({CONFIG!r}))
model = BertForPreTraining(BertConfig(**config)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.randint(1000, config["vocab_size"], ({ROWS}, {TOKENS}))
labels = tokens.where(torch.rand(tokens.shape) < 0.15, torch.tensor(-100))
loss = model(input_ids=tokens, labels=labels, next_sentence_label=torch.randint(0, 2, ({ROWS},))).loss
loss.backward()
optimizer.step()
print(time.time())
"""


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--other", help="the root of another checkout of this repository")
    parser.add_argument("--repeats", type=cli.positive_int, default=7, help="timed starts of each")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        starts = {"this": lambda: training_start(ROOT, Path(folder)),
                  "import torch": lambda: {"total": ended("import time, torch; print(time.time())")},
                  "transformers": lambda: {"total": ended(TRANSFORMERS)}}
        if args.other:
            starts["other"] = lambda: training_start(Path(args.other).resolve(), Path(folder))
        write_data(Path(folder))
        rounds = [{name: start() for name, start in starts.items()} for _ in range(args.repeats + 1)][1:]
    seconds = {name: {stage: spread([found[name][stage] for found in rounds]) for stage in rounds[0][name]}
               for name in starts}
    ratios = {name: spread([found["this"]["total"] / found[name]["total"] for found in rounds])
              for name in starts if name != "this"}
    figures = {"batch": f"{ROWS} x {TOKENS}", "seconds": seconds, "time_over": ratios,
               "machine": machine("transformers")}
    report(figures, args.json, lines(figures))


def lines(figures: dict) -> list[str]:
    shown = [(f"{name}, {stage}", found) for name, stages in figures["seconds"].items()
             for stage, found in stages.items()]
    return [f"from the start of a process to the end of its first step, BERT-mini, {figures['batch']} tokens",
            *(f"  {name:28s}{found['median']:.3f} s ({found['min']:.3f} to {found['max']:.3f})"
              for name, found in shown),
            *(f"  {found['median']:.2f} times as long as {name} ({found['min']:.2f} to {found['max']:.2f})"
              for name, found in figures["time_over"].items())]


def write_data(folder: Path) -> None:
    import numpy as np

    from tests.support.synthetic import write_unpacked_shard

    for number in range(4):
        write_unpacked_shard(folder / f"data/part_training_{number}.hdf5", np.full(2000, TOKENS), number, TOKENS,
                             PREDICTIONS)


def training_start(root: Path, folder: Path) -> dict[str, float]:
    """Seconds by STAGES of a training of one step, and of --help, by the checkout at `root`."""
    values = {"config_file": root / CONFIG, "input_dir": folder / "data", "output_dir": folder / "out",
              "train_batch_size": ROWS, "max_steps": 1, "learning_rate": 0.001, "json_summary": folder / "log.json"}
    command = [sys.executable, str(root / "run_pretraining.py")]
    flags = ["--do_train", "--no_cuda", "--use_fused_lamb", "--skip_checkpoint",
             *(f"--{name}={value}" for name, value in values.items())]
    began = time.time()
    subprocess.run([*command, *flags], check=True, capture_output=True)
    ended_at = time.time()
    text = (folder / "log.json").read_text(encoding="utf-8")
    log = [json.loads(line.removeprefix("DLLL ")) for line in text.splitlines()]
    times = [float(line["timestamp"]) for line in log]
    imported = times[0] - float(log[0]["elapsedtime"])
    stepped = next(at for at, line in zip(times, log, strict=True) if "step_loss" in line["data"])
    before_help = time.time()
    subprocess.run([*command, "--help"], check=True, capture_output=True)
    return dict(zip(STAGES, (stepped - began, imported - began, times[0] - imported, stepped - times[0],
                             ended_at - times[-1], time.time() - before_help), strict=True))


def ended(program: str) -> float:
    """Seconds from the start of a Python process to the time that its program prints as its last line."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, encoding="utf-8", cwd=ROOT)
    return float(done.stdout.splitlines()[-1]) - began


if __name__ == "__main__":
    cli.run(main)
