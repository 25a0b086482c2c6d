"""The training loop: one iteration is one optimizer step."""

import argparse
import math
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import lamb
from checkpoint.async_writer import CheckpointWriter
from checkpoint.folder import checkpoint_path, newest_name
from checkpoint.optimizer_shards import on_all_ranks
from checkpoint.remote_folder import RemoteFolder
from checkpoint.resume import Phase
from checkpoint.state import PHASE_STEPS, STEP_ROWS, TrainingState
from common.errors import UserError
from common.locks import announce_end
from data.dataloader import sequences_in
from devices.device import Device
from optim.build import optimizer_metrics, skip_counts
from optim.lr_schedule import learning_rate
from parallel.gradient_reduction import Reduction
from parallel.ranks import SingleRank
from parallel.stop_signal import StopSignals, StopVote
from training.compilation import GraphWatch
from training.evaluation import Evaluator, describe_figures
from training.log import TrainingLog
from training.loss_weights import build_loss_weights
from training.metrics import Throughput, batch_flops, measured_peak
from training.profiling import StepProfiler
from training.source_losses import SourceLosses

# The model's losses by their names in the log: the means of the logged step, and the means since the last log line
STEP_LOSSES = {"loss": "step_mean_loss", "mlm_loss": "mlm_loss", "nsp_loss": "nsp_loss"}
AVERAGES = {"loss": "average_loss", "mlm_loss": "average_mlm_loss", "nsp_loss": "average_nsp_loss"}
LAST_LOSS = "step_loss"  # of the last micro-batch


