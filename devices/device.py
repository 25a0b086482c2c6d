"""The one place that knows a device: every other module asks the object made here, and none says `if cuda`.

A Device moves batches, opens autocast, marks the end of a graph, waits, seeds, reports memory and graphs, and hands out
what only it has (FusedLamb, hmp, HCCL); what means nothing on a device does nothing there.
"""

import os
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from common.errors import UserError
from devices import gaudi_environment
from devices.options import DeviceOptions


class Device:
    """A CPU, and the defaults of the others."""

    is_host = True  # what is copied to the host takes memory of the device
    attentions: tuple[str, ...] = ("plain",)  # that a run chooses from (attention.py), the preferred one first
    backend = "gloo"
    compiler: str | None = "inductor"  # of torch.compile
    compiles_in_parts = True  # what repeats is compiled once, since the compiler takes long for a large graph
    has_autocast = True  # torch.autocast casts its tensors
    reads_op_lists = False  # and does so by the op lists that the environment names
    mixed_layer_norm = True  # layer_norm takes a bf16 input beside fp32 weights
    supports_fp16 = False  # training in fp16 with loss scaling
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
        return f"{self.torch_device.type} ({torch.get_num_threads()} threads)"

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


def select(options: DeviceOptions, local_rank: int = 0) -> Device:
    """The device that the options ask for.  UserError where there is none: a run never falls back silently."""
    if options.use_habana:
        from devices.hpu import HpuDevice

        return HpuDevice(gaudi_environment.lazy_mode(options, os.environ))
    if options.use_torch_lazy:
        from devices.lazy import LazyDevice

        return LazyDevice()
    if torch.cuda.is_available() and not options.no_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} CUDA devices")
        from devices.cuda import CudaDevice

        return CudaDevice(local_rank)
    return Device()
