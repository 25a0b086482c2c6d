"""Throughput, and model FLOPs utilization (MFU): the FLOP/s that the task needs, over the device's peak.

Counted are the matmuls of forward and backward on real tokens, attention within a sequence, and the MLM head on masked
tokens.  Padding, recomputed activations and elementwise work do not count, so a run that avoids them has a higher MFU.
"""

import time
from contextlib import contextmanager

import torch

from ops import cpu_kernels, cpu_layers

WARM_UP_STEPS = 2  # not in the average throughput: compilation, caches, the first reading of data
REPEATS = 5  # of the matmul that measures the peak


class Throughput:
    """Sequences and seconds of training since the last log line, and since the warm-up.

    With `peak_flops` (FLOP/s of this card) also the utilization.  `cards` take as many sequences each as this one.
    """

    def __init__(self, peak_flops: float | None = None, cards: int = 1):
        self.peak_flops = peak_flops
        self.cards = cards
        self.mark, self.host_mark = time.perf_counter(), time.thread_time()
        self.steps = self.micro_batches = self.sequences = 0
        self.waiting = self.flops = 0.0
        self.total_steps = self.all_sequences = self.measured_sequences = 0  # the last two on all cards
        self.measured_seconds = 0.0

    def add_micro_batch(self, sequences: int, waiting: float, flops: float) -> None:
        """Count a trained micro-batch: its sequences and FLOPs on this card, and the seconds waited for it."""
        self.micro_batches += 1
        self.sequences += sequences
        self.waiting += waiting
        self.flops += flops

    def add_step(self) -> None:
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last call.  The device must have finished its work."""
        now, host_now = time.perf_counter(), time.thread_time()
        seconds = now - self.mark
        on_all_cards = self.sequences * self.cards
        figures = {"average_training_time_step": seconds / self.micro_batches,
                   "average_perf_per_step": self.sequences / seconds,
                   "step_time": seconds / self.steps,
                   "sequences_per_second": on_all_cards / seconds,
                   "data_waiting_share": self.waiting / seconds,
                   "host_time_share": (host_now - self.host_mark) / seconds}
        if self.peak_flops:
            figures["model_flops_utilization"] = self.flops / seconds / self.peak_flops
        if self.total_steps >= WARM_UP_STEPS:
            self.measured_sequences += on_all_cards
            self.measured_seconds += seconds
        self.all_sequences += on_all_cards
        self.total_steps += self.steps
        self.mark, self.host_mark = now, host_now
        self.steps = self.micro_batches = self.sequences = 0
        self.waiting = self.flops = 0.0
        return figures

    @contextmanager
    def paused(self):
        """A block whose time does not count as training."""
        entered, host_entered = time.perf_counter(), time.thread_time()
        yield
        self.mark += time.perf_counter() - entered
        self.host_mark += time.thread_time() - host_entered

    @property
    def average(self) -> float | None:
        """Sequences per second after the warm-up; None where the run was too short."""
        return self.measured_sequences / self.measured_seconds if self.measured_seconds else None


def batch_flops(config, batch: dict[str, torch.Tensor]) -> float:
    """FLOPs of training on a batch on the host."""
    numbers = batch["input_mask"]
    lengths = torch.stack([(numbers == sequence).sum(1) for sequence in range(1, int(numbers.max()) + 1)] or
                          [torch.zeros(1, dtype=torch.long)]).double()
    return config.training_flops(lengths.sum().item(), lengths.square().sum().item(),
                                 int(torch.count_nonzero(batch["masked_lm_positions"])))


def measured_peak(device, dtype: torch.dtype) -> float | None:
    """The device's peak FLOP/s in matmuls of a dtype; None where that cannot be measured."""
    size = device.matmul_size_for_peak
    if size is None:
        return None
    if device.runs_cpu_kernels and dtype == torch.float32:
        return cpu_peak(size, REPEATS)
    return matmul_peak(device.torch_device, dtype, size, REPEATS, device.synchronize)


def cpu_peak(size: int, repeats: int) -> float:
    """The higher of the peaks of PyTorch's matmul and the CPU kernels', in fp32."""
    matmuls = [torch.mm] if cpu_kernels.unavailable_reason() else [torch.mm, cpu_layers.matmul]
    return max(matmul_peak("cpu", torch.float32, size, repeats, matmul=matmul) for matmul in matmuls)


def matmul_peak(torch_device, dtype, size: int, repeats: int, synchronize=lambda: None, matmul=torch.mm) -> float:
    """The peak FLOP/s of the matmul of two square matrices."""
    one, other = torch.randn(2, size, size, device=torch_device, dtype=dtype)
    shortest = float("inf")
    for _ in range(repeats + 1):  # one more, because the first may initialise the library
        synchronize()
        began = time.perf_counter()
        matmul(one, other)
        synchronize()
        shortest = min(shortest, time.perf_counter() - began)
    return 2 * size**3 / shortest
