"""What a run tells: JSON lines in dllogger's format, lines on the console, and a progress bar.

A line of the file is `DLLL {json}` with timestamp, datetime, elapsedtime, type, step and data; step is "PARAMETER",
[epoch, step], or [] for the summary at the end.
"""

import json
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

WARM_UP_STEPS = 2  # left out of the throughput: compilation, caches, the first reading of data


class TrainingLog:
    """The log of one process; the processes other than the first log nothing.

    `tensorboard` is a TensorBoardLog that gets the figures of the steps too.
    """

    def __init__(self, path, active: bool, append: bool, tensorboard=None):
        self.started = time.time()
        self.active = active
        self.tensorboard = tensorboard
        self.bar = None
        if active:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115 (open for the run)

    def write(self, step, data: dict) -> None:
        """Append one line to the file."""
        if not self.active:
            return
        now = time.time()
        line = {"timestamp": f"{now:.6f}", "datetime": str(datetime.fromtimestamp(now)),
                "elapsedtime": f"{now - self.started:.6f}", "type": "LOG", "step": step, "data": data}
        self.file.write(f"DLLL {json.dumps(line)}\n")
        self.file.flush()
        if self.tensorboard and isinstance(step, list) and step:
            self.tensorboard.add(step[1], data)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()  # at once also where the output is a file or a pipe

    def start_bar(self, first: int, last: int, disabled: bool) -> None:
        """A bar on a terminal; a file gets the lines alone."""
        self.bar = tqdm(total=last, initial=first, unit="step", disable=disabled or not self.active or None,
                        dynamic_ncols=True)

    def step(self, epoch: int, step: int, data: dict) -> None:
        """The figures of a logged step, in the file, on the console, and beside the bar."""
        self.write([epoch, step], data)
        self.bar.set_postfix_str(f"loss {data['step_loss']:.3f}, {data['average_perf_per_step']:.1f} sequences/s",
                                 refresh=False)
        self.say(f"epoch {epoch} step {step}  loss {data['average_loss']:.4f} (mlm {data['mlm_loss']:.4f} "
                 f"nsp {data['nsp_loss']:.4f})  rate {data['learning_rate']:.3e}  "
                 f"{data['average_perf_per_step']:.1f} sequences/s  {data['average_training_time_step']:.3f} s/step")

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.active:
            self.file.close()


class Throughput:
    """Sequences and seconds of training since the last log line, and since the warm-up."""

    def __init__(self):
        self.mark = time.perf_counter()
        self.steps = self.sequences = 0
        self.waiting = 0.0
        self.total_steps = self.measured_sequences = 0
        self.measured_seconds = 0.0

    def add_micro_batch(self, sequences: int, waiting: float) -> None:
        """A micro-batch of so many sequences is on its way, after waiting so many seconds for it."""
        self.sequences += sequences
        self.waiting += waiting

    def add_step(self) -> None:
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last reading; call it once the device has finished."""
        now = time.perf_counter()
        seconds = now - self.mark
        figures = {"average_training_time_step": seconds / self.steps,
                   "average_perf_per_step": self.sequences / seconds,
                   "data_waiting_share": self.waiting / seconds}
        if self.total_steps >= WARM_UP_STEPS:
            self.measured_sequences += self.sequences
            self.measured_seconds += seconds
        self.total_steps += self.steps
        self.mark, self.steps, self.sequences, self.waiting = now, 0, 0, 0.0
        return figures

    @contextmanager
    def paused(self):
        """A block whose time is no training time: saving, evaluating."""
        entered = time.perf_counter()
        yield
        self.mark += time.perf_counter() - entered

    @property
    def average(self) -> float | None:
        """Sequences a second after the warm-up; None where the run was too short for one."""
        return self.measured_sequences / self.measured_seconds if self.measured_seconds else None
