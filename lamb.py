"""NVLAMB: LAMB (You et al. 2019, arXiv 1904.00962) as BERT is pre-trained with it.

Per step t, with g the gradients divided by max(1, ‖all gradients‖₂ / max_grad_norm):

    m = β₁·m + (1−β₁)·g          v = β₂·v + (1−β₂)·g²
    u = (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + eps) + weight_decay·w
    w = w − lr·trust_ratio·u     trust_ratio = ‖w‖/‖u‖ where the group decays and both norms are > 0, else 1

A step whose gradient norm is not finite changes neither weights nor moments.  Nothing in a step waits for the device:
what a caller may want to know (gradient_norm, skipped_steps) stays there as a tensor until it is asked for.
"""

import torch

SLICE = 1 << 18  # elements worked on at a time on a CPU: all that belongs to them stays in its cache


class NVLAMB(torch.optim.Optimizer):
    """LAMB with bias correction, and clipping by the norm of all gradients.

    The step count t lives in param_groups (`step`), the moments in the state (`exp_avg`, `exp_avg_sq`).
    `gradient_norm` is the norm before clipping at the last step, `skipped_steps` the number of steps that were not
    taken because that norm was not finite, `skipped_in_a_row` the number of those since the last one that was taken,
    `most_skipped_in_a_row` the most there ever were: scalar tensors on the device.

    Under a GradScaler it divides by the scale itself, so that the scaler need not look at the gradients on the host.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        device = self.param_groups[0]["params"][0].device
        self.max_grad_norm = max_grad_norm
        self.gradient_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.most_skipped_in_a_row = torch.zeros((), device=device)
        self.update = self.update_in_slices if device.type == "cpu" else self.update_by_the_paper
        self.paper_update = paper_update
        self.norm = norm

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient.  On a CPU the clipped gradients stay in .grad."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        scale = getattr(self, "grad_scale", None)  # a GradScaler's
        scale = 1.0 if scale is None else scale
        gradients = [param.grad for group in self.param_groups for param in with_gradient(group)]
        self.gradient_norm = self.norm(gradients) / scale
        finite = torch.isfinite(self.gradient_norm).float()
        self.count_skips(1.0 - finite)
        divisor = (self.gradient_norm / self.max_grad_norm).clamp(min=1.0) * scale
        for group in self.param_groups:
            group["step"] += 1
            params = with_gradient(group)
            self.create_missing_moments(params)
            self.update(group, params, divisor, finite)
        return loss

    def count_skips(self, skipped: torch.Tensor) -> None:
        """Count a step that was skipped (1.0), or was not (0.0)."""
        self.skipped_steps = self.skipped_steps + skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * skipped
        more = (self.skipped_in_a_row - self.most_skipped_in_a_row).clamp(min=0.0)
        self.most_skipped_in_a_row = self.most_skipped_in_a_row + more

    def create_missing_moments(self, params) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)

    def compile(self, backend: str, in_parts: bool) -> str:
        """Compile what a step does to the weights, all in one graph or weight by weight; what was done, in words."""
        update = torch.compile(paper_update, backend=backend, dynamic=in_parts or None)
        self.paper_update = one_at_a_time(update) if in_parts else update
        self.update = self.update_by_the_paper
        return "NVLAMB's update too"

    def update_by_the_paper(self, group, params, divisor, finite) -> None:
        """The formulas above in operations that every device has: one graph where the device builds graphs."""
        tensors = [(param, param.grad, self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"])
                   for param in params]
        scalars = [*step_scalars(group, divisor.device), divisor, finite]
        self.paper_update(tensors, scalars, group["betas"], group["eps"], group["weight_decay"])

    def update_in_slices(self, group, params, divisor, finite) -> None:
        """The same on a CPU, limited by memory: each slice of a weight is finished while the cache holds it.

        PyTorch's fused Adam kernel, run with rate 1 on −decay·w, updates the moments and leaves −u there; it divides
        the gradient by grad_scale and does nothing where found_inf is 1.
        """
        beta1, beta2 = group["betas"]
        adam = {"lr": 1.0, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": 0.0, "amsgrad": False,
                "maximize": False, "grad_scale": divisor, "found_inf": 1.0 - finite}
        step = torch.tensor(float(group["step"]))
        buffer = torch.empty(max((param.numel() for param in params), default=0))
        for param in params:
            state = self.state[param]
            flat = [tensor.view(-1) for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])]
            flat.append(buffer[:param.numel()])
            weight_square = update_square = torch.zeros(())
            for slices in zip(*(tensor.split(SLICE) for tensor in flat), strict=True):
                weight, gradient, exp_avg, exp_avg_sq, update = slices
                torch.mul(weight, -group["weight_decay"], out=update)
                torch._fused_adamw_([update], [gradient], [exp_avg], [exp_avg_sq], [], [step], **adam)
                weight_square = weight_square + weight.dot(weight)
                update_square = update_square + update.dot(update)
            ratio = trust_ratio(weight_square, update_square, group["weight_decay"])
            flat[0].add_(flat[-1], alpha=float(group["lr"] * finite * ratio))


def paper_update(tensors, scalars, betas, eps: float, weight_decay: float) -> None:
    """One step of each (weight, gradient, exp_avg, exp_avg_sq) of `tensors`.

    What changes from step to step comes in as a scalar tensor, since a Python number would become part of the graph:
    the rate, both bias corrections, what gradients are divided by, and 1.0, or 0.0 to leave everything as it is.
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


def one_at_a_time(update):
    """`update` for each weight by itself, seen as a row of numbers: one graph serves weights of all sizes."""
    def update_all(tensors, *settings) -> None:
        for quadruple in tensors:
            update([tuple(tensor.detach().view(-1) for tensor in quadruple)], *settings)
    return update_all


def with_gradient(group) -> list:
    return [param for param in group["params"] if param.grad is not None]


def norm(tensors) -> torch.Tensor:
    """‖all tensors together‖₂, a scalar tensor, from sums of squares: not every device has a kernel for norms."""
    if tensors[0].device.type in ("cpu", "cuda"):
        return torch.stack(torch._foreach_norm(tensors)).norm()
    return sum((tensor * tensor).sum() for tensor in tensors).sqrt()


def step_scalars(group, device) -> list[torch.Tensor]:
    """The rate and both bias corrections 1 − βᵗ of a group's step as scalar tensors on the device."""
    beta1, beta2 = group["betas"]
    values = (float(group["lr"]), 1.0 - beta1 ** group["step"], 1.0 - beta2 ** group["step"])
    return [torch.tensor(value).to(device, non_blocking=True) for value in values]


def trust_ratio(weight_square, update_square, weight_decay: float):
    """‖w‖/‖u‖ from the squared norms; 1 where the group does not decay or a norm is 0 (no branch on a tensor)."""
    if weight_decay == 0.0:
        return 1.0
    usable = ((weight_square > 0.0) & (update_square > 0.0)).float()
    ratio = (weight_square / (update_square + (1.0 - usable))).sqrt()
    return ratio * usable + (1.0 - usable)
