"""ZeRO: the optimizer's state sharded over the ranks (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1).

Each rank keeps the moments of its share of the weights only, updates those weights, and sends them to the others.
Weights are not split, so that each has its own trust ratio, also in a device's fused optimizer; docs/scaling.md
compares this with FSDP2, which splits them.
"""

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

import lamb


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """`optimizer_class` over this rank's share of the parameters; `optim` is that local optimizer.

    The local optimizer clips by the norm of its share, which differs from rank to rank.  So the share is clipped here
    first, by the norm of all the model's gradients, which every rank has: then no share's norm is above max_grad_norm,
    and the local clipping does nothing.  `gradient_norm` is the model's; the local optimizer counts skipped steps, the
    same on all ranks.  A GradScaler's scale is divided out here, as in NVLAMB; `foreach` as in NVLAMB.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict], optimizer_class, max_grad_norm: float = 1.0, foreach: bool = True,
                 **options):
        super().__init__(groups, optimizer_class, max_grad_norm=max_grad_norm, **options)
        self.max_grad_norm = max_grad_norm
        self.foreach = foreach
        self.gradient_norm = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None, **options):
        scale = getattr(self, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        self.gradient_norm = lamb.global_norm([parameter.grad for parameter in parameters(self)], self.foreach) / scale
        divisor = (self.gradient_norm / self.max_grad_norm).clamp(min=1.0) * scale
        divisor = divisor + (self.gradient_norm - self.gradient_norm)  # NaN where not finite: then every rank skips
        for parameter in parameters(self.optim):
            parameter.grad.div_(divisor)
        return super().step(closure, **options)


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
