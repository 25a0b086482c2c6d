"""The training loop: one iteration is one optimizer step."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import optimizers
from compilation import GraphWatch
from dataset import sequences_in
from evaluation import describe, evaluate
from profiling import StepProfiler
from schedulers import learning_rate
from training_log import Throughput
from utilization import NeededFlops, peak_flops

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

    def __init__(self, args, process, device, precision, model, optimizer, stream, plan, start, held_out, log):
        self.args = args
        self.process = process
        self.device = device
        self.precision = precision
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.plan = plan
        self.start = start
        self.held_out = held_out
        self.log = log
        self.last_step = args.max_steps if args.steps_this_run == -1 else args.steps_this_run
        self.log_every = max(1, round(args.log_freq))
        self.needed_flops = NeededFlops(model.config)
        self.throughput = Throughput(peak_flops(args, device))
        self.graph_watch = GraphWatch(device)
        self.profiler = StepProfiler(args, device, process.rank, log.say)
        self.batch = None
        self.final_loss = None
        self.loss_sums = self.zero_losses()  # over the steps since the last log line

    def train(self) -> dict:
        """Run from the start to the last step of this run; the figures of its summary."""
        began = time.perf_counter()
        self.log.start_bar(self.start.step, self.last_step, self.args.disable_progress_bar)
        for step in range(self.start.step + 1, self.last_step + 1):
            with self.profiler.around(step):
                losses = self.train_step(step)
            if self.is_due(step, self.log_every):
                self.log_step(step, losses)
            if self.is_due(step, self.args.num_steps_per_checkpoint) and not self.args.skip_checkpoint:
                self.save(step)
            if self.held_out and self.is_due(step, self.args.eval_freq):
                self.evaluate(step)
            self.log.advance()
        return self.summary(time.perf_counter() - began)

    def train_step(self, step: int) -> torch.Tensor:
        """One optimizer step; the mean LOSSES of its micro-batches, on the device.  (3,)

        Losses are added in place and before the graph ends.  In place, since hmp's casts reach the whole process but
        leave such an op in fp32; before it ends, since what is pending would make the next graph another one.
        """
        self.device.seed(step_seed(self.args, step, self.process.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args.learning_rate, self.args.warmup_proportion, self.args.max_steps)
        losses = self.zero_losses()
        batch = self.batch or self.next_batch()
        for _ in range(self.plan.accumulation_steps):
            with self.precision.autocast():
                outputs = self.model(batch)
            self.precision.backward(outputs["loss"] / self.plan.accumulation_steps)
            losses += torch.stack([outputs[name].detach() for name in LOSSES])
            self.device.mark_step()
            batch = self.next_batch()  # while the device works
        self.batch = batch
        losses /= self.plan.accumulation_steps
        self.loss_sums += losses
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()
        self.device.mark_step()
        self.throughput.add_step()
        return losses

    def zero_losses(self) -> torch.Tensor:
        return torch.zeros(len(LOSSES)).to(self.device.torch_device)

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next micro-batch, on its way to the device."""
        began = time.perf_counter()
        batch = next(self.stream)
        waiting = time.perf_counter() - began
        self.throughput.add_micro_batch(sequences_in(batch) * self.process.world_size, waiting,
                                        self.needed_flops.of_batch(batch))
        return self.device.put(batch)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps (0 = only at the end) is done after this one."""
        return step == self.last_step or (every > 0 and step % every == 0)

    def rows_used(self, step: int) -> int:
        """Rows of the phase's endless sequence that all ranks have used after a step."""
        return self.start.rows + (step - self.start.step) * self.plan.rows * self.process.world_size

    def epoch(self, step: int) -> int:
        return self.rows_used(step) // sum(self.stream.rows_per_shard)

    def log_step(self, step: int, losses: torch.Tensor) -> None:
        """Log the steps since the last time: the only place in the loop where values reach the host."""
        told = optimizers.figures(self.optimizer)
        values = torch.cat([self.loss_sums, losses, *(value.reshape(1) for value in told.values())]).tolist()
        self.final_loss = values[0] / self.throughput.steps
        self.loss_sums = self.zero_losses()
        new_graphs = self.graph_watch.new_graphs(step - self.start.step)
        self.log.step(self.epoch(step), step, {
            "average_loss": self.final_loss, "step_loss": values[3], "mlm_loss": values[4], "nsp_loss": values[5],
            "learning_rate": self.optimizer.param_groups[0]["lr"], **dict(zip(told, values[6:], strict=True)),
            **self.throughput.read(), **self.device.memory(), **self.device.graphs()})
        if new_graphs:
            self.log.say(f"warning: {new_graphs} graphs compiled since the last line, though the warm-up is over: "
                         f"something changes shape or value from step to step (docs/graphs.md)")

    @contextmanager
    def paused(self):
        """A block that is no training: its time and its graphs do not count."""
        with self.throughput.paused(), self.graph_watch.paused():
            yield

    def save(self, step: int) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        phase1_end = self.args.phase1_end_step if self.args.phase2 else 0
        with self.paused():
            self.device.synchronize()
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step,
                     "phase": 2 if self.args.phase2 else 1, "rows": self.rows_used(step),
                     "config": vars(self.model.config)}
            path = checkpoint.save(self.args.output_dir, phase1_end + step, to_host(state), protected=phase1_end)
        self.log.say(f"saved {path}")

    def evaluate(self, step: int) -> None:
        with self.paused():
            figures = evaluate(self.model, self.held_out, self.device, self.plan.micro_batch_size, self.precision)
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


def to_host(state):
    """Nested dicts and lists with every tensor on the host; a tensor that occurs twice is copied once."""
    copies = {}

    def copied(value):
        if isinstance(value, torch.Tensor):
            return copies.setdefault(id(value), value.detach().cpu())
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return copied(state)
