"""The precision of a run: fp32, bf16 (--hmp), or fp16 with loss scaling (--fp16).

Weights, gradients and optimizer state are fp32 in all of them; the losses and the optimizer step are computed in fp32.
bf16 is done in one of four ways, the first that applies:

    Gaudi software with hmp (up to 1.12)   HmpCasts: hmp.convert with the list files
    other Gaudi software                   Autocast, with the op lists that gaudi_environment.py set before torch
    op lists given, or a lazy device       OpListCasts: the rules of hmp as a mode of PyTorch
    else                                   Autocast, with the device's own choice of ops
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from devices import op_lists
from devices.device import Device
from devices.op_lists import OpLists
from devices.options import PrecisionOptions

SCALE_KEYS = ("scale", "_growth_tracker")  # of GradScaler.state_dict


@dataclass(frozen=True)
class Casts:
    """How ops cast their inputs.  In this class, for fp32, they do not."""

    description: str

    def on(self):
        """A block in which ops cast."""
        return nullcontext()

    def off(self):
        """A block, also within one of on(), in which they do not."""
        return nullcontext()


@dataclass(frozen=True)
class Autocast(Casts):
    device: Device
    dtype: torch.dtype

    def on(self):
        return self.device.autocast(self.dtype)

    def off(self):
        return self.device.autocast(self.dtype, enabled=False)


@dataclass(frozen=True)
class OpListCasts(Casts):
    mode: TorchFunctionMode  # an OpListMode

    def on(self):
        return self.mode

    def off(self):
        return self.mode.off()


@dataclass(frozen=True)
class HmpCasts(Casts):
    """hmp.convert has made the whole process cast."""

    hmp: ModuleType

    def off(self):
        return self.hmp.disable_casts()


class Precision:
    """The casts and the loss scaling of a training step.

    `dtype` is the type of matrix products.  The forward pass runs in autocast(); what must be computed in fp32 whatever
    the op lists contain runs in casts_off().
    """

    def __init__(self, options: PrecisionOptions, device: Device):
        if options.fp16 and not device.supports_fp16:
            raise UserError(f"--fp16 needs CUDA, but the device is {device.torch_device.type} "
                            f"(--hmp trains in bf16 on any device)")
        self.dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
        self.casts = choose_casts(options, device)
        self.report = dtype_report() if options.bf16 and options.verbose and not device.hmp else nullcontext()
        self.fixed_scale = options.loss_scale or None
        self.scaler = torch.amp.GradScaler(device.torch_device.type, enabled=options.fp16,
                                           init_scale=self.fixed_scale or options.init_loss_scale)

    def describe(self) -> str:
        return self.casts.description

    @property
    def by_op_lists(self) -> bool:
        return isinstance(self.casts, OpListCasts)

    @contextmanager
    def autocast(self):
        with self.report, self.casts.on():  # the mode entered last sees an op first
            yield

    def casts_off(self):
        return self.casts.off()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer) -> None:
        """The optimizer step; under loss scaling it is skipped where a gradient overflowed."""
        with self.casts_off():
            self.scaler.step(optimizer)
            self.scaler.update(self.fixed_scale)

    def state_dict(self) -> dict:
        """The loss scale and its growth counter as plain numbers; empty without loss scaling."""
        state = self.scaler.state_dict()
        return {key: state[key] for key in SCALE_KEYS if key in state}

    def load_state_dict(self, state: dict) -> None:
        """Restore a dynamic loss scale; a scale fixed by --loss_scale stays."""
        if self.scaler.is_enabled() and self.fixed_scale is None:
            known = {key: state[key] for key in SCALE_KEYS if isinstance(state.get(key), int | float)}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **known})


def dtype_report() -> TorchFunctionMode:
    from devices.op_list_mode import DtypeReport  # here and below, because it loads torch.compile, which takes 0.9 s

    return DtypeReport()


def choose_casts(options: PrecisionOptions, device: Device) -> Casts:
    """The casts by the options and by what the device supports, as the top of this file lists them."""
    if options.fp16:
        return Autocast("float16 autocast", device, torch.float16)
    if not options.bf16:
        return Casts("float32")
    lists = op_lists.read_lists(options)
    if lists:
        from devices.op_list_mode import check_op_names

        check_op_names(lists, options)
    by_lists = f" by op lists: {len(lists.bf16)} ops in bf16, {len(lists.fp32)} in fp32" if lists else ""
    if device.hmp:
        device.hmp.convert(opt_level=options.opt_level, bf16_file_path=options.bf16_list,
                           fp32_file_path=options.fp32_list, isVerbose=options.verbose)
        return HmpCasts(f"bfloat16 hmp {options.opt_level}{by_lists}", device.hmp)
    if device.reads_op_lists or (device.has_autocast and not lists):
        return Autocast(f"bfloat16 autocast{by_lists}", device, torch.bfloat16)
    from devices.op_list_mode import OpListMode

    by_lists = by_lists or " by the default op lists of Gaudi's autocast"
    return OpListCasts(f"bfloat16{by_lists}", OpListMode(lists or OpLists(), device.mixed_layer_norm))