@dataclass(frozen=True)
class BatchPlan:
    """The rows and micro-batches of an optimizer step on one card."""

    micro_batch_size: int  # rows
    accumulation_steps: int
    sequences_per_row: float
    train_batch_size: int  # sequences, as the flag asks
    step_rows: int  # that a step is to have, over all cards

    @classmethod
    def from_flags(cls, args, sequences_per_row: float, world_size: int) -> "BatchPlan":
        """Because a packed row holds several sequences, fewer micro-batches make a step of as many sequences."""
        micro_batch_size = args.train_batch_size // args.gradient_accumulation_steps
        accumulation_steps = max(1, round(args.gradient_accumulation_steps / sequences_per_row))
        return cls(micro_batch_size, accumulation_steps, sequences_per_row, args.train_batch_size,
                   micro_batch_size * accumulation_steps * world_size)

    def with_step_rows(self, rows: int, world_size: int) -> "BatchPlan":
        """The plan for steps of as many rows over all cards, as nearly as whole micro-batches on each allow."""
        return replace(self, step_rows=rows, accumulation_steps=max(1, round(rows / (
            self.micro_batch_size * world_size))))

    @property
    def rows(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def steps(self, epochs: float, rows: int, world_size: int) -> int:
        """The optimizer steps in which `world_size` cards use `rows` rows `epochs` times, at least one."""
        return max(1, math.ceil(epochs * rows / (self.rows * world_size)))

    def describe(self) -> str:
        sequences = self.rows * self.sequences_per_row
        return (f"batch per card and step: {self.accumulation_steps} accumulation steps × {self.micro_batch_size} rows "
                f"× {self.sequences_per_row:.4g} sequences a row = {sequences:.5g} sequences "
                f"({sequences / self.train_batch_size - 1:+.1%} against --train_batch_size {self.train_batch_size})")


@dataclass(kw_only=True)
class Trainer:
    """The training loop over the parts that run_pretraining.py built."""

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
    folder: Path | RemoteFolder  # of the checkpoints

    def __post_init__(self):
        args, device = self.args, self.device
        self.model, self.optimizer = self.state.model, self.state.optimizer
        self.stream, self.precision = self.state.stream, self.state.precision
        self.last_step = args.max_steps if args.steps_this_run == -1 else args.steps_this_run
        if self.state.early_stopping and self.state.early_stopping.is_over:
            self.last_step = self.first_step
        self.throughput = Throughput(args.peak_tflops * 1e12 or measured_peak(device, self.precision.dtype),
                                     self.ranks.world_size)
        self.graph_watch = GraphWatch(device)
        self.profiler = StepProfiler(args, device, self.ranks.rank, self.log.print)
        self.signals, self.stopped = StopSignals(), False  # whether one has ended the run before its last step
        self.stop_vote = StopVote(self.ranks)
        self.loss_weights = build_loss_weights(args.normalize_loss, self.plan.accumulation_steps, self.ranks, device)
        self.batches = deque()  # the next micro-batches, on the device, their sources, and what Throughput counts
        names = [source.name for source in self.stream.order.sources]
        self.source_losses = SourceLosses(names, device, self.ranks) if len(names) > 1 else None
        self.final_loss = None
        self.began, self.seconds = time.perf_counter(), 0.0  # of the loop, until the last log line
        self.loss_names = self.model.loss_names
        self.loss_sums = self.zeros(len(self.loss_names) + 1)  # over the steps since the last log line, see with_count
        steps = max(0, self.last_step - self.first_step)
        self.stream.ends_at(self.stream.next_row + steps * self.plan.accumulation_steps * self.stream.order.stride)
        self.checkpoints = CheckpointWriter(self.folder, device, self.log.print, self.log.warn)

    def train(self) -> dict:
        """Run all steps; returns the figures of the summary."""
        self.began = time.perf_counter()
        self.log.start_bar(self.first_step, self.last_step, self.args.disable_progress_bar)
        with self.signals.listening():
            try:
                self.run_steps()
            finally:
                self.checkpoints.close()
        return self.summary()

    def run_steps(self) -> None:
        for step in range(self.first_step + 1, self.last_step + 1):
            with self.profiler.around(step):
                losses = self.train_step(step)
            stopping = self.stop_vote.result()
            if stopping:
                self.log.print(f"stopping after step {step}: {self.signals.name or 'a signal'} asked for it")
                self.stopped, self.last_step = step < self.last_step, step
                announce_end()
            if self.is_due(step, self.args.log_freq):
                self.log_step(step, losses)
            is_best = False
            if self.evaluator and self.is_due(step, self.args.eval_freq) and not stopping:
                is_best = self.evaluate(step, losses)
            if (is_best or self.is_due(step, self.args.num_steps_per_checkpoint)) and not self.args.skip_checkpoint:
                self.save(step)
            self.checkpoints.report_when_written()
            self.log.advance()
            if step == self.last_step:
                return

    def train_step(self, step: int) -> torch.Tensor:
        """One optimizer step; the losses of its micro-batches, averaged as loss_weights says, and LAST_LOSS, on the
        device.  (4,), without NSP (3,)

        Losses are added in place, because hmp casts ops in the whole process but leaves in-place ones in fp32; and
        before mark_step, because a pending op would change the next graph.
        """
        self.device.seed(step_seed(self.args.seed, self.phase, step, self.ranks.rank))
        rate = learning_rate(step, self.args.learning_rate, self.args.warmup_proportion, self.args.max_steps,
                             self.args.lr_schedule)
        for group, factor in zip(self.optimizer.param_groups, (1.0, self.args.undecayed_rate), strict=True):
            group["lr"] = rate * factor
        losses = self.zeros(len(self.loss_names))
        self.first_batch()
        self.loss_weights.start_step()
        for micro_step in range(1, self.plan.accumulation_steps + 1):
            last = micro_step == self.plan.accumulation_steps
            if last:  # late, to include signals of a long step, but early enough to overlap with the device's work
                self.stop_vote.start(stop=self.signals.received)
            self.device.start_micro_step(micro_step - 1)
            batch, source, counted = self.batches.popleft()
            self.throughput.add_micro_batch(*counted)
            with self.reduction.micro_step(last):
                with self.precision.autocast():
                    outputs = self.reduction.model(batch)
                with self.precision.casts_off():
                    weighted = self.loss_weights.weighted(outputs)
                self.precision.backward(nan_grads_if_loss_not_finite(weighted["loss"]) / self.plan.accumulation_steps)
            losses += torch.stack([weighted[name].detach() for name in self.loss_names])
            if self.source_losses:
                self.source_losses.add(source, outputs["mlm_loss"].detach())
            self.device.mark_step()
            self.fetch()  # while the device works
        losses /= self.plan.accumulation_steps
        self.loss_sums += with_count(losses)
        self.reduction.finish()
        self.precision.step(self.optimizer)
        self.model.zero_grad(set_to_none=not self.args.cuda_graphs)  # as compilation.prepare_replay wants it
        losses = torch.cat([losses, outputs["loss"].detach().reshape(1)])
        self.device.mark_step()
        self.throughput.add_step()
        return losses

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count).to(self.device.torch_device, non_blocking=True)

    def first_batch(self) -> dict[str, torch.Tensor]:
        """The first micro-batch of the next step."""
        while len(self.batches) < self.loss_weights.batches_ahead:
            self.fetch()
        return self.batches[0][0]

    def fetch(self) -> None:
        """Take a micro-batch from the stream, and send it on its way to the device."""
        began = time.perf_counter()
        source, batch = self.stream.next_source, next(self.stream)
        waiting = time.perf_counter() - began
        counted = (sequences_in(batch), waiting, batch_flops(self.model.config, batch))
        self.loss_weights.count(batch)
        self.batches.append((self.device.put(batch), source, counted))

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps (0 = only at the end) is due after this one."""
        return step == self.last_step or (every > 0 and step % every == 0)

    @property
    def epoch(self) -> int:
        """In a mixture, that of the source that is least far."""
        return min(self.epochs.values())

    @property
    def epochs(self) -> dict[str, int]:
        """The epoch of each source."""
        return self.stream.epochs(self.stream.rows_used(len(self.batches)))

    def log_step(self, step: int, losses: torch.Tensor) -> None:
        """Log the steps since the last log line: the only place in the loop where values reach the host.

        The averages are over the steps whose loss is finite, and over all ranks.
        """
        metrics = optimizer_metrics(self.optimizer)
        values = torch.cat([self.loss_sums, losses, *(value.reshape(1) for value in metrics.values())]).cpu()
        averages, step_losses = ([names[name] for name in self.loss_names] for names in (AVERAGES, STEP_LOSSES))
        figures = dict(zip([*averages, "finite_steps", *step_losses, LAST_LOSS, *metrics],
                           self.ranks.mean(values).tolist(), strict=True))
        metrics = {name: figures.pop(name) for name in metrics}
        finite_steps = figures.pop("finite_steps")
        for name in averages:
            figures[name] = figures[name] / finite_steps if finite_steps else math.nan
        self.final_loss, self.seconds = figures["average_loss"], time.perf_counter() - self.began
        if step == self.last_step:
            figures["final_loss"] = self.final_loss
        self.loss_sums = self.zeros(len(self.loss_names) + 1)
        new_graphs = self.graph_watch.new_graphs(step - self.first_step)
        self.log.step(self.epoch, step, {
            **figures, **self.source_figures(), "learning_rate": self.optimizer.param_groups[0]["lr"], **metrics,
            "skipped_shards": len(self.stream.skipped_shards),
            **self.throughput.read(), **self.device.memory(), **self.device.graphs()})
        self.check_skipped(step, metrics)
        if new_graphs:
            self.log.print(f"warning: {new_graphs} graphs compiled since the last line, though the warm-up is over: "
                           f"a shape or value changes from step to step (docs/graphs.md)")

    def source_figures(self) -> dict[str, dict]:
        """The figures of each source of a mixture."""
        if self.source_losses is None:
            return {}
        losses = self.source_losses.read()
        return {"sources": {name: {"epoch": epoch, **({"mlm_loss": losses[name]} if name in losses else {})}
                            for name, epoch in self.epochs.items()}}

    @contextmanager
    def paused(self):
        """A block that is not training: its time and its graphs do not count."""
        with self.throughput.paused(), self.graph_watch.paused():
            yield

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, on rank 0; every rank first writes its share of sharded optimizer state."""
        with self.paused():
            self.check_skipped(step, skip_counts(self.optimizer))
            norm = lamb.global_norm(list(self.model.parameters()), self.device.has_foreach_kernels)
            if not torch.isfinite(norm).item():
                raise self.failure(step, "there are weights that are not finite")
            number = self.phase.first + step
            path = checkpoint_path(self.folder, number)
            try:
                self.withdraw(number)
                contents = self.state.state_dict(path, self.ranks, len(self.batches))
            except OSError as error:  # on all ranks alike
                if step == self.last_step:
                    raise UserError(f"{path.name}, the last of this run, could not be written: {error}") from None
                self.log.warn(f"{path.name} could not be written ({error}), and the training continues")
                return
            if self.ranks.first:
                contents |= {"step": step, "phase": self.phase.number, PHASE_STEPS: self.args.max_steps,
                             STEP_ROWS: self.plan.step_rows}
                self.checkpoints.save(number, self.protected_checkpoints, contents)
            elif isinstance(self.folder, RemoteFolder):
                self.folder.publish_share(number, self.ranks.rank)
            self.log.write("PARAMETER", {"checkpoint_step": step})

    def withdraw(self, number: int) -> None:
        """Make a remote checkpoint of this number incomplete, before its sharded optimizer state is replaced.

        OSError on all ranks where that cannot be.
        """
        if isinstance(self.folder, RemoteFolder) and self.args.use_zero_optimizer:
            on_all_ranks(self.ranks, partial(self.folder.withdraw, number) if self.ranks.first else lambda: None)

    @property
    def protected_checkpoints(self) -> set[int]:
        """Those that are kept however old they are: phase 1's last one, and the best one of --early_stopping."""
        best = {self.state.early_stopping.best_checkpoint} if self.state.early_stopping else set()
        return {self.phase.first, *best}

    def check_skipped(self, step: int, metrics: dict[str, float]) -> None:
        """UserError where more steps in a row were skipped than --max_skipped_steps allows."""
        skipped = int(metrics.get("most_skipped_in_a_row", 0))
        if skipped >= self.args.max_skipped_steps:
            raise self.failure(step, f"{skipped} steps in a row were skipped, since the loss or the gradient norm was "
                                     f"not finite (--max_skipped_steps {self.args.max_skipped_steps})")

    def failure(self, step: int, reason: str) -> UserError:
        return UserError(f"step {step}: {reason}; the last good checkpoint is {newest_name(self.folder)}: "
                         f"check the data, or continue from there with a lower --learning_rate")

    def evaluate(self, step: int, losses: torch.Tensor) -> bool:
        """Evaluate after a step; whether --early_stopping is to keep its checkpoint as the best one."""
        with self.paused():
            figures = self.evaluator.evaluate(self.model)
        self.log.write([self.epoch, step], {f"eval_{name}": value for name, value in figures.items()})
        self.log.print(f"held out after step {step}: {describe_figures(figures)}")
        early_stopping = self.state.early_stopping
        if early_stopping is None or step % self.args.eval_freq:  # as the end of a part of the phase may be
            return False
        is_best = early_stopping.record(figures["mlm_loss"], self.phase.first + step)
        if early_stopping.is_over and step < self.last_step:
            self.log.print(f"stopping after step {step}: {early_stopping.evaluations_since} evaluations without a new "
                           f"lowest loss (--early_stopping)")
            self.last_step = step
            if step % self.args.log_freq:
                self.log_step(step, losses)
        return is_best

    def summary(self) -> dict:
        """The figures of the whole run, logged with an empty step."""
        rate = self.throughput.all_sequences / self.seconds if self.seconds else None
        data = {"e2e_train_time": time.time() - self.log.started, "training_sequences_per_second": rate,
                "final_loss": self.final_loss, "raw_train_time": self.seconds,
                "steady_sequences_per_second": self.throughput.average}
        self.log.write([], data)
        if self.state.early_stopping and self.state.early_stopping.best_checkpoint >= 0:
            self.log.print(self.state.early_stopping.describe())
        return data


def step_seed(seed: int, phase: Phase, step: int, rank: int) -> int:
    """The dropout seed of one step on one rank.  It depends on nothing else, so that resuming needs no state."""
    sequence = np.random.SeedSequence([seed, phase.number - 1, step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def nan_grads_if_loss_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; if it is not finite, neither are its gradients.

    The test of the gradient norm then finds every such loss, and the reduction carries it to all ranks.
    """
    return loss / torch.isfinite(loss.detach()).float()  # by 1, or by 0


def with_count(losses: torch.Tensor) -> torch.Tensor:
    """The losses and a 1, or zeros where one of them is not finite.  (n,) → (n + 1,)"""
    finite = torch.isfinite(losses.sum()).float()
    return torch.cat([losses.masked_fill(finite == 0.0, 0.0), finite.reshape(1)])
