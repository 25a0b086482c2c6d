"""CUDA GPUs."""

import os

import torch
from torch.profiler import ProfilerActivity

from common.errors import UserError
from devices.device import Device


class CudaDevice(Device):
    is_host = False
    attentions = ("varlen", "sdpa")
    backend = "nccl"
    mixed_layer_norm = False
    supports_fp16 = True
    runs_cpu_kernels = False
    matmul_size_for_peak = 8192
    pins_memory = True

    def __init__(self, local_rank: int):
        if torch.cuda.device_count() == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
            local_rank = 0  # srun --gpus-per-task=1 shows each task its own card
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank}, but only {torch.cuda.device_count()} CUDA devices")
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

    def profiler_activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
