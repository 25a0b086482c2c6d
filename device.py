"""The one place that knows a device: every other module asks the object made here, and none says `if cuda`.

A Device moves batches, opens autocast, marks the end of a graph, waits, seeds and reports memory; what means nothing
on a device does nothing there.
"""

import torch

from cli import UserError


class Device:
    """A CPU, and the defaults of the others."""

    kind = "cpu"
    attention = "plain"  # on CPUs faster than the fused call, which has no kernel with dropout
    backend = "gloo"

    def __init__(self, name: str = "cpu"):
        self.torch_device = torch.device(name)

    def describe(self) -> str:
        return f"{self.kind} ({torch.get_num_threads()} threads)"

    def put(self, batch: dict) -> dict:
        """A batch of host tensors on this device."""
        return {key: tensor.to(self.torch_device, non_blocking=True) for key, tensor in batch.items()}

    def autocast(self, enabled: bool, dtype=torch.bfloat16):
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


class CudaDevice(Device):
    kind = "cuda"
    attention = "sdpa"
    backend = "nccl"

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


class LazyDevice(Device):
    """PyTorch's own lazy tensors, run by TorchScript on the CPU: real lazy graphs for people without a Gaudi card."""

    kind = "lazy"
    attention = "plain"

    def __init__(self):
        import torch._lazy
        import torch._lazy.ts_backend

        torch._lazy.ts_backend.init()
        super().__init__("lazy")

    def describe(self) -> str:
        return "lazy (TorchScript backend)"

    def autocast(self, enabled: bool, dtype=torch.bfloat16):
        return torch.autocast("cpu", dtype=dtype, enabled=enabled)

    def mark_step(self) -> None:
        torch._lazy.mark_step()

    def synchronize(self) -> None:
        torch._lazy.mark_step(wait=True)


def select(args, local_rank: int = 0) -> Device:
    """The device that the flags ask for.  UserError where it cannot be had: a run never falls back silently."""
    if args.use_habana:
        return hpu_device(args)
    if args.use_torch_lazy:
        return LazyDevice()
    if torch.cuda.is_available() and not args.no_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} CUDA devices")
        return CudaDevice(local_rank)
    return Device()


def hpu_device(args) -> Device:
    try:
        import habana_frameworks.torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"--use_habana: no HPU can be used: {error}") from None
    raise UserError("--use_habana: this version trains on cpu, cuda and lazy only")
