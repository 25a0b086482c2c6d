"""The one place that knows a device: every other module asks the object made here, and none says `if cuda`.

A Device moves batches, opens autocast, marks the end of a graph, waits, seeds, reports memory and graphs, and hands out
what only it has (FusedLamb, hmp, HCCL); what means nothing on a device does nothing there.
"""

import functools
import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from common.errors import UserError
from devices import gaudi_environment


class Device:
    """A CPU, and the defaults of the others."""

    kind = "cpu"
    is_host = True  # what is copied to the host takes memory of the device
    attentions: tuple[str, ...] = ("plain",)  # that a run chooses from (attention.py), the preferred one first
    backend = "gloo"
    compiler: str | None = "inductor"  # of torch.compile
    compiles_in_parts = True  # what repeats is compiled once, since the compiler takes long for a large graph
    has_autocast = True  # torch.autocast casts its tensors
    reads_op_lists = False  # and does so by the op lists that the environment names
    mixed_layer_norm = True  # layer_norm takes a bf16 input beside fp32 weights
    pins_memory = False  # copies between host and device are faster in page-locked memory
    hmp = None  # Gaudi's first mixed-precision package
    runs_cpu_kernels = True  # tensors lie in the CPU's own memory, where code compiled for the CPU works on them
    has_foreach_kernels = True  # PyTorch's kernels for lists of tensors
    # Rows and columns of the matrices that measure the peak: enough to reach it, too few to delay a run.  None where
    # graphs are built: a measurement would be graphs of its own.
    matmul_size_for_peak: int | None = 1024

    def __init__(self, name: str = "cpu"):
        self.torch_device = torch.device(name)

    def describe(self) -> str:
        return f"{self.kind} ({torch.get_num_threads()} threads)"

    def put(self, batch: dict) -> dict:
        """A batch of host tensors on this device."""
        return {key: tensor.to(self.torch_device, non_blocking=True) for key, tensor in batch.items()}

    def host_copy(self, tensor: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A copy in host memory, in that of an earlier copy where one is given; it is there after synchronize()."""
        if memory is None:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pins_memory)
        return memory.copy_(tensor.detach(), non_blocking=True)

    def autocast(self, dtype: torch.dtype, enabled: bool = True):
        return torch.autocast(self.torch_device.type, dtype=dtype, enabled=enabled)

    def mark_step(self) -> None:
        """The graph recorded so far is run: after every backward pass and every optimizer step, nowhere else."""

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def memory(self) -> dict[str, int]:
        """Bytes allocated on the device now and at most, by name; empty where the device does not tell."""
        return {}

    def held_memory(self) -> int | None:
        """Bytes that this process holds on the device; None where that is not known."""
        return proc_bytes("/proc/self/status", "VmRSS")

    def peak_memory(self) -> int | None:
        """The most that it has held."""
        return proc_bytes("/proc/self/status", "VmHWM")

    def free_memory(self) -> int | None:
        """Bytes that it could take beside those."""
        return proc_bytes("/proc/meminfo", "MemAvailable")

    def forget_peak_memory(self) -> None:
        """The most that was allocated counts from now on."""

    def graphs(self) -> dict:
        """How many graphs this process has compiled (graph_compilation) and how many ops ran on the host for want of a
        kernel (cpu_fallback; their names in cpu_fallback_ops); empty where there are no graphs to count."""
        dynamo = sys.modules.get("torch._dynamo.utils")  # there once something was compiled
        return {"graph_compilation": dynamo.counters["stats"]["unique_graphs"]} if dynamo else {}

    def fused_lamb(self) -> type | None:
        """The class of the device's own fused LAMB, if it has one."""
        return None

    def register_backend(self) -> None:
        """Make `backend` known to torch.distributed, before the process group is made."""

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]


