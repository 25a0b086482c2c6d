"""Is bf16 slower than fp32 on this CPU?  Without instructions for it, it is."""

import time
from contextlib import nullcontext
from dataclasses import replace

import torch

from modeling import KernelLayer, Layer
from ops.attention import ATTENTIONS, KERNELS, LayerRequest, choose

TOKENS = 1024  # at most: enough to compute as fast as in a training, too few to delay a run
REPEATS = 3


def bf16_warning(device, config, attention_name: str, request: LayerRequest, autocast) -> str | None:
    """A sentence where a layer takes longer in bf16, under `autocast()`, than in fp32 on this CPU; measured now."""
    if request.dtype != torch.bfloat16 or not device.runs_cpu_kernels:
        return None
    fp32_name, _ = choose(device, config, replace(request, dtype=torch.float32))
    rows = max(1, min(request.rows, TOKENS // request.length))
    with torch.random.fork_rng(devices=[]):
        bf16, fp32 = (layer_seconds(config, name, (rows, request.length), context)
                      for name, context in ((attention_name, autocast), (fp32_name, nullcontext)))
    if bf16 <= fp32:
        return None
    return (f"--hmp: on this CPU a layer takes {bf16 / fp32:.1f} times as long in bf16 as in fp32; without --hmp the "
            f"run is faster")


def layer_seconds(config, attention_name: str, shape: tuple[int, int], autocast) -> float:
    """Seconds of a layer, forward and backward, on rows and tokens (B, S): the least of the repeats."""
    layer = (KernelLayer if attention_name == KERNELS else Layer)(config, attention_name).train()
    hidden = torch.randn(*shape, config.hidden_size, requires_grad=True)
    mask = ATTENTIONS[attention_name].mask(torch.ones(shape, dtype=torch.int32), slots=1)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with autocast():
            out = layer(hidden, mask)
        out.float().sum().backward()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
