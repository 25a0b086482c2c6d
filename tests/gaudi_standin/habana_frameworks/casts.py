"""What autocast and hmp do to the arguments of an op, by lists of names."""

from contextlib import contextmanager

import torch

ATEN_NAMES = {"cross_entropy": "cross_entropy_loss", "nll_loss": "nll_loss_nd", "rdiv": "div", "radd": "add",
              "rmul": "mul", "rpow": "pow"}
DEFAULT_BF16 = {"addmm", "bmm", "dropout", "layer_norm", "linear", "log_softmax", "matmul", "mm", "mul", "softmax"}
DEFAULT_FP32 = {"cross_entropy_loss", "div", "embedding", "exp", "log", "pow"}
WIDEST = {"add", "cat", "div", "exp", "mul", "pow", "sub", "stack"}


class Casts:
    """Lists of ops, and whether they are in force."""

    def __init__(self):
        self.bf16, self.fp32, self.on = set(), set(), False

    def use(self, bf16, fp32) -> None:
        self.bf16, self.fp32 = ({ATEN_NAMES.get(name, name) for name in names} for names in (bf16, fp32))

    @contextmanager
    def switched(self, on: bool):
        before, self.on = self.on, on
        yield
        self.on = before

    def of(self, func, args, kwargs):
        """The arguments that an op runs with."""
        name = ATEN_NAMES.get(func.__name__.strip("_"), func.__name__.strip("_"))
        if not self.on or func.__name__.endswith("_") and not func.__name__.endswith("__"):
            return args, kwargs  # in place: as they are
        if name in self.bf16:
            return cast((args, kwargs), torch.float32, torch.bfloat16)
        if name in self.fp32 or name in WIDEST and has_fp32((args, kwargs)):
            return cast((args, kwargs), torch.bfloat16, torch.float32)
        return args, kwargs


def cast(value, given: torch.dtype, wanted: torch.dtype):
    if isinstance(value, torch.Tensor):
        return value.to(wanted) if value.dtype == given else value
    if isinstance(value, dict):
        return {name: cast(item, given, wanted) for name, item in value.items()}
    return tuple(cast(item, given, wanted) for item in value) if isinstance(value, list | tuple) else value


def has_fp32(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.float32
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(has_fp32(item) for item in values)


casts = Casts()