def proc_bytes(path: str, key: str) -> int | None:
    """A figure that Linux gives in kilobytes; None on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


class CudaDevice(Device):
    kind = "cuda"
    is_host = False
    attentions = ("varlen", "sdpa")
    backend = "nccl"
    mixed_layer_norm = False
    pins_memory = True
    runs_cpu_kernels = False
    matmul_size_for_peak = 8192

    def __init__(self, local_rank: int):
        super().__init__(f"cuda:{local_rank}")
        torch.cuda.set_device(self.torch_device)
        torch.backends.cuda.matmul.allow_tf32 = True

    def describe(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    def put(self, batch: dict) -> dict:
        return super().put({key: tensor.pin_memory() for key, tensor in batch.items()})

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> dict[str, int]:
        return {"memory_allocated": torch.cuda.memory_allocated(self.torch_device),
                "max_memory_allocated": torch.cuda.max_memory_allocated(self.torch_device)}

    def held_memory(self) -> int:
        return torch.cuda.memory_allocated(self.torch_device)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def forget_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]


class HpuDevice(Device):
    """A Gaudi card.  In lazy mode ops are recorded until mark_step, else each runs at once, or compiled."""

    kind = "hpu"
    is_host = False
    attentions = ("plain",)  # the ops that the op lists were made for
    backend = "hccl"
    compiler = "hpu_backend"
    compiles_in_parts = False
    reads_op_lists = True
    runs_cpu_kernels = False
    has_foreach_kernels = False
    matmul_size_for_peak = None

    def __init__(self, lazy: bool):
        try:
            self.core = importlib.import_module("habana_frameworks.torch.core")
        except (ImportError, OSError, RuntimeError) as error:  # not there, or not made for this torch or driver
            raise UserError(f"--use_habana: no HPU can be used: {error}") from None
        if not torch.hpu.is_available():
            raise UserError("--use_habana: Gaudi's software is installed, but it finds no card (does hl-smi?)")
        super().__init__("hpu")
        self.lazy = lazy
        self.hmp = plugin_part("hpex", "hmp")
        self.metric = plugin_part("hpu.metrics", "metric_global")

    def describe(self) -> str:
        return f"hpu ({'lazy' if self.lazy else 'eager'} mode, Gaudi software {software_release()})"

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
        """Not told: in lazy mode nothing is allocated where it is asked for."""

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

    def cards(self) -> int:
        """How many cards this server has."""
        return torch.hpu.device_count()

    def register_backend(self) -> None:
        importlib.import_module("habana_frameworks.torch.distributed.hccl")

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.HPU]


def plugin_part(module: str, name: str):
    """Something of Gaudi's software that not every release has, or None."""
    try:
        return getattr(importlib.import_module(f"habana_frameworks.torch.{module}"), name)
    except (ImportError, AttributeError):
        return None


def software_release() -> str:
    try:
        return metadata.version("habana-torch-plugin")
    except metadata.PackageNotFoundError:
        return "of unknown release"


class LazyDevice(Device):
    """PyTorch's own lazy tensors, run by TorchScript on the CPU: real lazy graphs for people without a Gaudi card."""

    kind = "lazy"
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
        """Not told: a lazy tensor has no storage."""

    def mark_step(self) -> None:
        torch._lazy.mark_step()

    def synchronize(self) -> None:
        torch._lazy.mark_step(wait=True)

    def graphs(self) -> dict:
        """As a Gaudi card counts; ops that were not lowered show as counters named aten::…"""
        counts = {name: torch._lazy.metrics.counter_value(name) for name in torch._lazy.metrics.counter_names()}
        counts.pop("aten::_local_scalar_dense", None)  # a value that the host asked for
        fallbacks = sorted(name for name in counts if name.startswith("aten::"))
        return {"graph_compilation": counts.get("UncachedCompile", 0),
                "cpu_fallback": sum(counts[name] for name in fallbacks), "cpu_fallback_ops": " ".join(fallbacks)}


@functools.cache
def start_lazy_backend() -> None:
    """Register the backend of lazy tensors; PyTorch allows it once in a process."""
    for part in ("torch._lazy.metrics", "torch._lazy.ts_backend"):
        importlib.import_module(part)
    torch._lazy.ts_backend.init()


def select(args, local_rank: int = 0) -> Device:
    """The device that the flags ask for.  UserError where it cannot be had: a run never falls back silently."""
    if args.use_habana:
        return HpuDevice(gaudi_environment.lazy_mode(args, os.environ))
    if args.use_torch_lazy:
        return LazyDevice()
    if torch.cuda.is_available() and not args.no_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} CUDA devices")
        return CudaDevice(local_rank)
    return Device()
