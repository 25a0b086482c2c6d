"""The log of a run: JSON lines in dllogger's format, lines on the console, a progress bar, TensorBoard.

A line of the file is `DLLL {json}` with timestamp, datetime, elapsedtime, type, step and data; step is "PARAMETER",
[epoch, step], or [] for the summary at the end.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from common.cli import discard_output
from common.errors import UserError


@dataclass(frozen=True)
class Figure:
    """A figure of a step, and where it is shown.  The log file gets every figure."""

    name: str  # its key in the log
    console: str = ""  # its format on the console
    tag: str = ""  # in TensorBoard
    title: str = ""  # of its panel in plot_training.py
    unit: str = ""  # of that panel's axis
    line_in: str = ""  # the figure in whose panel it is drawn as a dashed line


FIGURES = (
    Figure("average_loss", "loss {:.4f}", "loss/total", "Training loss", "MLM + NSP, nats"),
    Figure("average_mlm_loss", "mlm {:.4f}"),
    Figure("average_nsp_loss", "nsp {:.4f}"),
    Figure("mlm_loss", "", "loss/mlm", "MLM loss", "nats"),
    Figure("nsp_loss", "", "loss/nsp", "NSP loss", "nats"),
    Figure("learning_rate", "rate {:.3e}", "optimizer/learning_rate", "Learning rate", "rate"),
    Figure("gradient_norm", "", "optimizer/gradient_norm"),
    Figure("skipped_steps", "", "optimizer/skipped_steps"),
    Figure("average_perf_per_step", "{:.1f} sequences/s", "speed/sequences_per_second", "Throughput", "sequences/s"),
    Figure("average_training_time_step", "{:.3f} s/step", "speed/seconds_per_step"),
    Figure("data_waiting_share", "data wait {:.1%}", "speed/data_waiting_share"),
    Figure("host_time_share", "", "speed/host_time_share"),  # near 1 on an accelerator: the host limits the speed
    Figure("model_flops_utilization", "MFU {:.1%}"),
    Figure("eval_mlm_loss", "", "held_out/mlm_loss", "Held-out MLM loss", "nats"),
    Figure("eval_context_free_mlm_loss", "", "held_out/context_free_mlm_loss", line_in="eval_mlm_loss"),
    Figure("eval_mlm_accuracy", "", "held_out/mlm_accuracy", "Held-out MLM accuracy", "share"),
    Figure("eval_context_free_mlm_accuracy", "", "held_out/context_free_mlm_accuracy", line_in="eval_mlm_accuracy"),
    *(Figure(f"eval_{kind}_loss", "", f"held_out/{kind}_loss") for kind in ("mask", "kept", "replaced")),
    Figure("eval_nsp_loss", "", "held_out/nsp_loss"),
    Figure("eval_nsp_accuracy", "", "held_out/nsp_accuracy", "Held-out NSP accuracy", "share"),
    Figure("eval_nsp_larger_class", "", "held_out/nsp_larger_class", line_in="eval_nsp_accuracy"),
)


class TrainingLog:
    """The log of one process; only rank 0's is `active`.

    With `path` None there is no file.  `tensorboard`, a TensorBoardLog, gets the figures of the steps too.
    """

    def __init__(self, path, active: bool, append: bool, tensorboard=None):
        self.started = time.time()
        self.active = active
        self.tensorboard = tensorboard
        self.bar = None
        self.last_line = [0, 0]  # epoch and step of the last logged step
        self.file = PersistentFile(path, append) if active and path else None

    def write(self, step, data: dict) -> None:
        """Append one line to the file.  Numbers that are not finite become null, because JSON has none."""
        if self.file is None:
            return
        now = time.time()
        data = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in data.items()}
        line = {"timestamp": f"{now:.6f}", "datetime": str(datetime.fromtimestamp(now)),
                "elapsedtime": f"{now - self.started:.6f}", "type": "LOG", "step": step, "data": data}
        problem = self.file.append(f"DLLL {json.dumps(line)}\n".encode())
        if problem:
            self.print(problem)
        if self.tensorboard and isinstance(step, list) and step:
            self.tensorboard.add(step[1], data)

    def print(self, text: str) -> None:
        """Print a line on the console, flushed because the output may be a file or a pipe."""
        if self.active:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:  # nobody reads any more, which must not end the run
                discard_output()
            except OSError:  # nor must a full disk
                pass

    def warn(self, text: str) -> None:
        """Print and log a problem that did not end the run."""
        self.print(f"warning: {text}")
        self.write(self.last_line, {"warning": text})

    def start_bar(self, first: int, last: int, disabled: bool) -> None:
        """Show a progress bar, on a terminal only."""
        self.bar = tqdm(total=last, initial=first, unit="step", disable=disabled or not self.active or None,
                        dynamic_ncols=True)

    def step(self, epoch: int, step: int, data: dict) -> None:
        """Report the figures of a logged step in the file, on the console, and beside the bar."""
        self.last_line = [epoch, step]
        self.write(self.last_line, data)
        self.bar.set_postfix_str(f"loss {data['step_loss']:.3f}, {data['average_perf_per_step']:.1f} sequences/s",
                                 refresh=False)
        shown = [figure.console.format(data[figure.name]) for figure in FIGURES
                 if figure.console and figure.name in data]
        self.print("  ".join([f"epoch {epoch} step {step}", *shown]))

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
    """A file that lines are appended to.  Lines that cannot be written are kept and written with the next one."""

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
        """End the line that a killed run may have left unfinished."""
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            self.waiting = b"" if self.file.read(1) == b"\n" else b"\n"

    def append(self, line: bytes) -> str | None:
        """Write a line.  Returns a message when writing begins to fail, and when it works again."""
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


def summary_writer():
    """PyTorch's SummaryWriter; UserError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard_logdir needs the package tensorboard (pip install tensorboard): "
                        f"{error}") from None
    return SummaryWriter


class TensorBoardLog:
    """Writes to `folder`; `offset`, in phase 2 the last step of phase 1, is added to the steps.

    TensorBoard then hides the steps after `resumed_step` that an interrupted run wrote.
    """

    def __init__(self, folder, offset: int, resumed_step: int):
        self.offset = offset
        try:
            self.writer = summary_writer()(str(folder), purge_step=offset + resumed_step + 1)
        except OSError as error:
            raise UserError(f"--tensorboard_logdir {folder}: {error.strerror}") from None

    def add(self, step: int, data: dict) -> None:
        for figure in FIGURES:
            if figure.tag and data.get(figure.name) is not None:
                self.writer.add_scalar(figure.tag, data[figure.name], self.offset + step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def read_log(path: str) -> list[dict]:
    """The lines of a log; those that cannot be parsed, such as an unfinished last line, are skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = []
    for line in text.splitlines():
        try:
            parsed = json.loads(line.removeprefix("DLLL "))
            lines.append({"step": parsed["step"], "data": dict(parsed["data"])})
        except (ValueError, KeyError, TypeError):
            continue
    if not lines:
        raise UserError(f"{path}: not a log of run_pretraining.py")
    return lines
