"""Gaudi cards (HPU).  This file and gaudi_environment.py import their software, habana_frameworks."""

import importlib

import torch
from torch.profiler import ProfilerActivity

from common.errors import UserError
from devices.device import Device
from devices.gaudi_environment import package_release


class HpuDevice(Device):
    """A Gaudi card.  In lazy mode, ops are recorded and run at mark_step; else they run at once, or compiled."""

    is_host = False
    attentions = ("plain",)  # op lists name its elementary operations
    backend = "hccl"
    compiler = "hpu_backend"
    compiles_in_parts = False
    reads_op_lists = True
    runs_cpu_kernels = False
    has_foreach_kernels = False
    matmul_size_for_peak = None

    def __init__(self, lazy: bool):
        self.core = importlib.import_module("habana_frameworks.torch.core")
        if not torch.hpu.is_available():
            raise UserError("--use_habana: Gaudi's software is installed, but it finds no card (does hl-smi?)")
        super().__init__("hpu")
        self.lazy = lazy
        self.hmp = plugin_part("hpex", "hmp")
        self.metric = plugin_part("hpu.metrics", "metric_global")
        self.cached_model = None

    def describe(self) -> str:
        return f"hpu ({'lazy' if self.lazy else 'eager'} mode, Gaudi software {plugin_release()})"

    def software(self) -> dict[str, str]:
        return {**super().software(), "Gaudi's software": plugin_release(),
                "its mode (PT_HPU_LAZY_MODE)": "1, lazy" if self.lazy else "0, eager or compiled"}

    def host_copy(self, tensor: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.detach().cpu()

    def mark_step(self) -> None:
        if self.lazy:
            self.core.mark_step()

    def synchronize(self) -> None:
        torch.hpu.synchronize()

    def memory(self) -> dict[str, int]:
        return {"memory_allocated": torch.hpu.memory_allocated(),
                "max_memory_allocated": torch.hpu.max_memory_allocated()}

    def held_memory(self) -> None:
        """Unknown: in lazy mode memory is allocated later than tensors are created."""

    def peak_memory(self) -> int:
        return torch.hpu.max_memory_allocated()

    def graphs(self) -> dict:
        compilation, fallback = self.metric_values("graph_compilation"), self.metric_values("cpu_fallback")
        return {"graph_compilation": compilation.get("TotalNumber", 0), "cpu_fallback": fallback.get("TotalNumber", 0),
                "cpu_fallback_ops": str(fallback.get("FallbackOps") or "")}

    def metric_values(self, name: str) -> dict:
        metric = self.metric and self.metric(name)  # None where the release does not know the name
        return dict(metric.stats()) if metric else {}

    def fused_lamb(self) -> type | None:
        return plugin_part("hpex.optimizers", "FusedLamb")

    def compile_backward(self) -> str:
        enable = plugin_part("dynamo.compile_backend.experimental", "enable_compiled_autograd")
        if enable is None:
            return "its backward pass too, without compiled autograd, which this release does not have"
        enable()  # also makes DDP reduce gradients in Python, where the compiler sees it
        return "its backward pass by compiled autograd"

    def cache_graphs(self, model: torch.nn.Module) -> None:
        cacher = plugin_part("hpu.graphs", "ModuleCacher")
        if not self.lazy or cacher is None:
            reason = "this release of Gaudi's software has none" if self.lazy else "they need lazy mode"
            raise UserError(f"--use_hpu_graphs: no HPU graphs: {reason}")
        self.cached_model = cacher()(model, have_grad_accumulation=True)

    def start_micro_step(self, number: int) -> None:
        if self.cached_model is not None:
            self.cached_model.set_iteration_count(number)

    def cards(self) -> int:
        """The number of cards in this server."""
        return torch.hpu.device_count()

    def register_backend(self) -> None:
        importlib.import_module("habana_frameworks.torch.distributed.hccl")

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.HPU]


def plugin_part(module: str, name: str):
    """An optional part of Gaudi's software; None in releases without it."""
    try:
        return getattr(importlib.import_module(f"habana_frameworks.torch.{module}"), name)
    except (ImportError, AttributeError):
        return None


def plugin_release() -> str:
    return package_release("habana-torch-plugin") or "of unknown release"
