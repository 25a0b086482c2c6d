"""How much of a machine a run uses: the FLOPs that BERT's training needs, over the most that the device can do.

Counted is what the task needs, forward and backward, not what is done: real tokens, attention inside a sequence, the
MLM head on masked tokens.  Padding, recomputed activations and elementwise work count nothing, so a run that avoids
them shows a higher share.
"""

import time

import torch

from ops import cpu_kernels, cpu_layers

REPEATS = 5


class NeededFlops:
    """FLOPs of training on a batch: 6 for each weight that a token meets, and 12·layers·D·length for its attention."""

    def __init__(self, config):
        width = config.hidden_size
        self.per_token = 6 * config.num_hidden_layers * (4 * width**2 + 2 * width * config.intermediate_size)
        self.per_pair = 12 * config.num_hidden_layers * width  # of a token and one that it may look at
        self.per_masked_token = 6 * (width**2 + width * config.padded_vocab_size)

    def of_batch(self, batch: dict[str, torch.Tensor]) -> float:
        """For a batch on the host (see data/dataloader.py)."""
        numbers = batch["input_mask"]
        lengths = torch.stack([(numbers == sequence).sum(1) for sequence in range(1, int(numbers.max()) + 1)] or
                              [torch.zeros(1, dtype=torch.long)]).double()
        masked = int(torch.count_nonzero(batch["masked_lm_positions"]))
        return (self.per_token * lengths.sum() + self.per_pair * lengths.square().sum()).item() + (
            self.per_masked_token * masked)


def measured_peak(device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s that the device reaches in matrix products of a dtype; None where that cannot be measured."""
    size = device.matmul_size_for_peak
    if size is None:
        return None
    if device.runs_cpu_kernels and dtype == torch.float32:
        return cpu_peak(size, REPEATS)
    return matrix_peak(device.torch_device, dtype, size, REPEATS, device.synchronize)


def cpu_peak(size: int, repeats: int) -> float:
    """The most FLOP/s of PyTorch's products and of our kernel's, in fp32."""
    products = [torch.mm] if cpu_kernels.problem() else [torch.mm, cpu_layers.product]
    return max(matrix_peak("cpu", torch.float32, size, repeats, multiply=product) for product in products)


def matrix_peak(torch_device, dtype, size: int, repeats: int, synchronize=lambda: None, multiply=torch.mm) -> float:
    """The most FLOP/s seen in products of two square matrices."""
    one, other = torch.randn(2, size, size, device=torch_device, dtype=dtype)
    shortest = float("inf")
    for _ in range(repeats + 1):  # the first may set up the library; it is never the shortest
        synchronize()
        began = time.perf_counter()
        multiply(one, other)
        synchronize()
        shortest = min(shortest, time.perf_counter() - began)
    return 2 * size**3 / shortest
