"""The interface to a device, the CPU, and the choice of a run's device.

Only devices/ calls a device's own software; other modules use a Device and never test which kind it is.  To support
another accelerator, add a subclass in a file of its own, and choose it in select_device().
"""

import os
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from common import cpus
from common.errors import UserError
from devices import gaudi_environment
from devices.options import DeviceOptions


class Device:
    """The CPU.  Subclasses are other devices and override what differs."""

    is_host = True  # its memory is the host's
    attentions: tuple[str, ...] = ("plain",)  # names in ops/attention.py, the preferred one first
    backend = "gloo"
    compiler: str | None = "inductor"  # of torch.compile
    compiles_in_parts = True  # layer by layer: one graph for all layers, since a large graph takes long to compile
    has_autocast = True  # torch.autocast supports it
    reads_op_lists = False  # its autocast reads the op lists named in the environment
    mixed_layer_norm = True  # layer_norm accepts a bf16 input with fp32 weights
    supports_fp16 = False  # training in fp16 with loss scaling
    pins_memory = False  # page-locked host memory makes copies faster
    hmp = None  # Gaudi's first mixed-precision package
    runs_cpu_kernels = True  # tensors lie in the CPU's own memory, where code compiled for the CPU works on them
    has_foreach_kernels = True  # PyTorch's kernels for lists of tensors
    # Rows and columns of the matrices that measure the peak FLOP/s: enough to reach it, too few to delay a run.  None
    # on devices that record graphs: the measurement would add graphs to those of the training.
    matmul_size_for_peak: int | None = 768

    def __init__(self, name: str = "cpu"):
        self.torch_device = torch.device(name)
        # Numbers below 1e-38 take a CPU a hundred times as long, and late in a training attention makes many of them.
        # Threads inherit this from the one that starts them, so it comes before the first parallel computation.
        torch.set_flush_denormal(True)
        torch.set_num_threads(min(torch.get_num_threads(), cpus.threads()))  # the kernels of ops/ follow it

    def describe(self) -> str:
        return f"{self.torch_device.type} ({torch.get_num_threads()} threads)"

    def software(self) -> dict[str, str]:
        """What must be the same on all ranks, by name."""
        return {"the device": self.torch_device.type, "PyTorch": torch.__version__}

    def put(self, batch: dict) -> dict:
        """A batch of host tensors on this device."""
        return {key: tensor.to(self.torch_device, non_blocking=True) for key, tensor in batch.items()}

    def host_copy(self, tensor: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A copy in host memory, complete after synchronize(); it overwrites `memory`, an earlier copy, if given."""
        if memory is None:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pins_memory)
        return memory.copy_(tensor.detach(), non_blocking=True)

    def autocast(self, dtype: torch.dtype, enabled: bool = True):
        return torch.autocast(self.torch_device.type, dtype=dtype, enabled=enabled)

    def mark_step(self) -> None:
        """Run the graph recorded so far.  Called after every backward pass and every optimizer step, nowhere else."""

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def memory(self) -> dict[str, int]:
        """Bytes allocated on the device, now and at the peak, by name; empty where they are not known."""
        return {}

    def held_memory(self) -> int | None:
        """Bytes of device memory that this process uses; None where that is not known."""
        return proc_bytes("/proc/self/status", "VmRSS")

    def peak_memory(self) -> int | None:
        """Their largest number so far; None where that is not known."""
        return proc_bytes("/proc/self/status", "VmHWM")

    def free_memory(self) -> int | None:
        """Bytes of device memory that are free."""
        return proc_bytes("/proc/meminfo", "MemAvailable")

    def graphs(self) -> dict:
        """Counts of compiled graphs (graph_compilation) and of ops run on the host for lack of a device kernel
        (cpu_fallback; their names: cpu_fallback_ops).  Empty where nothing is compiled."""
        dynamo = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
        return {"graph_compilation": dynamo.counters["stats"]["unique_graphs"]} if dynamo else {}

    def compile_backward(self) -> str:
        """Prepare for torch.compile to compile backward passes as a whole; how they are compiled, in words."""
        return "its backward pass too"

    def cache_graphs(self, model: torch.nn.Module) -> None:
        """Record the graphs of a model's training passes once, and replay them without the host."""
        raise UserError(f"--use_hpu_graphs: {self.torch_device.type} has no HPU graphs")

    def start_micro_step(self, number: int) -> None:
        """Called before the forward pass of micro-batch 0, 1, … of a step."""

    def fused_lamb(self) -> type | None:
        """The class of the fused LAMB in the device's own software; None where there is none."""
        return None

    def register_backend(self) -> None:
        """Register `backend` with torch.distributed; called before the process group is created."""

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU]


def proc_bytes(path: str, key: str) -> int | None:
    """A value that Linux lists in kilobytes, in bytes; None on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def select_device(options: DeviceOptions, local_rank: int = 0) -> Device:
    """The device that the options ask for.  UserError where there is none: a run never falls back silently."""
    if options.use_habana:
        from devices.hpu import HpuDevice

        return HpuDevice(gaudi_environment.lazy_mode(options, os.environ))
    if options.use_torch_lazy:
        from devices.lazy import LazyDevice

        return LazyDevice()
    if torch.cuda.is_available() and not options.no_cuda:
        from devices.cuda import CudaDevice

        return CudaDevice(local_rank)
    return Device()
