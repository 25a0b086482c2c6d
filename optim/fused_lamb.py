"""Faster variants of NVLAMB with the same state: for CPUs, for CUDA, compiled by torch.compile, and devices' own."""

import functools

import torch

from lamb import NVLAMB, SkipCounts, global_norm, lamb_update, trust_ratio, with_gradient
from ops import cpu_kernels

SLICE = 1 << 18  # elements; all that belongs to them stays in the CPU's cache


class SlicedNVLAMB(NVLAMB):
    """For CPUs, without a compiler: each slice of a weight is finished while the cache holds it.

    The clipped gradients stay in .grad.
    """

    def update(self, group, params, divisor, finite) -> None:
        step, settings = torch.tensor(float(group["step"])), adam_settings(group, divisor, finite)
        buffer = torch.empty(max((param.numel() for param in params), default=0))
        for param in params:
            state = self.state[param]
            flat = [tensor.view(-1) for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])]
            flat.append(buffer[:param.numel()])
            weight_square = update_square = torch.zeros(())
            for slices in zip(*(tensor.split(SLICE) for tensor in flat), strict=True):
                weight, gradient, exp_avg, exp_avg_sq, update = slices
                torch.mul(weight, -group["weight_decay"], out=update)
                torch._fused_adamw_([update], [gradient], [exp_avg], [exp_avg_sq], [], [step], **settings)
                weight_square = weight_square + weight.dot(weight)
                update_square = update_square + update.dot(update)
            ratio = trust_ratio(weight_square, update_square, group["weight_decay"])
            flat[0].add_(flat[-1], alpha=float(group["lr"] * finite * ratio))


class CpuFusedNVLAMB(NVLAMB):
    """For CPUs: one kernel of ops/csrc/lamb.cpp.  Gradients are left as they are.

    A step is limited by memory.  The kernel moves 44 bytes per parameter: 4 for the gradient's norm, 24 for the
    moments, 16 for the update.  PyTorch's kernels move 64, since they write the update and read it again.
    """

    def global_norm(self, gradients) -> torch.Tensor:
        out = torch.empty((), dtype=torch.float64)
        cpu_kernels.load().square_sum(addresses(gradients), sizes(gradients), len(gradients), out)
        return out.sqrt().float()

    def update(self, group, params, divisor, finite) -> None:
        if not finite or not params:
            return
        beta1, beta2 = group["betas"]
        arrays = [[tensor.detach() for tensor in params], [param.grad for param in params],
                  *([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))]
        cpu_kernels.load().lamb_step(
            *map(addresses, arrays), sizes(params), len(params), 1.0 / float(divisor), float(group["lr"]), beta1, beta2,
            1.0 - beta1 ** group["step"], 1.0 - beta2 ** group["step"], group["eps"], group["weight_decay"])


class MultiTensorNVLAMB(NVLAMB):
    """For CUDA: PyTorch's kernels for lists of tensors.  The clipped gradients stay in .grad.

    It needs memory for one more copy of a group's weights during the step.
    """

    def update(self, group, params, divisor, finite) -> None:
        if not params:
            return
        weights = [param.detach() for param in params]
        exp_avgs, exp_avg_sqs = ([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))
        updates = torch._foreach_mul(weights, -group["weight_decay"])
        step = torch.full((), float(group["step"]), device=divisor.device)
        torch._fused_adamw_(updates, [param.grad for param in params], exp_avgs, exp_avg_sqs, [], [step] * len(params),
                            **adam_settings(group, divisor, finite))
        rate = finite * float(group["lr"])
        if group["weight_decay"] == 0.0:
            torch._foreach_mul_(updates, rate)
            torch._foreach_add_(weights, updates)
            return
        squares = (torch.stack(torch._foreach_norm(tensors)).square() for tensors in (weights, updates))
        rates = rate * trust_ratio(*squares, group["weight_decay"])
        for weight, update, own_rate in zip(weights, updates, rates.unbind(), strict=True):
            weight.addcmul_(update, own_rate)


class CompiledNVLAMB(NVLAMB):
    """The formulas of lamb.py compiled by a backend of torch.compile: one graph for a group of weights.

    `in_parts`: one graph for each weight, seen as a row of numbers, so that a single graph serves weights of all sizes.
    """

    def __init__(self, params, backend: str, in_parts: bool, **settings):
        super().__init__(params, **settings)
        self.backend = backend
        self.in_parts = in_parts

    def update(self, group, params, divisor, finite) -> None:
        update = compiled_update(self.backend, self.in_parts)
        tensors, *settings = self.update_arguments(group, params, divisor, finite)
        if self.in_parts:
            for weight_tensors in tensors:
                update([tuple(tensor.detach().view(-1) for tensor in weight_tensors)], *settings)
        else:
            update(tensors, *settings)


class ZeroedNonFinite(SkipCounts):
    """Goes before a device's own LAMB, which cannot skip a step, in a class made by zeroed_non_finite().

    A step whose gradient norm is not finite is taken with gradients of zero: the moments decay, and the weights move by
    what the moments hold.  The norm is tested on the device; nothing waits for it.
    """

    name = "lamb"

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.start_counts(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [param.grad for group in self.param_groups for param in with_gradient(group)]
        self.gradient_norm = global_norm(gradients, foreach=False)
        finite = torch.isfinite(self.gradient_norm).float()
        self.count_skips(1.0 - finite)
        for gradient in gradients:
            gradient.masked_fill_(finite == 0.0, 0.0)
        return super().step(closure)


@functools.cache
def zeroed_non_finite(fused_lamb: type) -> type:
    return type(f"ZeroedNonFinite{fused_lamb.__name__}", (ZeroedNonFinite, fused_lamb), {})


@functools.cache
def compiled_update(backend: str, in_parts: bool):
    return torch.compile(lamb_update, backend=backend, dynamic=in_parts or None)


def adam_settings(group, divisor, finite) -> dict:
    """Settings with which PyTorch's fused Adam, given −weight_decay·w as the weight, updates the moments and leaves −u.

    It divides the gradient by grad_scale, in place, and does nothing where found_inf is 1.
    """
    beta1, beta2 = group["betas"]
    return {"lr": 1.0, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": 0.0, "amsgrad": False,
            "maximize": False, "grad_scale": divisor, "found_inf": 1.0 - finite}


def addresses(tensors) -> torch.Tensor:
    """The addresses of dense fp32 tensors as an array that a kernel can read."""
    for tensor in tensors:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), f"{tensor.dtype} of strides {tensor.stride()}"
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def sizes(tensors) -> torch.Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
