"""The precision of a run: fp32, bf16 by autocast (--hmp), or fp16 with loss scaling (--fp16).

Weights, gradients and the optimizer's state are fp32 in all of them; the optimizer step runs outside autocast.
"""

import torch

from cli import UserError


class Precision:
    """What a training step asks about precision: an autocast context, a backward pass, an optimizer step."""

    def __init__(self, args, device):
        if args.fp16 and device.kind != "cuda":
            raise UserError(f"--fp16 needs CUDA, but the device is {device.kind} (--hmp trains in bf16 on any device)")
        self.device = device
        self.enabled = args.hmp or args.fp16
        self.dtype = torch.float16 if args.fp16 else torch.bfloat16
        scale = args.loss_scale or args.init_loss_scale
        growth_interval = 2**31 - 1 if args.loss_scale else 2000  # a constant scale never grows
        self.scaler = torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=growth_interval, enabled=args.fp16)

    def describe(self) -> str:
        return str(self.dtype).removeprefix("torch.") + " autocast" if self.enabled else "float32"

    def autocast(self):
        return self.device.autocast(self.enabled, self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer) -> None:
        """The optimizer step; under loss scaling it is left out where a gradient overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()
