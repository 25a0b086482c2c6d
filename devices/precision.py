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

from common.errors import UserError
from devices import op_lists
from devices.op_list_mode import DtypeReport, OpListMode, check_names
from devices.op_lists import OpLists

SCALE_KEYS = ("scale", "_growth_tracker")  # of GradScaler.state_dict


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
        self.dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.hmp else torch.float32  # of matmuls
        self.casts = choose_casts(args, device)
        self.casts_off = self.casts.off
        self.observers = [DtypeReport()] if args.hmp and args.hmp_verbose and not device.hmp else []
        self.fixed_scale = args.loss_scale or None
        self.scaler = torch.amp.GradScaler("cuda", init_scale=self.fixed_scale or args.init_loss_scale,
                                           enabled=args.fp16)

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
            self.scaler.update(self.fixed_scale)

    def state(self) -> dict:
        """The loss scale and what makes it change, in plain numbers; empty without loss scaling."""
        state = self.scaler.state_dict()
        return {key: state[key] for key in SCALE_KEYS if key in state}

    def restore(self, state: dict) -> None:
        """Go on with a dynamic loss scale; one that a flag fixes stays."""
        if self.scaler.is_enabled() and self.fixed_scale is None:
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
