"""Equal weights on all ranks, and the mean of their gradients.

Gradients are reduced in one of three ways: by DDP, while the last backward pass still runs; by one all-reduce over flat
buckets after it (--allreduce_post_accumulation); by the same with 16-bit elements on the wire, half the bytes
(--allreduce_post_accumulation_fp16).  Gradients are divided by the number of ranks before they are summed, so that a
16-bit sum does not overflow.  Accumulation stays in fp32.
"""

import zlib
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 230 * 2**20  # of fp32 gradients; large enough to use the full bandwidth of a link
MAX_IN_FLIGHT = 2  # flat buckets being reduced at a time: each is a copy of its gradients


class Reduction:
    """For one rank: nothing to reduce.  The forward pass calls `model`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def micro_step(self, last: bool):
        """A context for the forward and backward pass of a micro-batch; `last`: of the optimizer step."""
        return nullcontext()

    def finish(self) -> None:
        """After the last micro-batch: leave the mean over all ranks in .grad."""

    def describe(self) -> str:
        return "none, one rank"


class DdpReduction(Reduction):
    """DistributedDataParallel: a bucket is reduced as soon as the last backward pass has filled it."""

    def __init__(self, model: nn.Module):
        super().__init__(DistributedDataParallel(model, bucket_cap_mb=BUCKET_BYTES // 2**20,
                                                 gradient_as_bucket_view=True))

    def micro_step(self, last: bool):
        return nullcontext() if last else self.model.no_sync()

    def describe(self) -> str:
        return f"DDP, buckets of {BUCKET_BYTES // 2**20} MiB"


class FlatReduction(Reduction):
    """One all-reduce a step, in flat buckets, with elements of `wire_dtype` on the wire."""

    def __init__(self, model: nn.Module, world_size: int, wire_dtype: torch.dtype):
        super().__init__(model)
        self.world_size = world_size
        self.wire_dtype = wire_dtype
        self.buckets = buckets(model.parameters())

    @torch.no_grad()
    def finish(self) -> None:
        in_flight = deque()
        for bucket in self.buckets:
            gradients = [parameter.grad for parameter in bucket]
            flat = flatten(gradients).div_(self.world_size).to(self.wire_dtype)
            in_flight.append((gradients, flat, dist.all_reduce(flat, async_op=True)))
            if len(in_flight) > MAX_IN_FLIGHT:
                wait_and_copy(*in_flight.popleft())
        while in_flight:
            wait_and_copy(*in_flight.popleft())

    def describe(self) -> str:
        return f"one all-reduce after the last micro-batch, {str(self.wire_dtype).removeprefix('torch.')} on the wire"


def build_reduction(ranks, model: nn.Module, *, post_accumulation: bool, in_16_bits: bool, fp16: bool) -> Reduction:
    """The reduction that the flags choose.

    The 16-bit type is bf16, or fp16 in fp16 training: there the loss scale keeps gradients within its range, and an
    overflow skips the step.
    """
    if ranks.world_size == 1:
        return Reduction(model)
    if not post_accumulation:
        return DdpReduction(model)
    wire_dtype = torch.float32 if not in_16_bits else torch.float16 if fp16 else torch.bfloat16
    return FlatReduction(model, ranks.world_size, wire_dtype)


@torch.no_grad()
def broadcast_weights(ranks, model: nn.Module) -> None:
    """Copy rank 0's weights to all ranks, and check by checksums that they have them bit for bit."""
    if ranks.world_size == 1:
        return
    for bucket in buckets(model.parameters()):
        flat = flatten(bucket)
        dist.broadcast(flat, src=0)
        unflatten(flat, bucket)
    ranks.check_same({f"after the broadcast of rank 0's weights, the checksum of {name}":
                      zlib.crc32(parameter.detach().cpu().contiguous().numpy())
                      for name, parameter in model.named_parameters()})


def buckets(parameters: Iterable[torch.Tensor], size: int = BUCKET_BYTES) -> list[list[torch.Tensor]]:
    """Groups of consecutive parameters of at most `size` bytes; a larger parameter is a group of its own."""
    groups, filled = [], 0
    for parameter in parameters:
        if not groups or filled + parameter.nbytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += parameter.nbytes
    return groups


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the parts of a flattened tensor back to the tensors that they came from."""
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view_as(tensor))


def wait_and_copy(gradients: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
    work.wait()
    unflatten(flat, gradients)
