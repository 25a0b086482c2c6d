"""Attention within the sequences of a row, in several implementations, and the one place that chooses among them.

All compute softmax(q·kᵀ/√H)·v, in which a token sees the tokens of its own sequence, with dropout of the weights:

    plain    elementary operations, which every device has
    sdpa     PyTorch's fused kernels, with a mask of S × S scores a row
    varlen   the fused kernels for sequences of many lengths, which need only the places where sequences begin
    kernels  whole layers in kernels compiled for this CPU (cpu_layers.py)

Legend: B rows in the batch, S tokens in a row, N heads, H head size, C slots for sequences in a row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ops import cpu_layers

MASKED_SCORE = -10000.0  # finite, and exp() of it is 0 in fp32 and bf16; infinities become NaN under bf16 op lists
KERNELS = "kernels"
REPEATS = 5  # of a measurement, after one that sets things up
CLEARLY_FASTER = 0.9  # of the time of one preferred to it: a run that is repeated should choose alike
MOST_ERROR = 3.0  # of that of plain attention in the same type, against fp64


def plain_attention(query, key, value, mask, dropout_prob):
    """In elementary operations.  q, k, v: (B, N, S, H), mask (B, 1, S, S)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + mask  # (B, N, S, S)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout_prob, training=dropout_prob > 0.0)
    return weights @ value  # (B, N, S, H)


