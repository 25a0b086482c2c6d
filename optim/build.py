"""The choice of a run's optimizer, and its groups of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from common.errors import UserError
from lamb import NVLAMB
from ops import cpu_kernels
from optim.adamw import AdamW, CompiledAdamW, FusedAdamW
from optim.fused_lamb import CompiledNVLAMB, CpuFusedNVLAMB, MultiTensorNVLAMB, SlicedNVLAMB, zeroed_non_finite

SKIP_COUNTS = ("skipped_steps", "skipped_in_a_row", "most_skipped_in_a_row")
USUAL_RATES = {"lamb": (5e-4, 3e-2), "adamw": (1e-5, 3e-3)}  # peak rates of BERTs of all sizes, with a wide margin


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What a command asks of the optimizer."""

    name: str = "lamb"
    learning_rate: float
    weight_decay: float = 0.01
    use_fused_lamb: bool = False

    @property
    def rate_warning(self) -> str | None:
        """A sentence where the rate is far from those that this optimizer trains BERTs with."""
        low, high = USUAL_RATES[self.name]
        if low <= self.learning_rate <= high:
            return None
        side = "above" if self.learning_rate > high else "below"
        return (f"--learning_rate {self.learning_rate:g} is far {side} what --optimizer {self.name} trains BERT with, "
                f"{low:g} to {high:g} (docs/training.md#optimizer)")


def build_optimizer(model: torch.nn.Module, device, options: OptimizerOptions, compiled: bool = False,
                    shards: int = 1) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and a description that gives the reason for the choice.

    `compiled`: compile it where it is not fused; `shards`: ranks that the state is sharded over.
    """
    groups = parameter_groups(model, options.weight_decay)
    counts = " + ".join(f"{len(group['params'])} tensors with weight decay {group['weight_decay']}" for group in groups)
    optimizer_class, description = (choose_adamw(device, compiled) if options.name == "adamw" else
                                    choose_lamb(device, options.use_fused_lamb, compiled))
    description = f"optimizer: {description} over {counts}"
    settings = {"lr": options.learning_rate, "betas": (0.9, 0.999), "eps": 1e-6, "max_grad_norm": 1.0}
    if shards == 1:
        return optimizer_class(groups, **settings), description
    if shards > len(groups[0]["params"]):
        raise UserError(f"--use_zero_optimizer: each rank takes whole weights, and {len(groups[0]['params'])} of them "
                        f"(without biases and LayerNorms) are not enough for {shards} ranks")
    from optim.zero import ShardedOptimizer  # what it builds on takes seconds to import

    optimizer = ShardedOptimizer(groups, optimizer_class, foreach=device.has_foreach_kernels, **settings)
    return optimizer, f"{description}, its state sharded over {shards} ranks"


def choose_adamw(device, compiled: bool) -> tuple[Callable, str]:
    """The class of a device's AdamW, or a partial of it, and its description."""
    if device.has_foreach_kernels:
        return FusedAdamW, "AdamW in PyTorch's fused kernel"
    if compiled:
        adamw = partial(CompiledAdamW, backend=device.compiler, in_parts=device.compiles_in_parts)
        return partial(adamw, foreach=False), f"AdamW, compiled by {device.compiler}"
    return partial(AdamW, foreach=False), "AdamW"


def choose_lamb(device, use_fused_lamb: bool, compiled: bool) -> tuple[Callable, str]:
    """The class of a device's LAMB, or a partial of it, and its description."""
    fused, reason = choose_fused_lamb(device) if use_fused_lamb else (None, "--use_fused_lamb is faster")
    if fused:
        return fused, reason
    if compiled:
        nvlamb = partial(CompiledNVLAMB, backend=device.compiler, in_parts=device.compiles_in_parts)
        return partial(nvlamb, foreach=device.has_foreach_kernels), f"NVLAMB, compiled by {device.compiler} ({reason})"
    nvlamb = SlicedNVLAMB if device.runs_cpu_kernels else partial(NVLAMB, foreach=device.has_foreach_kernels)
    return nvlamb, f"NVLAMB ({reason})"


def choose_fused_lamb(device) -> tuple[type | None, str]:
    """The class of a fused LAMB and its description, or None and the reason why there is none."""
    if fused := device.fused_lamb():
        return zeroed_non_finite(fused), "FusedLamb, with gradients of zero in steps that are not finite"
    if device.runs_cpu_kernels:
        reason = cpu_kernels.unavailable_reason()
        return (None, reason) if reason else (CpuFusedNVLAMB, "NVLAMB in one kernel compiled for this CPU")
    if device.has_foreach_kernels:
        return MultiTensorNVLAMB, "NVLAMB in PyTorch's kernels for many tensors"
    return None, f"{device.torch_device.type} has no FusedLamb"


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: the local one of zero.ShardedOptimizer, else the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def optimizer_metrics(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The gradient norm and the skip counts, as scalar tensors on the device."""
    local = local_optimizer(optimizer)
    return {"gradient_norm": optimizer.gradient_norm, **{name: getattr(local, name) for name in SKIP_COUNTS}}


def skip_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many steps were skipped, by SKIP_COUNTS."""
    return {name: int(getattr(local_optimizer(optimizer), name).item()) for name in SKIP_COUNTS}


def restore_skip_counts(optimizer: torch.optim.Optimizer, counts: dict[str, int]) -> None:
    for name in SKIP_COUNTS:
        getattr(local_optimizer(optimizer), name).fill_(counts.get(name, 0))


def parameter_groups(model: torch.nn.Module, weight_decay: float = 0.01) -> list[dict]:
    """All parameters of a model, each once: those that decay, then biases and LayerNorm weights, which do not."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():  # a tied parameter under its first name only
        (undecayed if name.endswith("bias") or "LayerNorm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
