"""The training loop: one iteration is one optimizer step."""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import lamb
from checkpoint import folder as checkpoint
from checkpoint import optimizer_shards as optimizer_state
from checkpoint.async_writer import CheckpointWriter
from common.errors import UserError
from data.dataloader import sequences_in
from optim import build as optimizers
from optim.lr_schedule import learning_rate
from parallel.stop_signal import Agreement, StopSignals
from training.compilation import GraphWatch
from training.evaluation import describe, evaluate
from training.metrics import Throughput, batch_flops, measured_peak
from training.profiling import StepProfiler

LOSSES = ("loss", "mlm_loss", "nsp_loss")


@dataclass(frozen=True)
class BatchPlan:
    """How many rows and micro-batches make an optimizer step of one card."""

    micro_batch_size: int  # rows
    accumulation_steps: int
    sequences_per_row: float
    asked_sequences: int  # --train_batch_size

    @classmethod
    def from_flags(cls, args, sequences_per_row: float) -> "BatchPlan":
        """A packed row counts for its sequences: fewer micro-batches make up the same step."""
        return cls(args.train_batch_size // args.gradient_accumulation_steps,
                   max(1, round(args.gradient_accumulation_steps / sequences_per_row)), sequences_per_row,
                   args.train_batch_size)

    @property
    def rows(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def describe(self) -> str:
        sequences = self.rows * self.sequences_per_row
        return (f"batch per card and step: {self.accumulation_steps} accumulation steps × {self.micro_batch_size} rows "
                f"× {self.sequences_per_row:.4g} sequences a row = {sequences:.5g} sequences "
                f"({sequences / self.asked_sequences - 1:+.1%} against --train_batch_size {self.asked_sequences})")


class Trainer:
    """Everything a run consists of, put together by run_pretraining.py."""

    def __init__(self, args, process, device, precision, model, reduction, optimizer, stream, plan, start, held_out,
                 log):
        self.args = args
        self.process = process
        self.device = device
        self.precision = precision
        self.model = model
        self.reduction = reduction
        self.optimizer = optimizer
        self.stream = stream
        self.plan = plan
        self.start = start
        self.held_out = held_out
        self.log = log
        self.last_step = args.max_steps if args.steps_this_run == -1 else args.steps_this_run
        self.log_every = max(1, round(args.log_freq))
        self.throughput = Throughput(args.peak_tflops * 1e12 or measured_peak(device, precision.dtype))
        self.graph_watch = GraphWatch(device)
        self.profiler = StepProfiler(args, device, process.rank, log.say)
        self.signals = StopSignals()
        self.agreement = Agreement(process, ("stop",))
        self.batch = None
        self.final_loss = None
        self.loss_sums = self.zero_losses(1)  # over the steps since the last log line, and how many were added
        self.phase1_end = args.phase1_end_step if args.phase2 else 0
        self.checkpoints = CheckpointWriter(args.output_dir, device, log.say, log.warn, self.phase1_end)

    def train(self) -> dict:
        """Run from the start to the last step of this run; the figures of its summary."""
        began = time.perf_counter()
        self.log.start_bar(self.start.step, self.last_step, self.args.disable_progress_bar)
        with self.signals.listening():
            try:
                self.run_steps()
            finally:
                self.checkpoints.close()
        return self.summary(time.perf_counter() - began)

    def run_steps(self) -> None:
        for step in range(self.start.step + 1, self.last_step + 1):
            with self.profiler.around(step):
                losses = self.train_step(step)
            stopping = self.agreement.answers()["stop"]
            if stopping:
                self.log.say(f"stopping after step {step}: {self.signals.name or 'a signal'} asked for it")
                self.last_step = step
            if self.is_due(step, self.log_every):
                self.log_step(step, losses)
            if self.is_due(step, self.args.num_steps_per_checkpoint) and not self.args.skip_checkpoint:
                self.save(step)
            if self.held_out and self.is_due(step, self.args.eval_freq) and not stopping:
                self.evaluate(step)
            self.checkpoints.report_when_written()
            self.log.advance()
            if stopping:
                return

    def train_step(self, step: int) -> torch.Tensor:
        """One optimizer step; the mean LOSSES of its micro-batches, on the device.  (3,)

        Losses are added in place and before the graph ends.  In place, since hmp's casts reach the whole process but
        leave such an op in fp32; before it ends, since what is pending would make the next graph another one.
        """
        self.device.seed(step_seed(self.args, step, self.process.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.learning_rate, self.args.warmup_proportion, self.args.max_steps)
        losses = self.zero_losses()
        batch = self.first_batch()
        for micro_step in range(1, self.plan.accumulation_steps + 1):
            last = micro_step == self.plan.accumulation_steps
            if last:  # late, since a step can take a minute; not later, since the answers come while the device works
                self.agreement.ask(stop=self.signals.received)
            with self.reduction.micro_step(last):
                with self.precision.autocast():
                    outputs = self.reduction.model(batch)
                self.precision.backward(poisoned_unless_finite(outputs["loss"]) / self.plan.accumulation_steps)
            losses += torch.stack([outputs[name].detach() for name in LOSSES])
            self.device.mark_step()
            batch = self.next_batch()  # while the device works
        self.batch = batch
        losses /= self.plan.accumulation_steps
        self.loss_sums += with_count(losses)
        self.reduction.finish()
        self.precision.step(self.optimizer)
        self.model.zero_grad(set_to_none=not self.args.cuda_graphs)  # as compilation.prepare_replay wants it
        self.device.mark_step()
        self.throughput.add_step()
        return losses

    def zero_losses(self, more: int = 0) -> torch.Tensor:
        return torch.zeros(len(LOSSES) + more).to(self.device.torch_device, non_blocking=True)

    def first_batch(self) -> dict[str, torch.Tensor]:
        """The micro-batch that the next step starts with."""
        self.batch = self.batch or self.next_batch()
        return self.batch

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next micro-batch, on its way to the device."""
        began = time.perf_counter()
        batch = next(self.stream)
        waiting = time.perf_counter() - began
        self.throughput.add_micro_batch(sequences_in(batch) * self.process.world_size, waiting,
                                        batch_flops(self.model.config, batch))
        return self.device.put(batch)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0 = only at the end) is done after this one."""
        return step == self.last_step or (every > 0 and step % every == 0)

    def rows_used(self, step: int) -> int:
        """Rows of the phase's endless sequence that all ranks have used after a step."""
        return self.start.rows + (step - self.start.step) * self.plan.rows * self.process.world_size

    def epoch(self, step: int) -> int:
        return self.stream.epoch(self.rows_used(step))

    def log_step(self, step: int, losses: torch.Tensor) -> None:
        """Log the steps since the last time: the only place in the loop where values reach the host.

        The average is over the steps whose loss is finite, and over all ranks.
        """
        told = optimizers.optimizer_metrics(self.optimizer)
        values = torch.cat([self.loss_sums, losses, *(value.reshape(1) for value in told.values())]).cpu()
        values = self.process.mean(values).tolist()
        told = dict(zip(told, values[7:], strict=True))
        self.final_loss = values[0] / values[3] if values[3] else math.nan
        self.loss_sums = self.zero_losses(1)
        new_graphs = self.graph_watch.new_graphs(step - self.start.step)
        self.log.step(self.epoch(step), step, {
            "average_loss": self.final_loss, "step_loss": values[4], "mlm_loss": values[5], "nsp_loss": values[6],
            "learning_rate": self.optimizer.param_groups[0]["lr"], **told, "skipped_shards": len(self.stream.left_out),
            **self.throughput.read(), **self.device.memory(), **self.device.graphs()})
        self.stop_where_lost(step, told)
        if not optimizers.can_skip(self.optimizer) and not math.isfinite(values[4]):
            raise self.lost(step, f"the loss is {values[4]}, and {type(self.optimizer).__name__} cannot skip a step")
        if new_graphs:
            self.log.say(f"warning: {new_graphs} graphs compiled since the last line, though the warm-up is over: "
                         f"something changes shape or value from step to step (docs/graphs.md)")

    @contextmanager
    def paused(self):
        """A block that is no training: its time and its graphs do not count."""
        with self.throughput.paused(), self.graph_watch.paused():
            yield

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of everything that the next step depends on: rank 0 does, and for sharded state,
        which is written at once, every rank."""
        with self.paused():
            told = {name: value.item() for name, value in optimizers.optimizer_metrics(self.optimizer).items()}
            self.stop_where_lost(step, told)
            norm = lamb.global_norm(list(self.model.parameters()), self.device.has_foreach_kernels)
            if not torch.isfinite(norm).item():
                raise self.lost(step, "there are weights that are not finite")
            number = self.phase1_end + step
            path = checkpoint.path_of(self.args.output_dir, number)
            try:
                optimizer = optimizer_state.save(path, self.optimizer, self.process)
            except OSError as error:  # on all ranks alike
                if step == self.last_step:
                    raise UserError(f"{path.name}, the last of this run, could not be written: {error}") from None
                self.log.warn(f"{path.name} could not be written ({error}), and the training goes on")
                return
            # With keep_vars a tied weight is one tensor, not two that share their memory: it is copied once.
            state = {"model": self.model.state_dict(keep_vars=True), "optimizer": optimizer,
                     "step": step, "phase": 2 if self.args.phase2 else 1, "rows": self.rows_used(step),
                     "config": vars(self.model.config), "data": self.stream.state(), "scaler": self.precision.state(),
                     "skipped": {name: int(told[name]) for name in optimizers.SKIP_COUNTS if name in told}}
            if self.process.first:
                self.checkpoints.save(number, state)

    def stop_where_lost(self, step: int, told: dict[str, float]) -> None:
        """UserError where so many steps in a row were skipped that there is no hope left."""
        skipped = int(told.get("most_skipped_in_a_row", 0))
        if skipped >= self.args.max_skipped_steps:
            raise self.lost(step, f"{skipped} steps in a row were skipped, since the loss or the gradient norm was not "
                                  f"finite (--max_skipped_steps {self.args.max_skipped_steps})")

    def lost(self, step: int, reason: str) -> UserError:
        kept = checkpoint.steps(self.args.output_dir)
        newest = checkpoint.path_of(self.args.output_dir, kept[-1]) if kept else "none"
        return UserError(f"step {step}: {reason}; the last good checkpoint, {newest}, is as it was: "
                         f"look at the data, or go on from there with a lower --learning_rate")

    def evaluate(self, step: int) -> None:
        with self.paused():
            figures = evaluate(self.model, self.held_out, self.device, self.plan.micro_batch_size, self.precision,
                               process=self.process)
        self.log.write([self.epoch(step), step], {f"eval_{name}": value for name, value in figures.items()})
        self.log.say(f"held out after step {step}: {describe(figures)}")

    def summary(self, seconds: float) -> dict:
        """The figures of the whole run, logged with an empty step."""
        data = {"e2e_train_time": time.time() - self.log.started, "raw_train_time": seconds,
                "training_sequences_per_second": self.throughput.average, "final_loss": self.final_loss}
        self.log.write([], data)
        return data


def step_seed(args, step: int, rank: int) -> int:
    """The seed of the dropout of one step on one rank: a function of nothing else, so that resuming needs no state."""
    return int(np.random.SeedSequence([args.seed, args.phase2, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def poisoned_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, but one that is not finite gives gradients that are not, on whatever path it came about.

    So a single test, that of the gradient norm, is enough, and where ranks add up their gradients, all find the same.
    """
    return loss / torch.isfinite(loss.detach()).float()  # by 1, or by 0


def with_count(losses: torch.Tensor) -> torch.Tensor:
    """The losses and a 1 behind them; zeros where they are not finite.  (3,) → (4,)"""
    finite = torch.isfinite(losses.sum()).float()
    return torch.cat([losses.masked_fill(finite == 0.0, 0.0), finite.reshape(1)])