def sdpa_attention(query, key, value, mask, dropout_prob):
    """Through PyTorch's fused kernels.  q, k, v: (B, N, S, H), mask (B, 1, S, S)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), dropout_p=dropout_prob)


def varlen_attention(query, key, value, bounds, dropout_prob):
    """Through the kernels of nested tensors, without a mask.  q, k, v: (B, N, S, H), bounds (B·(2C+1) + 1)."""
    rows, heads, length, size = query.shape

    def nested(tensor):
        tokens = tensor.transpose(1, 2).reshape(rows * length, heads, size)
        # A shortest length of 0 would rule out the fused kernels, though they pass over empty pieces.
        return torch.nested.nested_tensor_from_jagged(tokens, bounds, min_seqlen=1, max_seqlen=length).transpose(1, 2)

    context = F.scaled_dot_product_attention(nested(query), nested(key), nested(value), dropout_p=dropout_prob)
    return context.transpose(1, 2).values().view(rows, length, heads, size).transpose(1, 2)  # (B, N, S, H)


def attention_mask(input_mask, slots: int):
    """Scores to add so that a token sees only its own sequence, by the numbers in input_mask.  (B, S) → (B, 1, S, S)"""
    same = input_mask[:, :, None] == input_mask[:, None, :]
    return ((1.0 - same.float()) * MASKED_SCORE)[:, None]


def sequence_bounds(input_mask, slots: int):
    """Where the sequences begin in the row of all B·S tokens, and B·S behind the last: (B·(2C+1) + 1), int64.

    Padding between and behind the C sequences of a row counts as sequences of its own; those left over are empty, so
    the shape depends on that of the batch alone, and nothing waits for the device.

        >>> sequence_bounds(torch.tensor([[1, 1, 0], [1, 1, 1]]), slots=1)
        tensor([0, 2, 3, 6, 6, 6, 6])
    """
    rows, length = input_mask.shape
    begins = F.pad(input_mask[:, 1:] != input_mask[:, :-1], (1, 0), value=True)  # (B, S)
    numbers = begins.flatten().long().cumsum(0) - 1  # of the piece that each token belongs to
    pieces = torch.arange(rows * (2 * slots + 1) + 1, device=input_mask.device)
    return torch.searchsorted(numbers, pieces)


def sequence_numbers(input_mask, slots: int):
    """The numbers themselves, as the kernels for CPUs take them.  (B, S)"""
    return input_mask.int()


@dataclass(frozen=True)
class Attention:
    """A way to compute attention, and what it makes of input_mask, once a batch, to know the sequences."""

    compute: Callable | None
    mask: Callable


ATTENTIONS = {"plain": Attention(plain_attention, attention_mask), "sdpa": Attention(sdpa_attention, attention_mask),
              "varlen": Attention(varlen_attention, sequence_bounds), KERNELS: Attention(None, sequence_numbers)}


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """What a run asks of its layers."""

    attention: str | None  # one of ATTENTIONS, where a flag names it
    use_cpu_kernels: bool
    compiled: bool  # by torch.compile
    dtype: torch.dtype  # of matrix products
    rows: int  # of a micro-batch
    length: int  # tokens in a row


def choose(device, config, request: LayerRequest) -> tuple[str, str]:
    """The name in ATTENTIONS of the attention that a run takes, and a description that gives the reason."""
    if request.attention:
        return request.attention, f"layers: PyTorch's operations, attention {request.attention} (--attention)"
    reason = reason_against_kernels(device, config, request)
    if reason is None:
        return KERNELS, "layers: kernels compiled for this CPU"
    name, found = fastest(device, config, request.rows, request.length, request.dtype)
    return name, f"layers: PyTorch's operations, attention {name} ({found or reason})"


def reason_against_kernels(device, config, request: LayerRequest) -> str | None:
    """Why a run does not compute its layers in the kernels for CPUs, or None."""
    if not device.runs_cpu_kernels:
        return f"the kernels are for CPUs, not {device.kind}"
    if request.dtype != torch.float32:
        return "the kernels compute in fp32 only"
    if not request.use_cpu_kernels:
        return "--use_cpu_kernels False"
    if request.compiled:
        return "--use_torch_compile, in place of the kernels for this CPU, which are faster"
    return cpu_layers.unsupported_reason(config) or cpu_layers.unavailable_reason()


def fastest(device, config, rows: int, length: int, dtype: torch.dtype) -> tuple[str, str]:
    """The first of device.attentions that is right and not clearly slower than a later one; what was found, in words.

    Where there is only one, nothing is measured and nothing said.
    """
    best, *others = device.attentions
    if not others:
        return best, ""
    measured = {name: measure(name, device, config, rows, length, dtype) for name in device.attentions}
    right = [name for name, found in measured.items() if isinstance(found, float)]
    best = right[0] if right else device.attentions[-1]
    for name in right:
        if measured[name] < CLEARLY_FASTER * measured[best]:
            best = name
    return best, "; ".join(f"{name} {1000 * found:.3f} ms a layer" if name in right else f"{name} {found}"
                           for name, found in measured.items())


def measure(name: str, device, config, rows: int, length: int, dtype: torch.dtype) -> float | str:
    """Seconds of attention forward and backward in one layer, or what is wrong with it."""
    try:
        with device.autocast(dtype, enabled=dtype != torch.float32):
            error, plain_error = (error_of(kind, device, config, length, dtype) for kind in (name, "plain"))
            if not error <= MOST_ERROR * plain_error:
                return f"is off by {error:.1e}, plain attention by {plain_error:.1e}"
            inputs = random_inputs(device, config, rows, length, dtype)
            return min(seconds(name, inputs, config.attention_probs_dropout_prob, device) for _ in range(REPEATS + 1))
    except Exception as error:  # whatever a kernel that is not there happens to raise
        return f"fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def random_inputs(device, config, rows: int, length: int, dtype: torch.dtype) -> tuple:
    """Query, key and value, and an input_mask of rows that hold two sequences, the longer one first, and padding."""
    heads = config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, rows, length, heads, config.hidden_size // heads, generator=generator)
    query, key, value = (tensor.to(device.torch_device, dtype).transpose(1, 2).requires_grad_() for tensor in values)
    places = torch.arange(length) / length
    numbers = (places < 0.9).int() + ((places >= 0.6) & (places < 0.9)).int()
    return query, key, value, numbers.expand(rows, -1).contiguous().to(device.torch_device)


def run(name: str, inputs: tuple, dropout_prob: float) -> tuple[torch.Tensor, ...]:
    """What attention gives, and the gradients of the sum of its squares."""
    *tensors, numbers = inputs
    kind = ATTENTIONS[name]
    context = kind.compute(*tensors, kind.mask(numbers, slots=2), dropout_prob)
    return context, *torch.autograd.grad(context.float().square().sum(), tensors)


def error_of(name: str, device, config, length: int, dtype: torch.dtype) -> float:
    """The largest relative error, of the result or of a gradient, against plain attention in fp64 (without dropout)."""
    inputs = random_inputs(device, config, 2, length, dtype)
    found = run(name, inputs, 0.0)
    with device.autocast(dtype, enabled=False):
        right = run("plain", (*(tensor.detach().double().requires_grad_() for tensor in inputs[:3]), inputs[3]), 0.0)
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, right, strict=True))


def seconds(name: str, inputs: tuple, dropout_prob: float, device) -> float:
    device.synchronize()
    began = time.perf_counter()
    run(name, inputs, dropout_prob)
    device.synchronize()
    return time.perf_counter() - began
