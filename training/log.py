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
    """A figure of the log: its key, its meaning, and where else it is shown.  The file gets every figure.

    docs/log.md lists key, unit and meaning.
    """

    name: str  # its key in the log
    unit: str
    meaning: str
    console: str = ""  # its format on the console
    tag: str = ""  # in TensorBoard
    title: str = ""  # of its panel in plot_training.py
    line_in: str = ""  # the figure in whose panel it is drawn as a dashed line


SINCE = "since the last line"
# The keys of the reference scripts, in their order; they come first in a line
REFERENCE_KEYS = ("average_loss", "step_loss", "learning_rate", "average_training_time_step", "average_perf_per_step",
                  "final_loss")
FIGURES = (
    Figure("average_loss", "nats", f"MLM + NSP loss (without NSP, MLM alone), mean of the steps {SINCE} and of all "
           "cards", "loss {:.4f}", "loss/total", "Training loss"),
    Figure("average_mlm_loss", "nats", "MLM part of `average_loss`", "mlm {:.4f}"),
    Figure("average_nsp_loss", "nats", "NSP part of `average_loss`", "nsp {:.4f}"),
    Figure("final_loss", "nats", "`average_loss` again, in the line of the run's last step only, and not where "
           "`--early_stopping` ended it"),
    Figure("step_loss", "nats", "MLM + NSP loss of the step's last micro-batch, mean of all cards"),
    Figure("step_mean_loss", "nats", "MLM + NSP loss, mean of the step's micro-batches and of all cards"),
    Figure("mlm_loss", "nats", "MLM part of `step_mean_loss`", "", "loss/mlm", "MLM loss"),
    Figure("nsp_loss", "nats", "NSP part of `step_mean_loss`", "", "loss/nsp", "NSP loss"),
    Figure("sources", "", f"of each data set of a mixture, by name: its epoch, and its MLM loss, mean {SINCE} and of "
           "all cards"),
    Figure("learning_rate", "rate", "of the step", "rate {:.3e}", "optimizer/learning_rate", "Learning rate"),
    Figure("gradient_norm", "", "norm of all gradients of the step, before it is clipped to 1", "",
           "optimizer/gradient_norm"),
    Figure("skipped_steps", "steps", "skipped so far, because loss or gradient norm were not finite", "",
           "optimizer/skipped_steps"),
    Figure("skipped_in_a_row", "steps", "skipped in a row, the last one included"),
    Figure("most_skipped_in_a_row", "steps", "the largest such number so far"),
    Figure("skipped_shards", "shards", "left out by `--skip_bad_shards`"),
    Figure("average_training_time_step", "seconds", f"of a micro-batch, mean {SINCE}; checkpoints and evaluations do "
           "not count"),
    Figure("average_perf_per_step", "sequences/s", f"of one card, {SINCE}; a packed row counts as the sequences in it"),
    Figure("sequences_per_second", "sequences/s", f"of all cards, {SINCE}", "{:.1f} sequences/s",
           "speed/sequences_per_second", "Throughput"),
    Figure("step_time", "seconds", f"of an optimizer step, mean {SINCE}", "{:.3f} s/step", "speed/seconds_per_step"),
    Figure("data_waiting_share", "share", "of the time spent waiting for data", "data wait {:.1%}",
           "speed/data_waiting_share"),
    Figure("host_time_share", "share", "of the time that the host computes; near 1 on an accelerator the host limits "
           "the speed", "", "speed/host_time_share"),
    Figure("model_flops_utilization", "share", "of the card's peak, by real tokens alone (MFU); not on Gaudi unless "
           "`--peak_tflops` is given", "MFU {:.1%}"),
    Figure("memory_allocated", "bytes", "on the card (CUDA, Gaudi)"),
    Figure("max_memory_allocated", "bytes", "the same at its peak so far"),
    Figure("graph_compilation", "graphs", "compiled so far (Gaudi, `--use_torch_compile`)"),
    Figure("cpu_fallback", "ops", "that ran on the host so far (Gaudi)"),
    Figure("cpu_fallback_ops", "text", "their names"),
    Figure("eval_mlm_loss", "nats", "of the predicted tokens of `--eval_dir`", "", "held_out/mlm_loss",
           "Held-out MLM loss"),
    Figure("eval_context_free_mlm_loss", "nats", "what a model without context reaches on the same tokens", "",
           "held_out/context_free_mlm_loss", line_in="eval_mlm_loss"),
    Figure("eval_mlm_accuracy", "share", "of the predicted tokens", "", "held_out/mlm_accuracy",
           "Held-out MLM accuracy"),
    Figure("eval_context_free_mlm_accuracy", "share", "what a model without context reaches", "",
           "held_out/context_free_mlm_accuracy", line_in="eval_mlm_accuracy"),
    *(figure for kind, shown in (("mask", "`[MASK]`"), ("kept", "themselves"), ("replaced", "another word"))
      for figure in (
          Figure(f"eval_{kind}_loss", "nats", f"of the predicted tokens that show {shown}", "",
                 f"held_out/{kind}_loss"),
          Figure(f"eval_{kind}_accuracy", "share", "of the same tokens"),
          Figure(f"eval_{kind}_context_free_loss", "nats", "what a model without context reaches on them"))),
    Figure("eval_masked_tokens", "tokens", "predicted in `--eval_dir`"),
    Figure("eval_sequences", "sequences", "in `--eval_dir`"),
    Figure("eval_nsp_loss", "nats", "of the sequences of `--eval_dir`", "", "held_out/nsp_loss"),
    Figure("eval_nsp_accuracy", "share", "of the sequences", "", "held_out/nsp_accuracy", "Held-out NSP accuracy"),
    Figure("eval_nsp_larger_class", "share", "of the larger class: the accuracy of always naming it", "",
           "held_out/nsp_larger_class", line_in="eval_nsp_accuracy"),
    Figure("warning", "text", "what the run continued in spite of"),
)
PARAMETERS = (  # beside the flags
    Figure("Config", "text", "all flags, as Python prints their Namespace"),
    Figure("SEED", "", "`--seed`"),
    Figure("train_start", "", "true"),
    Figure("batch_size_per_pu", "rows", "of a micro-batch on one card"),
    Figure("config", "", "the architecture, by the keys of `--config_file`"),
    Figure("device", "text", "what the run computes on"),
    Figure("world_size", "cards", "of the run"),
    Figure("batch_plan", "", "rows of a micro-batch, accumulation steps, sequences per row"),
    Figure("software", "", "releases"),
    Figure("machine", "", "system, processor and cores of the first server; not its name"),
    Figure("descriptions", "", "precision, layers, optimizer, reduction and compilation, as on the console"),
    Figure("checkpoint_step", "steps", "of the phase, in a line of its own: the writing of this checkpoint has begun"),
)
SUMMARY = (
    Figure("e2e_train_time", "seconds", "of the command, without the loading of its libraries"),
    Figure("training_sequences_per_second", "sequences/s", "of all cards: all sequences over `raw_train_time`"),
    Figure("final_loss", "nats", "`average_loss` of the last line; null where no step was left to do"),
    Figure("raw_train_time", "seconds", "of the loop, until its last step was logged"),
    Figure("steady_sequences_per_second", "sequences/s", "of all cards, without checkpoints, evaluations and "
           "the first log lines, until two steps are done; null for a short run"),
)


