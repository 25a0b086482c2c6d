"""Which optimizer a run takes, and over which groups of parameters."""

import torch

from common.errors import UserError
from lamb import NVLAMB
from ops import cpu_kernels
from optim.fused_lamb import CpuFusedNVLAMB, MultiTensorNVLAMB

SKIP_COUNTS = ("skipped_steps", "skipped_in_a_row", "most_skipped_in_a_row")


def build_optimizer(args, model: torch.nn.Module, device, world_size: int = 1) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer that the flags and the device lead to, and the choice in words, with its reason."""
    groups = parameter_groups(model)
    counts = " + ".join(f"{len(group['params'])} tensors with weight decay {group['weight_decay']}" for group in groups)
    fused_lamb, reason = choose_fused_lamb(args, device)
    words = f"optimizer: {reason if fused_lamb else f'NVLAMB ({reason})'} over {counts}"
    optimizer_class = fused_lamb or NVLAMB
    options = {"lr": args.learning_rate, "betas": (0.9, 0.999), "eps": 1e-6, "max_grad_norm": 1.0}
    if world_size > 1 and args.use_zero_optimizer:
        return (sharded(groups, optimizer_class, world_size, options),
                f"{words}, its state sharded over {world_size} ranks")
    return optimizer_class(groups, **options), words


def sharded(groups: list[dict], optimizer_class: type, world_size: int, options: dict) -> torch.optim.Optimizer:
    """Optimizers of one class, each over its rank's share.  UserError where there are too few weights to share out."""
    from optim.zero import ShardedOptimizer  # what it builds on takes seconds to import

    if world_size > len(groups[0]["params"]):
        raise UserError(f"--use_zero_optimizer: weights are shared out whole, and {len(groups[0]['params'])} of them "
                        f"(without biases and LayerNorms) are not enough for {world_size} ranks")
    return ShardedOptimizer(groups, optimizer_class, **options)


def local_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: the local one of zero.ShardedOptimizer, else the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def choose_fused_lamb(args, device) -> tuple[type | None, str]:
    """The class of a fused LAMB and its name, or None and why there is none."""
    if not args.use_fused_lamb:
        return None, "no --use_fused_lamb"
    if device.fused_lamb():
        return device.fused_lamb(), "FusedLamb"
    if device.has_multi_tensor_kernels:
        return MultiTensorNVLAMB, "NVLAMB in PyTorch's kernels for many tensors"
    if not device.has_cpu_kernels:
        return None, f"{device.kind} has no FusedLamb"
    problem = cpu_kernels.problem()
    return (None, problem) if problem else (CpuFusedNVLAMB, "NVLAMB in one kernel compiled for this CPU")


def figures(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What an optimizer tells about its last step, as scalar tensors on the device; FusedLamb tells nothing."""
    return {name: getattr(optimizer, name) for name in ("gradient_norm", *SKIP_COUNTS) if hasattr(optimizer, name)}


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves out, and counts, a step whose gradient norm is not finite."""
    return hasattr(optimizer, "skipped_steps")


def skip_counts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many steps were skipped, by SKIP_COUNTS; empty where the optimizer cannot skip one."""
    return {name: int(getattr(optimizer, name).item()) for name in SKIP_COUNTS if hasattr(optimizer, name)}


def restore_skip_counts(optimizer: torch.optim.Optimizer, counts: dict[str, int]) -> None:
    for name in SKIP_COUNTS:
        if hasattr(optimizer, name):
            getattr(optimizer, name).fill_(counts.get(name, 0))


def parameter_groups(model: torch.nn.Module, weight_decay: float = 0.01) -> list[dict]:
    """All parameters of a model, each once: those that decay, then biases and LayerNorm weights, which do not."""
    named = list(model.named_parameters())
    spared = [parameter for name, parameter in named if name.endswith("bias") or "LayerNorm" in name]
    spared_ids = {id(parameter) for parameter in spared}
    decaying = [parameter for _, parameter in named if id(parameter) not in spared_ids]
    assert len(decaying) + len(spared) == len({id(parameter) for parameter in model.parameters()})
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
