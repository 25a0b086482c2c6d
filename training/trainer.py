"""The training loop: one iteration is one optimizer step."""

import argparse
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import lamb
from checkpoint.async_writer import CheckpointWriter
from checkpoint.folder import checkpoint_path, saved_steps
from checkpoint.resume import Phase
from checkpoint.state import TrainingState
from common.errors import UserError
from data.dataloader import sequences_in
from devices.device import Device
from optim import build as optimizers
from optim.lr_schedule import learning_rate
from parallel.gradient_reduction import Reduction
from parallel.ranks import SingleRank
from parallel.stop_signal import StopSignals, StopVote
from training.compilation import GraphWatch
from training.evaluation import Evaluator, describe_figures
from training.log import TrainingLog
from training.metrics import Throughput, batch_flops, measured_peak
from training.profiling import StepProfiler

LOSSES = ("loss", "mlm_loss", "nsp_loss")  # of the model's forward pass
SUMS = ("sum_loss", "sum_mlm_loss", "sum_nsp_loss", "finite_steps")  # of them over the steps since the last log line


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


@dataclass(kw_only=True)
class Trainer:
    """Everything a run consists of, put together by run_pretraining.py."""

    args: argparse.Namespace
    ranks: SingleRank
    device: Device
    state: TrainingState
    reduction: Reduction
    plan: BatchPlan
    phase: Phase
    first_step: int  # steps of the phase that are done already
    evaluator: Evaluator | None
    log: TrainingLog

    def __post_init__(self):
        args, device = self.args, self.device
        self.model, self.optimizer = self.state.model, self.state.optimizer
        self.stream, self.precision = self.state.stream, self.state.precision
        self.last_step = args.max_steps if args.steps_this_run == -1 else args.steps_this_run
        self.log_every = max(1, round(args.log_freq))
        self.throughput = Throughput(args.peak_tflops * 1e12 or measured_peak(device, self.precision.dtype))
        self.graph_watch = GraphWatch(device)
        self.profiler = StepProfiler(args, device, self.ranks.rank, self.log.print)
        self.signals = StopSignals()
        self.stop_vote = StopVote(self.ranks)
        self.batch = None  # the next micro-batch, on the device
        self.final_loss = None
        self.loss_sums = self.zeros(len(SUMS))
        self.checkpoints = CheckpointWriter(args.output_dir, device, self.log.print, self.log.warn, self.phase.first)

    def train(self) -> dict:
        """Run from the start to the last step of this run; the figures of its summary."""
        began = time.perf_counter()
        self.log.start_bar(self.first_step, self.last_step, self.args.disable_progress_bar)
        with self.signals.listening():
            try:
                self.run_steps()
            finally:
                self.checkpoints.close()
        return self.summary(time.perf_counter() - began)

    def run_steps(self) -> None:
        for step in range(self.first_step + 1, self.last_step + 1):
            with self.profiler.around(step):
                losses = self.train_step(step)
            stopping = self.stop_vote.result()
            if stopping:
                self.log.print(f"stopping after step {step}: {self.signals.name or 'a signal'} asked for it")
                self.last_step = step
            if self.is_due(step, self.log_every):
                self.log_step(step, losses)
            if self.is_due(step, self.args.num_steps_per_checkpoint) and not self.args.skip_checkpoint:
                self.save(step)
            if self.evaluator and self.is_due(step, self.args.eval_freq) and not stopping:
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
        self.device.seed(step_seed(self.args.seed, self.phase, step, self.ranks.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.learning_rate, self.args.warmup_proportion, self.args.max_steps)
        losses = self.zeros(len(LOSSES))
        batch = self.first_batch()
        for micro_step in range(1, self.plan.accumulation_steps + 1):
            last = micro_step == self.plan.accumulation_steps
            if last:  # a step can take a minute, so the vote starts late; its result arrives while the device works
                self.stop_vote.start(stop=self.signals.received)
            with self.reduction.micro_step(last):
                with self.precision.autocast():
                    outputs = self.reduction.model(batch)
                self.precision.backward(nan_grads_if_loss_not_finite(outputs["loss"]) / self.plan.accumulation_steps)
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

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count).to(self.device.torch_device, non_blocking=True)

    def first_batch(self) -> dict[str, torch.Tensor]:
        """The micro-batch that the next step starts with."""
        self.batch = self.batch or self.next_batch()
        return self.batch

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next micro-batch, on its way to the device."""
        began = time.perf_counter()
        batch = next(self.stream)
        waiting = time.perf_counter() - began
        self.throughput.add_micro_batch(sequences_in(batch) * self.ranks.world_size, waiting,
                                        batch_flops(self.model.config, batch))
        return self.device.put(batch)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0 = only at the end) is done after this one."""
        return step == self.last_step or (every > 0 and step % every == 0)

    @property
    def batches_ahead(self) -> int:
        """Micro-batches that were taken from the stream and are not used yet."""
        return 0 if self.batch is None else 1

    @property
    def epoch(self) -> int:
        return self.stream.epoch(self.stream.rows_used(self.batches_ahead))

    def log_step(self, step: int, losses: torch.Tensor) -> None:
        """Log the steps since the last time: the only place in the loop where values reach the host.

        The averages are over the steps whose loss is finite, and over all ranks.
        """
        metrics = optimizers.optimizer_metrics(self.optimizer)
        values = torch.cat([losses, self.loss_sums, *(value.reshape(1) for value in metrics.values())]).cpu()
        fetched = dict(zip([*LOSSES, *SUMS, *metrics], self.ranks.mean(values).tolist(), strict=True))
        sums, optimizer_metrics = ({name: fetched[name] for name in names} for names in (SUMS, metrics))
        steps = sums.pop("finite_steps")
        averages = {name.replace("sum", "average"): total / steps if steps else math.nan
                    for name, total in sums.items()}
        self.final_loss = averages["average_loss"]
        self.loss_sums = self.zeros(len(SUMS))
        new_graphs = self.graph_watch.new_graphs(step - self.first_step)
        self.log.step(self.epoch, step, {
            **averages, "step_loss": fetched["loss"], "mlm_loss": fetched["mlm_loss"], "nsp_loss": fetched["nsp_loss"],
            "learning_rate": self.optimizer.param_groups[0]["lr"], **optimizer_metrics,
            "skipped_shards": len(self.stream.skipped_shards),
            **self.throughput.read(), **self.device.memory(), **self.device.graphs()})
        self.stop_where_lost(step, optimizer_metrics)
        if not optimizers.can_skip(self.optimizer) and not math.isfinite(fetched["loss"]):
            raise self.lost(step, f"the loss is {fetched['loss']}, and {type(self.optimizer).__name__} "
                                  f"cannot skip a step")
        if new_graphs:
            self.log.print(f"warning: {new_graphs} graphs compiled since the last line, though the warm-up is over: "
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
            self.stop_where_lost(step, optimizers.skip_counts(self.optimizer))
            norm = lamb.global_norm(list(self.model.parameters()), self.device.has_foreach_kernels)
            if not torch.isfinite(norm).item():
                raise self.lost(step, "there are weights that are not finite")
            number = self.phase.first + step
            path = checkpoint_path(self.args.output_dir, number)
            try:
                contents = self.state.state_dict(path, self.ranks, self.batches_ahead)
            except OSError as error:  # on all ranks alike
                if step == self.last_step:
                    raise UserError(f"{path.name}, the last of this run, could not be written: {error}") from None
                self.log.warn(f"{path.name} could not be written ({error}), and the training continues")
                return
            if self.ranks.first:
                self.checkpoints.save(number, {**contents, "step": step, "phase": self.phase.number})

    def stop_where_lost(self, step: int, optimizer_metrics: dict[str, float]) -> None:
        """UserError where more steps in a row were skipped than --max_skipped_steps allows."""
        skipped = int(optimizer_metrics.get("most_skipped_in_a_row", 0))
        if skipped >= self.args.max_skipped_steps:
            raise self.lost(step, f"{skipped} steps in a row were skipped, since the loss or the gradient norm was not "
                                  f"finite (--max_skipped_steps {self.args.max_skipped_steps})")

    def lost(self, step: int, reason: str) -> UserError:
        kept = saved_steps(self.args.output_dir)
        newest = checkpoint_path(self.args.output_dir, kept[-1]) if kept else "none"
        return UserError(f"step {step}: {reason}; the last good checkpoint, {newest}, is as it was: "
                         f"look at the data, or continue from there with a lower --learning_rate")

    def evaluate(self, step: int) -> None:
        with self.paused():
            figures = self.evaluator.evaluate(self.model)
        self.log.write([self.epoch, step], {f"eval_{name}": value for name, value in figures.items()})
        self.log.print(f"held out after step {step}: {describe_figures(figures)}")

    def summary(self, seconds: float) -> dict:
        """The figures of the whole run, logged with an empty step."""
        data = {"e2e_train_time": time.time() - self.log.started, "raw_train_time": seconds,
                "training_sequences_per_second": self.throughput.average, "final_loss": self.final_loss}
        self.log.write([], data)
        return data


def step_seed(seed: int, phase: Phase, step: int, rank: int) -> int:
    """The seed of the dropout of one step on one rank: a function of nothing else, so that resuming needs no state."""
    sequence = np.random.SeedSequence([seed, phase.number - 1, step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def nan_grads_if_loss_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, but one that is not finite gives gradients that are not, on whatever path it came about.

    So a single test, that of the gradient norm, is enough, and where ranks add up their gradients, all find the same.
    """
    return loss / torch.isfinite(loss.detach()).float()  # by 1, or by 0


def with_count(losses: torch.Tensor) -> torch.Tensor:
    """The losses and a 1 behind them; zeros where they are not finite.  (3,) → (4,)"""
    finite = torch.isfinite(losses.sum()).float()
    return torch.cat([losses.masked_fill(finite == 0.0, 0.0), finite.reshape(1)])