class TrainingLog:
    """The log of one process; only rank 0's is `active`.

    With `path` None there is no file.  `tensorboard`, a TensorBoardLog, gets the figures of the steps too.  With
    `dllogger_console` the lines of the file are printed too.  `started` is the second from which elapsed time counts.
    """

    def __init__(self, path, active: bool, append: bool, *, tensorboard=None, started: float | None = None,
                 dllogger_console: bool = False):
        self.started = started or time.time()
        self.active = active
        self.dllogger_console = dllogger_console
        self.tensorboard = tensorboard
        self.bar = None
        self.last_line = [0, 0]  # epoch and step of the last logged step
        self.file = PersistentFile(path, append) if active and path else None

    def write(self, step, data: dict) -> None:
        """Append one line to the file.  Numbers that are not finite become null, because JSON has none."""
        now = time.time()
        if self.dllogger_console:
            self.print(dllogger_line(datetime.fromtimestamp(now), step, data))
        if self.file is None:
            return
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
        first = {key: data[key] for key in REFERENCE_KEYS if key in data}
        self.write(self.last_line, first | data)
        self.bar.set_postfix_str(f"loss {data['step_mean_loss']:.3f}, {data['sequences_per_second']:.1f} sequences/s",
                                 refresh=False)
        shown = [figure.console.format(data[figure.name]) for figure in FIGURES
                 if figure.console and figure.name in data]
        of_sources = [f"{name} {loss:.4f}" for name, loss in losses_of_sources(data).items()]
        self.print("  ".join([f"epoch {epoch} step {step}", *shown, *of_sources]))

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.file is not None:
            self.file.close()


def losses_of_sources(data: dict) -> dict[str, float]:
    return {name: figures["mlm_loss"] for name, figures in data.get("sources", {}).items() if "mlm_loss" in figures}


def dllogger_line(time_of_day: datetime, step: str | list[int], data: dict) -> str:
    """The line that dllogger's StdOutBackend prints in the reference scripts.

        >>> dllogger_line(datetime(2020, 5, 1, 12, 30), [0, 100], {"step_loss": 6.5, "final_loss": 6.4})
        'DLL 2020-05-01 12:30:00 - Training Epoch: 0 Training Iteration: 100  step_loss : 6.5  final_loss : 6.4 '
    """
    names = ("Training Epoch", "Training Iteration")
    where = step if isinstance(step, str) else "".join(
        f"{name}: {number} " for name, number in zip(names, step, strict=False))
    return f"DLL {time_of_day} - {where} " + " ".join(f"{key} : {value} " for key, value in data.items())


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
        for name, loss in losses_of_sources(data).items():
            self.writer.add_scalar(f"loss/mlm_{name}", loss, self.offset + step)
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
