"""Which optimizer a run takes, and over which groups of parameters."""

import torch

from lamb import NVLAMB


def build_optimizer(args, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer that the flags and the device lead to, and the choice in words, with its reason."""
    groups = parameter_groups(model)
    counts = " + ".join(f"{len(group['params'])} tensors with weight decay {group['weight_decay']}" for group in groups)
    return NVLAMB(groups, lr=args.learning_rate), f"optimizer: NVLAMB over {counts}"


def parameter_groups(model: torch.nn.Module, weight_decay: float = 0.01) -> list[dict]:
    """All parameters of a model, each once: those that decay, then biases and LayerNorm weights, which do not."""
    named = list(model.named_parameters())
    spared = [parameter for name, parameter in named if name.endswith("bias") or "LayerNorm" in name]
    spared_ids = {id(parameter) for parameter in spared}
    decaying = [parameter for _, parameter in named if id(parameter) not in spared_ids]
    assert len(decaying) + len(spared) == len({id(parameter) for parameter in model.parameters()})
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
