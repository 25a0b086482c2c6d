"""Op lists on devices other than Gaudi: the casts of hmp as a PyTorch mode, and a mode that prints dtypes.

Within its block, a TorchFunctionMode intercepts each call of a function of torch, nn.functional and Tensor.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode, get_overridable_functions

from common.errors import UserError
from devices import op_lists
from devices.op_lists import OpLists
from devices.options import PrecisionOptions

CAST = (torch.bfloat16, torch.float32)

# Ops that run in fp32 if any argument is fp32, where they are in neither list.
WIDEST_INPUT = {"add", "addcmul", "addcdiv", "cat", "div", "exp", "mul", "pow", "sub", "stack"}
REFLECTED = {"radd": "add", "rmul": "mul", "rdiv": "div", "rtruediv": "div", "rpow": "pow", "rmatmul": "matmul"}
IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imatmul__"}
FIRST_ARGUMENT_ONLY = {"layer_norm", "group_norm", "batch_norm", "instance_norm"}


def check_op_names(lists: OpLists, precision: PrecisionOptions) -> None:
    """UserError where a list names an op that PyTorch does not have."""
    known = {op_name(name) for name in function_names()}
    for flag, path, ops in (("--hmp_bf16", precision.bf16_list, lists.bf16),
                            ("--hmp_fp32", precision.fp32_list, lists.fp32)):
        unknown = sorted(ops - known)
        if unknown:
            first = ", ".join(name[:50] for name in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UserError(f"{flag} {path}: PyTorch has no op named {first}{more}")


def function_names() -> set[str]:
    """The names of all functions of torch that a TorchFunctionMode intercepts."""
    return {function.__name__ for group in get_overridable_functions().values() for function in group}


class OpListMode(TorchFunctionMode):
    """hmp's level O1, on any device.

    An op of the bf16 list has its float32 arguments cast to bf16, an op of the fp32 list its bf16 arguments to float32;
    ops of FIRST_ARGUMENT_ONLY have their first argument cast only.  In-place ops cast to the dtype of the tensor that
    they change.  Ops of WIDEST_INPUT that are in neither list run in float32 if any argument is float32.  Other ops are
    not cast.
    """

    def __init__(self, lists: OpLists, mixed_layer_norm: bool = True):
        super().__init__()
        # The names of functions, which torch.compile can look up while it traces.
        self.in_place = {name for name in function_names() if is_in_place(name)}
        ops = {name: op_name(name) for name in function_names() - self.in_place}
        self.listed = {name: torch.bfloat16 for name, op in ops.items() if op in lists.bf16}
        self.listed |= {name: torch.float32 for name, op in ops.items() if op in lists.fp32}
        self.widest = {name for name, op in ops.items() if op in WIDEST_INPUT - lists.bf16 - lists.fp32}
        self.first_only = FIRST_ARGUMENT_ONLY if mixed_layer_norm else set()
        self.active = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = self.target_dtype(func.__name__, args, kwargs) if self.active else None
        if target is None:
            return func(*args, **kwargs) if torch.compiler.is_compiling() else call_uncast(func, args, kwargs)
        if func.__name__ in self.first_only and args:
            return func(cast(args[0], target), *args[1:], **kwargs)
        return func(*cast(args, target), **{name: cast(value, target) for name, value in kwargs.items()})

    def target_dtype(self, function_name: str, args, kwargs) -> torch.dtype | None:
        """The dtype that a function's arguments are cast to; None: they are not cast."""
        if function_name in self.in_place:
            return next(iter(dtypes(args)), None)
        if function_name in self.widest and torch.float32 in dtypes([args, kwargs]):
            return torch.float32
        return self.listed.get(function_name)

    @torch.compiler.disable  # a compiled block would ignore the change of `active`
    @contextmanager
    def off(self):
        """A block without casts."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


def call_uncast(func, args, kwargs):
    """Call an op without casts.  UserError where it does not accept the mixture of dtypes that the lists lead to."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        given = {dtype for dtype in dtypes([args, kwargs]) if dtype in CAST}
        if len(given) < 2:
            raise
        raise UserError(f"--hmp_bf16, --hmp_fp32: {op_name(func.__name__)} is in neither list, and its arguments are "
                        f"partly bfloat16, partly float32: {error}") from error


class DtypeReport(TorchFunctionMode):
    """Prints the dtypes of an op's inputs and outputs, each combination once; casts are not printed."""

    def __init__(self):
        super().__init__()
        self.printed = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = dtypes([args, kwargs]), dtypes([result])
        line = f"{op_name(func.__name__)}: {names(inputs)} -> {names(outputs)}"
        if inputs and outputs and func.__name__ not in ("__get__", "to") and line not in self.printed:
            self.printed.add(line)
            print(line)
        return result


def names(types: list[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def op_name(function_name: str) -> str:
    """The op-list name of a function of torch.

        >>> [op_name(name) for name in ("linear", "__rsub__", "__radd__", "true_divide", "add_", "__iadd__")]
        ['linear', 'rsub', 'add', 'div', 'iadd', 'iadd']
    """
    name = function_name.strip("_")
    if is_in_place(function_name) and function_name not in IN_PLACE_OPERATORS:
        name = "i" + name
    name = REFLECTED.get(name, name)
    return op_lists.SAME_OP.get(name, name)


def is_in_place(function_name: str) -> bool:
    """Whether a function changes its first argument: add_, __iadd__."""
    return function_name in IN_PLACE_OPERATORS or (function_name.endswith("_") and not function_name.endswith("__"))


def dtypes(value) -> list[torch.dtype]:
    """The dtypes of the floating-point tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value.dtype] if value.dtype.is_floating_point else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [dtype for item in value for dtype in dtypes(item)]


def cast(value, target: torch.dtype):
    """Cast the bf16 and fp32 tensors in nested lists and tuples to `target`, if that is bf16 or fp32 too."""
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype in CAST and target in CAST else value
    return [cast(item, target) for item in value] if isinstance(value, list | tuple) else value
