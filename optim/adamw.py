"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with the clipping, the skipped steps and the state of lamb.py.

With m, v and the other names as there:

    w = w − lr·((m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + eps) + weight_decay·w)
"""

import torch

from lamb import NVLAMB
from optim.fused_lamb import CompiledNVLAMB


class FusedAdamW(NVLAMB):
    """PyTorch's fused kernel, for CPUs and CUDA.  The clipped gradients stay in .grad."""

    name = "adamw"

    def update(self, group, params, divisor, finite) -> None:
        if not params:
            return
        beta1, beta2 = group["betas"]
        exp_avgs, exp_avg_sqs = ([self.state[param][key] for param in params] for key in ("exp_avg", "exp_avg_sq"))
        step = torch.full((), float(group["step"]), device=divisor.device)
        torch._fused_adamw_([param.detach() for param in params], [param.grad for param in params], exp_avgs,
                            exp_avg_sqs, [], [step] * len(params), lr=float(group["lr"]), beta1=beta1, beta2=beta2,
                            eps=group["eps"], weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                            grad_scale=divisor, found_inf=1.0 - finite)


class DecoupledDecay:
    """Goes before a variant of NVLAMB: the weights decay first; what does not decay has no trust ratio."""

    name = "adamw"

    def update(self, group, params, divisor, finite) -> None:
        rate = torch.tensor(float(group["lr"])).to(divisor.device, non_blocking=True)
        for param in params:
            param.mul_(1.0 - rate * finite * group["weight_decay"])
        super().update({**group, "weight_decay": 0.0}, params, divisor, finite)


class AdamW(DecoupledDecay, NVLAMB):
    """In operations that every device has."""


class CompiledAdamW(DecoupledDecay, CompiledNVLAMB):
    """Compiled by a backend of torch.compile."""
