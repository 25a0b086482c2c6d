"""The op lists at work where there is no Gaudi: the casts of hmp as a mode of PyTorch, and a report of an op's types.

A TorchFunctionMode sees each call of a function of torch, nn.functional and Tensor in the blocks where it is on.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode, get_overridable_functions

from common.errors import UserError
from devices import op_lists
from devices.op_lists import OpLists
from devices.options import PrecisionOptions

CAST = (torch.bfloat16, torch.float32)

# In neither list, these run in fp32 if any argument is fp32.
WIDEST_INPUT = {"add", "addcmul", "addcdiv", "cat", "div", "exp", "mul", "pow", "sub", "stack"}
REFLECTED = {"radd": "add", "rmul": "mul", "rdiv": "div", "rtruediv": "div", "rpow": "pow", "rmatmul": "matmul"}
IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imatmul__"}
FIRST_ARGUMENT_ONLY = {"layer_norm", "group_norm", "batch_norm", "instance_norm"}


def check_names(lists: OpLists, precision: PrecisionOptions) -> None:
    """UserError where a list names what is no op of PyTorch."""
    known = {op_name(name) for name in function_names()}
    for flag, path, ops in (("--hmp_bf16", precision.bf16_list, lists.bf16),
                            ("--hmp_fp32", precision.fp32_list, lists.fp32)):
        unknown = sorted(ops - known)
        if unknown:
            first = ", ".join(name[:50] for name in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UserError(f"{flag} {path}: PyTorch has no op named {first}{more}")


def function_names() -> set[str]:
    """The names of all functions of torch that a TorchFunctionMode gets to see."""
    return {function.__name__ for group in get_overridable_functions().values() for function in group}


class OpListMode(TorchFunctionMode):
    """What hmp's level O1 does, on any device.

    The float32 tensors among an op's arguments are cast to bf16 where the bf16 list has the op, the bf16 ones to
    float32 where the fp32 list has it; layer_norm and its like cast the first argument alone.  An in-place op casts to
    the type of what it changes.  The ops of WIDEST_INPUT, in neither list, run in float32 if any argument is; every
    other op takes its arguments as they come.

    The rule is looked up by the function's name, in a way that torch.compile can follow.
    """

    def __init__(self, lists: OpLists, mixed_layer_norm: bool = True):
        super().__init__()
        rules = {name: rule_of(name, lists) for name in function_names()}
        self.rules = {name: rule for name, rule in rules.items() if rule}
        self.first_only = FIRST_ARGUMENT_ONLY if mixed_layer_norm else set()
        self.active = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = self.rules.get(func.__name__) if self.active else None
        target = rule(args, kwargs) if rule else None
        if target is None:
            return func(*args, **kwargs) if torch.compiler.is_compiling() else as_they_come(func, args, kwargs)
        if func.__name__ in self.first_only and args:
            return func(cast(args[0], target), *args[1:], **kwargs)
        return func(*cast(args, target), **{name: cast(value, target) for name, value in kwargs.items()})

    @torch.compiler.disable  # a compiled block would not notice
    @contextmanager
    def off(self):
        """A block in which nothing is cast."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


def as_they_come(func, args, kwargs):
    """Call an op without a cast.  UserError where it does not take the mixture of types that the lists have led to."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        given = {dtype for dtype in dtypes([args, kwargs]) if dtype in CAST}
        if len(given) < 2:
            raise
        raise UserError(f"--hmp_bf16, --hmp_fp32: {op_name(func.__name__)} is in neither list, and what comes to it is "
                        f"part bfloat16, part float32: {error}") from error


def rule_of(function_name: str, lists: OpLists) -> Callable | None:
    """The rule that gives the type to cast to from an op's (args, kwargs), itself None or giving None for no cast."""
    op = op_name(function_name)
    if is_in_place(function_name):
        return type_of_first
    if op in lists.bf16:
        return always_bf16
    if op in lists.fp32:
        return always_fp32
    return fp32_if_any if op in WIDEST_INPUT else None


def type_of_first(args, kwargs) -> torch.dtype | None:
    return next(iter(dtypes(args)), None)


def always_bf16(args, kwargs) -> torch.dtype:
    return torch.bfloat16


def always_fp32(args, kwargs) -> torch.dtype:
    return torch.float32


def fp32_if_any(args, kwargs) -> torch.dtype | None:
    return torch.float32 if torch.float32 in dtypes([args, kwargs]) else None


class DtypeReport(TorchFunctionMode):
    """Prints the types of an op's tensors, going in and coming out, once for each combination; not of the casts."""

    def __init__(self, report=print):
        super().__init__()
        self.report = report
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        going_in, coming_out = dtypes([args, kwargs]), dtypes([result])
        line = f"{op_name(func.__name__)}: {words(going_in)} -> {words(coming_out)}"
        if going_in and coming_out and func.__name__ not in ("__get__", "to") and line not in self.seen:
            self.seen.add(line)
            self.report(line)
        return result


def words(types: list[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def op_name(function_name: str) -> str:
    """The name in an op list of a function of torch.

        >>> [op_name(name) for name in ("linear", "__rsub__", "__radd__", "true_divide", "add_", "__iadd__")]
        ['linear', 'rsub', 'add', 'div', 'iadd', 'iadd']
    """
    name = function_name.strip("_")
    if is_in_place(function_name) and function_name not in IN_PLACE_OPERATORS:
        name = "i" + name
    return op_lists.canonical(REFLECTED.get(name, name))


def is_in_place(function_name: str) -> bool:
    """Whether a function changes its first argument: add_, __iadd__."""
    return function_name in IN_PLACE_OPERATORS or (function_name.endswith("_") and not function_name.endswith("__"))


def dtypes(value) -> list[torch.dtype]:
    """The types of the floating-point tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value.dtype] if value.dtype.is_floating_point else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [dtype for item in value for dtype in dtypes(item)]


def cast(value, target: torch.dtype):
    """The bf16 and fp32 tensors in nested lists and tuples as `target`, where that is bf16 or fp32 too."""
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype in CAST and target in CAST else value
    return [cast(item, target) for item in value] if isinstance(value, list | tuple) else value
