"""The precision of a run: fp32, bf16 (--hmp), or fp16 with loss scaling (--fp16).

Weights, gradients and the optimizer's state are fp32 in all of them; losses and optimizer step are computed in fp32.
bf16 comes about in one of four ways, the first that applies:

    Gaudi, software with hmp          hmp.convert with the list files; its casts reach the whole process
    Gaudi                             torch.autocast, with the lists that gaudi_environment.py set before
    lists given, or a lazy device     OpListMode, the rules of hmp as a mode of our own
    else                              torch.autocast, with the device's own choice of ops
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode, get_overridable_functions

import op_lists
from cli import UserError
from op_lists import OpLists

CAST = (torch.bfloat16, torch.float32)

# In neither list, these run in fp32 if any argument is fp32.
WIDEST_INPUT = {"add", "addcmul", "addcdiv", "cat", "div", "exp", "mul", "pow", "sub", "stack"}
REFLECTED = {"radd": "add", "rmul": "mul", "rdiv": "div", "rtruediv": "div", "rpow": "pow", "rmatmul": "matmul"}
IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imatmul__"}
FIRST_ARGUMENT_ONLY = {"layer_norm", "group_norm", "batch_norm", "instance_norm"}


SCALE_KEYS = ("scale", "_growth_tracker")  # of GradScaler.state_dict
NEVER = 2**31 - 1  # steps


@dataclass(frozen=True)
class Casts:
    """A way to cast, in words, and two contexts: casts on, and casts off within them."""

    description: str
    on: Callable[[], AbstractContextManager] = nullcontext
    off: Callable[[], AbstractContextManager] = nullcontext


class Precision:
    """What a training step asks about precision: contexts, a backward pass, an optimizer step.

    `autocast()` goes around the forward pass.  `casts_off()` goes around what stays in fp32 whatever the op lists say.
    """

    def __init__(self, args, device):
        if args.fp16 and device.kind != "cuda":
            raise UserError(f"--fp16 needs CUDA, but the device is {device.kind} (--hmp trains in bf16 on any device)")
        self.casts = choose_casts(args, device)
        self.casts_off = self.casts.off
        self.observers = [DtypeReport()] if args.hmp and args.hmp_verbose and not device.hmp else []
        scale = args.loss_scale or args.init_loss_scale
        growth_interval = NEVER if args.loss_scale else 2000  # a constant scale never grows
        self.scaler = torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=growth_interval, enabled=args.fp16)

    def describe(self) -> str:
        return self.casts.description

    @contextmanager
    def autocast(self):
        with ExitStack() as stack:
            for context in (*self.observers, self.casts.on()):  # the mode entered last sees an op first
                stack.enter_context(context)
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer) -> None:
        """The optimizer step; under loss scaling it is left out where a gradient overflowed."""
        with self.casts_off():
            self.scaler.step(optimizer)
            self.scaler.update()

    def state(self) -> dict:
        """The loss scale and what makes it change, in plain numbers; empty without loss scaling."""
        state = self.scaler.state_dict()
        return {key: state[key] for key in SCALE_KEYS if key in state}

    def restore(self, state: dict) -> None:
        """Go on with a dynamic loss scale; one that a flag fixes stays."""
        if self.scaler.is_enabled() and self.scaler.get_growth_interval() != NEVER:
            known = {key: state[key] for key in SCALE_KEYS if isinstance(state.get(key), int | float)}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **known})


def choose_casts(args, device) -> Casts:
    """How a run casts, by its flags and by what the device has (see the top of this file)."""
    if args.fp16:
        return torch_autocast("float16 autocast", device, torch.float16)
    if not args.hmp:
        return Casts("float32")
    lists = op_lists.given_lists(args)
    if lists:
        check_names(lists, args)
    words = f" by op lists: {len(lists.bf16)} ops in bf16, {len(lists.fp32)} in fp32" if lists else ""
    if device.hmp:
        device.hmp.convert(opt_level=args.hmp_opt_level, bf16_file_path=args.hmp_bf16, fp32_file_path=args.hmp_fp32,
                           isVerbose=args.hmp_verbose)
        return Casts(f"bfloat16 hmp {args.hmp_opt_level}{words}", off=device.hmp.disable_casts)
    if device.reads_op_lists or (device.has_autocast and not lists):
        return torch_autocast(f"bfloat16 autocast{words}", device, torch.bfloat16)
    mode = OpListMode(lists or OpLists(), device.mixed_layer_norm)
    return Casts(f"bfloat16{words}" if lists else "bfloat16 by the default op lists of Gaudi's autocast",
                 lambda: mode, mode.off)


def torch_autocast(description: str, device, dtype: torch.dtype) -> Casts:
    return Casts(description, functools.partial(device.autocast, dtype),
                 functools.partial(device.autocast, dtype, enabled=False))


def check_names(lists: OpLists, args) -> None:
    """UserError where a list names what is no op of PyTorch."""
    functions = [function for group in get_overridable_functions().values() for function in group]
    known = {op_name(function.__name__) for function in functions}
    for flag, path, ops in (("--hmp_bf16", args.hmp_bf16, lists.bf16), ("--hmp_fp32", args.hmp_fp32, lists.fp32)):
        unknown = sorted(ops - known)
        if unknown:
            raise UserError(f"{flag} {path}: PyTorch has no op named {', '.join(unknown)}")


class OpListMode(TorchFunctionMode):
    """What hmp's level O1 does, on any device.

    The float32 tensors among an op's arguments are cast to bf16 where the bf16 list has the op, the bf16 ones to
    float32 where the fp32 list has it; layer_norm and its like cast the first argument alone.  An in-place op casts to
    the type of what it changes.  The ops of WIDEST_INPUT, in neither list, run in float32 if any argument is; every
    other op takes its arguments as they come.
    """

    def __init__(self, lists: OpLists, mixed_layer_norm: bool = True):
        super().__init__()
        self.lists = lists
        self.first_only = FIRST_ARGUMENT_ONLY if mixed_layer_norm else set()
        self.active = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = self.target(func.__name__, args, kwargs) if self.active else None
        if target is None:
            return func(*args, **kwargs)
        if op_name(func.__name__) in self.first_only:
            return func(cast(args[0], target), *args[1:], **kwargs)
        return func(*cast(args, target), **{name: cast(value, target) for name, value in kwargs.items()})

    def target(self, function_name: str, args, kwargs) -> torch.dtype | None:
        """The type that an op's bf16 and fp32 arguments are cast to; None = they stay as they are."""
        if is_in_place(function_name):
            return next(iter(dtypes(args)), None)
        op = op_name(function_name)
        if op in self.lists.bf16:
            return torch.bfloat16
        if op in self.lists.fp32 or (op in WIDEST_INPUT and torch.float32 in dtypes([args, kwargs])):
            return torch.float32
        return None

    @contextmanager
    def off(self):
        """A block in which nothing is cast."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


class DtypeReport(TorchFunctionMode):
    """Prints the types of an op's tensors, going in and coming out, once for each combination."""

    def __init__(self, report=print):
        super().__init__()
        self.report = report
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        going_in, coming_out = dtypes([args, kwargs]), dtypes([result])
        line = f"{op_name(func.__name__)}: {words(going_in)} -> {words(coming_out)}"
        if going_in and coming_out and func.__name__ != "__get__" and line not in self.seen:
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
        return [value.dtype] if value.is_floating_point() else []
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
