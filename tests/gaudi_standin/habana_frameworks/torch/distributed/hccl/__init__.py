"""HCCL: collectives over copies on the host.  gloo given lazy tensors would reduce nothing, and say nothing."""

import os

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, _create_work_from_future

from habana_frameworks import standin

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8,
          torch.bool)


def initialize_distributed_hpu() -> tuple[int, int, int]:
    """(world_size, rank, local_rank), or (1, -1, -1) alone; what Open MPI says is copied to the usual variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in os.environ and f"OMPI_COMM_WORLD_{name}" in os.environ:
            os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{name}"]
    if "RANK" not in os.environ:
        return 1, -1, -1
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "12345")
    world_size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    modules = os.environ.get("HABANA_VISIBLE_MODULES", ",".join(map(str, range(max(8, standin.cards()))))).split(",")
    assert local_rank < len(modules), f"local rank {local_rank} is out of the range of visible modules {modules}"
    os.environ.setdefault("HLS_MODULE_ID", modules[local_rank])
    return world_size, rank, local_rank


class HcclGroup(dist.ProcessGroup):
    """gloo, with every tensor copied to the host and back."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    def _set_group_name(self, name: str) -> None:
        self.name = name

    @property
    def group_name(self) -> str:  # functional collectives ask for it
        return self.name

    def over_host(self, name: str, written, read, options):
        """Run gloo's collective `name` on copies; `written` and `read` are nested lists of tensors, or None."""
        check(name, options, flat(read or written))
        copies = [on_host(group) for group in (written, read) if group is not None]
        getattr(self.gloo, name)(*copies, options).wait()
        for tensor, copy in zip(flat(written), flat(copies[0]), strict=True):
            tensor.copy_(copy)
        return finished(written)

    def allreduce(self, tensors, options):
        return self.over_host("allreduce", tensors, None, options)

    def broadcast(self, tensors, options):
        return self.over_host("broadcast", tensors, None, options)

    def reduce(self, tensors, options):
        return self.over_host("reduce", tensors, None, options)

    def allgather(self, outputs, inputs, options):
        return self.over_host("allgather", outputs, inputs, options)

    def _allgather_base(self, output, given, options):
        check("all_gather_single", options, [given])
        parts = [torch.empty(given.shape, dtype=given.dtype) for _ in range(self.size())]
        self.gloo.allgather([parts], [on_host(given)], AllgatherOptions()).wait()
        output.copy_(torch.cat(parts).view(output.shape))
        return finished([output])

    def reduce_scatter(self, outputs, inputs, options):
        return self.over_host("reduce_scatter", outputs, inputs, options)

    def _reduce_scatter_base(self, output, given, options):
        check("reduce_scatter_single", options, [given])
        narrow = dist.ReduceScatterOptions()
        narrow.reduceOp = options.reduceOp
        part = torch.empty(output.numel(), dtype=output.dtype)
        self.gloo.reduce_scatter([part], [list(on_host(given).flatten().chunk(self.size()))], narrow).wait()
        output.copy_(part.view(output.shape))
        return finished([output])

    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base  # their names from 2.13 on

    def gather(self, outputs, inputs, options):
        return self.over_host("gather", outputs, inputs, options)

    def scatter(self, outputs, inputs, options):
        return self.over_host("scatter", outputs, inputs, options)

    def barrier(self, options):
        self.gloo.barrier(options).wait()
        return finished([])


def check(collective: str, options, tensors: list) -> None:
    """Every collective runs the graph recorded so far."""
    if standin.lazy():
        torch._lazy.mark_step()
    standin.record("hccl", collective=collective, elements=sum(tensor.numel() for tensor in tensors),
                   dtype=str(tensors[0].dtype))
    if getattr(options, "reduceOp", None) == dist.ReduceOp.AVG:
        raise RuntimeError("HCCL has no ReduceOp.AVG")


def flat(value) -> list:
    return [value] if isinstance(value, torch.Tensor) else [tensor for item in value or [] for tensor in flat(item)]


def on_host(value):
    if not isinstance(value, torch.Tensor):
        return [on_host(item) for item in value]
    if value.device.type != standin.device_type() or value.dtype not in DTYPES:
        raise RuntimeError(f"HCCL does not take {value.dtype} tensors on {value.device}")
    return value.detach().cpu().clone()


def finished(tensors):
    future = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future)


standin.record("import habana_frameworks.torch.distributed.hccl", initialized=initialize_distributed_hpu(),
               card=os.environ.get("HLS_MODULE_ID"))
dist.Backend.register_backend("hccl", HcclGroup, devices=[standin.device_type(), "hpu"])
