"""How the ranks come to the same weights, and to the mean of their gradients.

Three ways: DDP, which reduces while the last backward pass still runs; one all-reduce over flat buckets after it
(--allreduce_post_accumulation); the same with 16 bits on the wire, half the bytes (…_fp16).  Gradients are divided by
the number of ranks before they are summed, so that a sum in 16 bits does not overflow.  Accumulation stays in fp32.
"""

import zlib
from collections import deque
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 230 * 2**20  # of fp32 gradients; large enough that a link runs at full speed
IN_FLIGHT = 2  # flat buckets on the way at a time: each is a copy of its gradients


class Reduction:
    """For one rank: nothing to reduce.  `model` is what the forward pass goes through."""

    def __init__(self, model: nn.Module):
        self.model = model

    def micro_step(self, last: bool):
        """A context for the forward and backward pass of a micro-batch, the last one of its step or not."""
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
        self.buckets = buckets(list(model.parameters()))

    @torch.no_grad()
    def finish(self) -> None:
        in_flight = deque()
        for bucket in self.buckets:
            gradients = [parameter.grad for parameter in bucket]
            flat = flattened(gradients).div_(self.world_size).to(self.wire_dtype)
            in_flight.append((gradients, flat, dist.all_reduce(flat, async_op=True)))
            if len(in_flight) > IN_FLIGHT:
                land(*in_flight.popleft())
        while in_flight:
            land(*in_flight.popleft())

    def describe(self) -> str:
        return f"one all-reduce after the last micro-batch, {str(self.wire_dtype).removeprefix('torch.')} on the wire"


def build_reduction(args, process, model: nn.Module) -> Reduction:
    """The way of reducing that the flags ask for."""
    if process.world_size == 1:
        return Reduction(model)
    if not args.allreduce_post_accumulation:
        return DdpReduction(model)
    return FlatReduction(model, process.world_size, wire_dtype(args))


def wire_dtype(args) -> torch.dtype:
    """fp16 only under --fp16: there the loss scale keeps gradients in its range, and an overflow skips the step."""
    if not args.allreduce_post_accumulation_fp16:
        return torch.float32
    return torch.float16 if args.fp16 else torch.bfloat16


@torch.no_grad()
def share_weights(process, model: nn.Module) -> None:
    """Give all ranks the weights of rank 0, and check bit by bit that they have them."""
    if process.world_size == 1:
        return
    for bucket in buckets(list(model.parameters())):
        flat = flattened(bucket)
        dist.broadcast(flat, src=0)
        unflatten(flat, bucket)
    process.check_same({f"after rank 0's weights were sent round, the checksum of {name}": checksum(parameter)
                        for name, parameter in model.named_parameters()})


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy())


def buckets(parameters: list[torch.Tensor], size: int = BUCKET_BYTES) -> list[list[torch.Tensor]]:
    """Parameters in groups of at most `size` bytes (a larger one alone), in the order given; a tied one comes once."""
    groups, filled = [], 0
    for parameter in parameters:
        if not groups or filled + parameter.nbytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += parameter.nbytes
    return groups


def flattened(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy what `flattened` made back to where it came from."""
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view_as(tensor))


def land(gradients: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
    work.wait()
    unflatten(flat, gradients)
