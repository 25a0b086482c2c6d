"""NVLAMB: LAMB (You et al. 2019, arXiv 1904.00962) as BERT is pre-trained with it.

Per step t, with g the gradients divided by max(1, ‖all gradients‖₂ / max_grad_norm):

    m = β₁·m + (1−β₁)·g          v = β₂·v + (1−β₂)·g²
    u = (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + eps) + weight_decay·w
    w = w − lr·trust_ratio·u     trust_ratio = ‖w‖/‖u‖ where the group decays and both norms are > 0, else 1

A step whose gradient norm is not finite changes neither weights nor moments.  No step waits for the device: gradient
norm and counts of skipped steps are tensors there, which the log reads.  This file takes operations that every device
has; optim/fused_lamb.py has faster variants.
"""

import inspect

import torch


class SkipCounts:
    """What an optimizer tells of its steps, in scalar tensors on the device.

    `gradient_norm`, that of the last step before clipping; `skipped_steps`, the number of steps that were skipped
    because their norm was not finite; `skipped_in_a_row`, those since the last step that was taken;
    `most_skipped_in_a_row`.
    """

    def start_counts(self, device: torch.device) -> None:
        self.gradient_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.most_skipped_in_a_row = torch.zeros((), device=device)

    def count_skips(self, skipped: torch.Tensor) -> None:
        """Count a step that was skipped (1.0) or taken (0.0)."""
        self.skipped_steps = self.skipped_steps + skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * skipped
        more = (self.skipped_in_a_row - self.most_skipped_in_a_row).clamp(min=0.0)
        self.most_skipped_in_a_row = self.most_skipped_in_a_row + more


class NVLAMB(SkipCounts, torch.optim.Optimizer):
    """LAMB with bias correction, and clipping by the norm of all gradients.

    The step count t is in param_groups (`step`), the moments are in the state (`exp_avg`, `exp_avg_sq`).

    `foreach`: take the norm in PyTorch's kernels for lists of tensors, which not every device has.  A GradScaler's
    scale is divided out here, so that the scaler does not read the gradients on the host.
    """

    name = "lamb"
    _step_supports_amp_scaling = True
    # Without PyTorch's decorator, whose first call loads torch.compile: 0.9 s
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0,
                 foreach=True):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.max_grad_norm = max_grad_norm
        self.foreach = foreach
        self.start_counts(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        scale = getattr(self, "grad_scale", None)  # set by a GradScaler
        scale = 1.0 if scale is None else scale
        gradients = [param.grad for group in self.param_groups for param in with_gradient(group)]
        self.gradient_norm = self.global_norm(gradients) / scale
        finite = torch.isfinite(self.gradient_norm).float()
        self.count_skips(1.0 - finite)
        divisor = (self.gradient_norm / self.max_grad_norm).clamp(min=1.0) * scale
        for group in self.param_groups:
            group["step"] += 1
            params = with_gradient(group)
            self.create_missing_moments(params)
            self.update(group, params, divisor, finite)
        return loss

    def global_norm(self, gradients) -> torch.Tensor:
        return global_norm(gradients, self.foreach)

    def create_missing_moments(self, params) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    def update(self, group, params, divisor, finite) -> None:
        """Update the weights `params` of a group, whose gradients are divided by `divisor`; not where `finite` is 0."""
        lamb_update(*self.update_arguments(group, params, divisor, finite))

    def update_arguments(self, group, params, divisor, finite) -> tuple:
        """The arguments of lamb_update for one step of a group."""
        tensors = [(param, param.grad, self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"])
                   for param in params]
        beta1, beta2 = group["betas"]
        values = (float(group["lr"]), 1.0 - beta1 ** group["step"], 1.0 - beta2 ** group["step"])
        scalars = [torch.tensor(value).to(divisor.device, non_blocking=True) for value in values]
        return tensors, [*scalars, divisor, finite], group["betas"], group["eps"], group["weight_decay"]


def lamb_update(tensors, scalars, betas, eps: float, weight_decay: float) -> None:
    """One step of each (weight, gradient, exp_avg, exp_avg_sq) of `tensors`.

    What changes from step to step comes in as scalar tensors, since a Python number would become part of a graph: the
    rate, both bias corrections, the divisor of the gradients, and 1.0, or 0.0 to leave everything as it is.
    """
    rate, correction1, correction2, divisor, finite = scalars
    beta1, beta2 = betas
    keep1, keep2 = 1.0 - (1.0 - beta1) * finite, 1.0 - (1.0 - beta2) * finite
    for param, gradient, exp_avg, exp_avg_sq in tensors:
        gradient = (gradient / divisor).masked_fill(finite == 0.0, 0.0)
        exp_avg.mul_(keep1).add_(gradient, alpha=1.0 - beta1)
        exp_avg_sq.mul_(keep2).addcmul_(gradient, gradient, value=1.0 - beta2)
        update = (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + eps)
        update = update + weight_decay * param
        ratio = trust_ratio((param * param).sum(), (update * update).sum(), weight_decay)
        param.sub_(update * (rate * finite * ratio))


def trust_ratio(weight_square, update_square, weight_decay: float):
    """‖w‖/‖u‖ from the squared norms; 1 where the group does not decay or a norm is 0 (no branch on a tensor)."""
    if weight_decay == 0.0:
        return 1.0
    usable = ((weight_square > 0.0) & (update_square > 0.0)).float()
    ratio = (weight_square / (update_square + (1.0 - usable))).sqrt()
    return ratio * usable + (1.0 - usable)


def with_gradient(group) -> list:
    return [param for param in group["params"] if param.grad is not None]


def global_norm(tensors, foreach: bool) -> torch.Tensor:
    """‖all tensors together‖₂, a scalar tensor; without `foreach` in elementary operations."""
    if foreach:
        return torch.stack(torch._foreach_norm(tensors)).norm()
    return sum((tensor * tensor).sum() for tensor in tensors).sqrt()
