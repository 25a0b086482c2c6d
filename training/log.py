"""What a run tells: JSON lines in dllogger's format, lines on the console, and a progress bar.

A line of the file is `DLLL {json}` with timestamp, datetime, elapsedtime, type, step and data; step is "PARAMETER",
[epoch, step], or [] for the summary at the end.
"""

import json
import math
import os
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError


class TrainingLog:
    """The log of one process; the processes other than the first log nothing.

    `path` None is a log on the console only; `tensorboard` is a TensorBoardLog that gets the figures of the steps too.
    """

    def __init__(self, path, active: bool, append: bool, tensorboard=None):
        self.started = time.time()
        self.active = active
        self.tensorboard = tensorboard
        self.bar = None
        self.place = [0, 0]  # epoch and step of the last line about a step
        self.file = PersistentFile(path, append) if active and path else None

    def write(self, step, data: dict) -> None:
        """Append one line to the file.  What is not finite becomes null: JSON has no word for it."""
        if self.file is None:
            return
        now = time.time()
        data = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in data.items()}
        line = {"timestamp": f"{now:.6f}", "datetime": str(datetime.fromtimestamp(now)),
                "elapsedtime": f"{now - self.started:.6f}", "type": "LOG", "step": step, "data": data}
        outcome = self.file.append(f"DLLL {json.dumps(line)}\n".encode())
        if outcome:
            self.say(outcome)
        if self.tensorboard and isinstance(step, list) and step:
            self.tensorboard.add(step[1], data)

    def say(self, text: str) -> None:
        """A line for people, at once also where the output is a file or a pipe."""
        if self.active:
            with suppress(OSError):  # the disk is full, or nobody reads any more: no reason to stop
                tqdm.write(text)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line for people and programs about something that the run got over."""
        self.say(f"warning: {text}")
        self.write(self.place, {"warning": text})

    def start_bar(self, first: int, last: int, disabled: bool) -> None:
        """A bar on a terminal; a file gets the lines alone."""
        self.bar = tqdm(total=last, initial=first, unit="step", disable=disabled or not self.active or None,
                        dynamic_ncols=True)

    def step(self, epoch: int, step: int, data: dict) -> None:
        """The figures of a logged step, in the file, on the console, and beside the bar."""
        self.place = [epoch, step]
        self.write(self.place, data)
        self.bar.set_postfix_str(f"loss {data['step_loss']:.3f}, {data['average_perf_per_step']:.1f} sequences/s",
                                 refresh=False)
        self.say(f"epoch {epoch} step {step}  loss {data['average_loss']:.4f} (mlm {data['mlm_loss']:.4f} "
                 f"nsp {data['nsp_loss']:.4f})  rate {data['learning_rate']:.3e}  "
                 f"{data['average_perf_per_step']:.1f} sequences/s  {data['average_training_time_step']:.3f} s/step  "
                 f"data wait {data['data_waiting_share']:.1%}"
                 + (f"  MFU {data['model_flops_utilization']:.1%}" if "model_flops_utilization" in data else ""))

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.file is not None:
            self.file.close()


class PersistentFile:
    """A file that lines are appended to.  Those that the disk does not take are kept, and tried again with the next."""

    def __init__(self, path, append: bool):
        self.path = path
        self.waiting = b""
        self.failing = False
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b" if append else "w+b", buffering=0)  # noqa: SIM115 (open for the run)
            self.end_last_line()
        except OSError as error:
            raise UserError(f"--json_summary {path}: cannot be written: {error.strerror}") from None

    def end_last_line(self) -> None:
        """A run that was killed may have left half a line."""
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            self.waiting = b"" if self.file.read(1) == b"\n" else b"\n"

    def append(self, line: bytes) -> str | None:
        """Write a line.  What there is to say about it: when writing begins to fail, and when it works again."""
        self.waiting += line
        failed_before = self.failing
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]
            self.failing = False
        except OSError as error:
            self.failing = True
            return None if failed_before else f"warning: {self.path}: {error.strerror}: its lines are kept for later"
        return f"{self.path}: written to again, no line is missing" if failed_before else None

    def close(self) -> None:
        self.append(b"")
        self.file.close()
