"""NVLAMB's step near the speed of the memory: on a CPU and, in kernels that take many weights at once, on CUDA.

On a CPU it is one kernel of ops/csrc/lamb.cpp, which moves 44 bytes a parameter: 4 for the gradient's norm, 24 for the
moments, 16 for the update.  In PyTorch's kernels it is 64: the update is written and read again.
"""

import torch

from lamb import NVLAMB, trust_ratio
from ops import cpu_kernels


class CpuFusedNVLAMB(NVLAMB):
    """The same optimizer with the same state; gradients are left as they are."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.norm = square_root_of_squares
        self.update = self.update_by_kernel

    def compile(self, backend: str, in_parts: bool) -> str:
        return "LAMB is one kernel already"

    def update_by_kernel(self, group, params, divisor, finite) -> None:
        if not finite or not params:
            return
        beta1, beta2 = group["betas"]
        arrays = [[tensor.detach() for tensor in params], [param.grad for param in params],
                  *([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))]
        cpu_kernels.load().lamb_step(
            *map(addresses, arrays), sizes(params), len(params), 1.0 / float(divisor), float(group["lr"]), beta1, beta2,
            1.0 - beta1 ** group["step"], 1.0 - beta2 ** group["step"], group["eps"], group["weight_decay"])


class MultiTensorNVLAMB(NVLAMB):
    """The same optimizer in PyTorch's kernels for lists of tensors.  Clipped gradients stay in .grad.

    It needs memory for one more copy of a group's weights during the step.
    """

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.update = self.update_by_many

    def compile(self, backend: str, in_parts: bool) -> str:
        return "LAMB is a few kernels already"

    def update_by_many(self, group, params, divisor, finite) -> None:
        """PyTorch's fused Adam, run with rate 1 on −decay·w, updates the moments and leaves −u there.

        It divides the gradient by grad_scale, and does nothing where found_inf is 1.
        """
        if not params:
            return
        beta1, beta2 = group["betas"]
        weights = [param.detach() for param in params]
        exp_avgs, exp_avg_sqs = ([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))
        updates = torch._foreach_mul(weights, -group["weight_decay"])
        step = torch.full((), float(group["step"]), device=divisor.device)
        torch._fused_adamw_(updates, [param.grad for param in params], exp_avgs, exp_avg_sqs, [], [step] * len(params),
                            lr=1.0, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=0.0, amsgrad=False,
                            maximize=False, grad_scale=divisor, found_inf=1.0 - finite)
        rate = finite * float(group["lr"])
        if group["weight_decay"] == 0.0:
            torch._foreach_mul_(updates, rate)
            torch._foreach_add_(weights, updates)
            return
        squares = (torch.stack(torch._foreach_norm(tensors)).square() for tensors in (weights, updates))
        rates = rate * trust_ratio(*squares, group["weight_decay"])
        for weight, update, own_rate in zip(weights, updates, rates.unbind(), strict=True):
            weight.addcmul_(update, own_rate)


def square_root_of_squares(tensors) -> torch.Tensor:
    """‖all tensors together‖₂ as a scalar tensor."""
    out = torch.empty((), dtype=torch.float64)
    cpu_kernels.load().square_sum(addresses(tensors), sizes(tensors), len(tensors), out)
    return out.sqrt().float()


def addresses(tensors) -> torch.Tensor:
    """Where dense fp32 tensors lie, as an array that a kernel can read."""
    for tensor in tensors:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), f"{tensor.dtype} of strides {tensor.stride()}"
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def sizes(tensors) -> torch.Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
