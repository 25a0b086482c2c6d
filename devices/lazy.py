"""PyTorch's own lazy device: real lazy graphs where there is no Gaudi card, for tests and checks."""

import functools
import importlib

import torch

from devices.device import Device


class LazyDevice(Device):
    """PyTorch's lazy tensors, whose graphs TorchScript runs on the CPU."""

    compiler = None
    has_autocast = False
    runs_cpu_kernels = False
    has_foreach_kernels = False
    matmul_size_for_peak = None

    def __init__(self):
        start_lazy_backend()
        super().__init__("lazy")

    def describe(self) -> str:
        return "lazy (TorchScript backend)"

    def host_copy(self, tensor: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.detach().cpu()

    def held_memory(self) -> None:
        """Unknown: a lazy tensor has no storage."""

    def mark_step(self) -> None:
        torch._lazy.mark_step()

    def synchronize(self) -> None:
        torch._lazy.mark_step(wait=True)

    def graphs(self) -> dict:
        """The counts of a Gaudi card; ops without a lowering have counters named aten::…"""
        counts = {name: torch._lazy.metrics.counter_value(name) for name in torch._lazy.metrics.counter_names()}
        counts.pop("aten::_local_scalar_dense", None)  # .item(), not a missing kernel
        fallbacks = sorted(name for name in counts if name.startswith("aten::"))
        return {"graph_compilation": counts.get("UncachedCompile", 0),
                "cpu_fallback": sum(counts[name] for name in fallbacks), "cpu_fallback_ops": " ".join(fallbacks)}


@functools.cache
def start_lazy_backend() -> None:
    """Register the backend of lazy tensors; PyTorch allows it once in a process."""
    for part in ("torch._lazy.metrics", "torch._lazy.ts_backend"):
        importlib.import_module(part)
    torch._lazy.ts_backend.init()
