"""Attention within the sequences of a row: its implementations, and the choice among them.

All compute softmax(q·kᵀ/√H)·v, where a token attends to the tokens of its own sequence, with dropout of the weights:

    plain    elementary operations, which every device has
    hashed   the same, with dropout in a kernel compiled for this CPU, in all of the layer
    sdpa     PyTorch's fused kernels, with a mask of S × S scores per row
    varlen   PyTorch's fused kernels for sequences of different lengths, which take the sequences' bounds, not a mask
    kernels  whole layers in kernels compiled for this CPU (cpu_layers.py)

Legend: B rows in the batch, S tokens in a row, N heads, H head size, C slots for sequences in a row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ops import cpu_kernels, cpu_layers

MASKED_SCORE = -10000.0  # finite, and exp() of it is 0 in fp32 and bf16; infinities become NaN under bf16 op lists
KERNELS, HASHED = "kernels", "hashed"
REPEATS = 5  # of a measurement, after one that warms up
CLEARLY_FASTER = 0.9  # of the preferred one's time: a run that is repeated should make the same choice
MAX_ERROR = 3.0  # times that of plain attention in the same type; both against fp64


def plain_attention(query, key, value, mask, dropout_prob):
    """query, key, value (B, N, S, H), mask (B, 1, S, S) → (B, N, S, H)."""
    return F.dropout(attention_weights(query, key, mask), dropout_prob, training=dropout_prob > 0.0) @ value


def hashed_attention(query, key, value, mask, dropout_prob):
    """query, key, value (B, N, S, H), mask (B, 1, S, S) → (B, N, S, H)."""
    return cpu_layers.dropout(attention_weights(query, key, mask), dropout_prob) @ value


def attention_weights(query, key, mask):
    """query, key (B, N, S, H), mask (B, 1, S, S) → (B, N, S, S)."""
    return F.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + mask, dim=-1)


def sdpa_attention(query, key, value, mask, dropout_prob):
    """query, key, value (B, N, S, H), mask (B, 1, S, S) → (B, N, S, H)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), dropout_p=dropout_prob)


def varlen_attention(query, key, value, bounds, dropout_prob):
    """Through nested tensors.  query, key, value (B, N, S, H), bounds (B·(2C+1) + 1) → (B, N, S, H)."""
    rows, heads, length, size = query.shape

    def nested(tensor):
        tokens = tensor.transpose(1, 2).reshape(rows * length, heads, size)
        # PyTorch rules out the fused kernels where min_seqlen is 0, though they can skip empty sequences.
        return torch.nested.nested_tensor_from_jagged(tokens, bounds, min_seqlen=1, max_seqlen=length).transpose(1, 2)

    context = F.scaled_dot_product_attention(nested(query), nested(key), nested(value), dropout_p=dropout_prob)
    return context.transpose(1, 2).values().view(rows, length, heads, size).transpose(1, 2)  # (B, N, S, H)


def attention_mask(input_mask, slots: int):
    """What to add to the scores so that a token attends to its own sequence only.  (B, S) → (B, 1, S, S)"""
    same = input_mask[:, :, None] == input_mask[:, None, :]
    return ((1.0 - same.float()) * MASKED_SCORE)[:, None]


def sequence_bounds(input_mask, slots: int):
    """The offsets at which sequences begin among all B·S tokens, then B·S: (B·(2C+1) + 1), int64.

    Padding between and after the C sequences of a row counts as sequences too.  Sequences that a row does not use are
    empty, so that the shape depends on the batch's shape only, and the host does not wait for the device.

        >>> sequence_bounds(torch.tensor([[1, 1, 0], [1, 1, 1]]), slots=1)
        tensor([0, 2, 3, 6, 6, 6, 6])
    """
    rows, length = input_mask.shape
    begins = F.pad(input_mask[:, 1:] != input_mask[:, :-1], (1, 0), value=True)  # (B, S)
    numbers = begins.flatten().long().cumsum(0) - 1  # of each token's sequence
    sequences = torch.arange(rows * (2 * slots + 1) + 1, device=input_mask.device)
    return torch.searchsorted(numbers, sequences)


@dataclass(frozen=True)
class AttentionImplementation:
    """`compute` (None: within a layer's kernels), and `mask`, which makes its fourth argument of input_mask."""

    compute: Callable | None
    mask: Callable  # once per batch


ATTENTIONS = {"plain": AttentionImplementation(plain_attention, attention_mask),
              HASHED: AttentionImplementation(hashed_attention, attention_mask),
              "sdpa": AttentionImplementation(sdpa_attention, attention_mask),
              "varlen": AttentionImplementation(varlen_attention, sequence_bounds),
              KERNELS: AttentionImplementation(None, lambda input_mask, slots: input_mask)}


@dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """What a run asks of its layers."""

    attention: str | None  # one of ATTENTIONS, where a flag names it
    use_cpu_kernels: bool
    compiled: bool  # by torch.compile
    dtype: torch.dtype  # of matrix products
    rows: int  # of a micro-batch
    length: int  # tokens in a row
    op_lists: bool = False  # which name PyTorch's operations


def choose(device, config, request: LayerRequest) -> tuple[str, str]:
    """The name in ATTENTIONS of the attention that a run takes, and a description that gives the reason."""
    if request.attention:
        return request.attention, f"layers: PyTorch's operations, attention {request.attention} (--attention)"
    reason = reason_against_kernels(device, config, request)
    if reason is None and request.dtype == torch.float32:
        return KERNELS, "layers: kernels compiled for this CPU"
    if reason is None:
        return HASHED, "layers: PyTorch's operations, dropout in a kernel compiled for this CPU"
    name, found = fastest(device, config, request.rows, request.length, request.dtype)
    return name, f"layers: PyTorch's operations, attention {name} ({found or reason})"


def reason_against_kernels(device, config, request: LayerRequest) -> str | None:
    """Why a run does not compute its layers in the kernels for CPUs, or None."""
    if not device.runs_cpu_kernels:
        return f"the kernels are for CPUs, not {device.torch_device.type}"
    if request.dtype != torch.float32 and request.op_lists:
        return "op lists name PyTorch's operations"
    if not request.use_cpu_kernels:
        return "--use_cpu_kernels False"
    if request.compiled:
        return "--use_torch_compile, in place of the kernels for this CPU, which are faster"
    if request.dtype != torch.float32:
        return cpu_kernels.unavailable_reason()
    return cpu_layers.unsupported_reason(config) or cpu_kernels.unavailable_reason() or cpu_layers.too_slow_reason()


def fastest(device, config, rows: int, length: int, dtype: torch.dtype) -> tuple[str, str]:
    """The first of device.attentions that is correct and not clearly slower than a later one, and the measurements.

    A device with only one of them is not measured, and the description is empty.
    """
    best, *others = device.attentions
    if not others:
        return best, ""
    measured = {name: measure(name, device, config, rows, length, dtype) for name in device.attentions}
    correct = [name for name, found in measured.items() if isinstance(found, float)]
    best = correct[0] if correct else device.attentions[-1]
    for name in correct:
        if measured[name] < CLEARLY_FASTER * measured[best]:
            best = name
    return best, "; ".join(f"{name} {1000 * found:.3f} ms a layer" if name in correct else f"{name} {found}"
                           for name, found in measured.items())


def measure(name: str, device, config, rows: int, length: int, dtype: torch.dtype) -> float | str:
    """Seconds of attention forward and backward in one layer, or what is wrong with it."""
    try:
        with device.autocast(dtype, enabled=dtype != torch.float32):
            error, plain_error = (error_of(tried, device, config, length, dtype) for tried in (name, "plain"))
            if not error <= MAX_ERROR * plain_error:
                return f"is off by {error:.1e}, plain attention by {plain_error:.1e}"
            inputs = random_inputs(device, config, rows, length, dtype)
            return min(seconds(name, inputs, config.attention_probs_dropout_prob, device) for _ in range(REPEATS + 1))
    except Exception as error:  # a missing kernel raises any of many types
        return f"fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def random_inputs(device, config, rows: int, length: int, dtype: torch.dtype) -> tuple:
    """Query, key and value (B, N, S, H), and an input_mask (B, S): two sequences in each row, then padding."""
    heads = config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, rows, length, heads, config.hidden_size // heads, generator=generator)
    query, key, value = (tensor.to(device.torch_device, dtype).transpose(1, 2).requires_grad_() for tensor in values)
    offsets = torch.arange(length) / length
    numbers = (offsets < 0.9).int() + ((offsets >= 0.6) & (offsets < 0.9)).int()
    return query, key, value, numbers.expand(rows, -1).contiguous().to(device.torch_device)


def forward_backward(name: str, inputs: tuple, dropout_prob: float) -> tuple[torch.Tensor, ...]:
    """The result of an attention, and the gradients of the sum of its squares."""
    *tensors, numbers = inputs
    implementation = ATTENTIONS[name]
    context = implementation.compute(*tensors, implementation.mask(numbers, slots=2), dropout_prob)
    return context, *torch.autograd.grad(context.float().square().sum(), tensors)


def error_of(name: str, device, config, length: int, dtype: torch.dtype) -> float:
    """The largest relative error, of the result or of a gradient, against plain attention in fp64 (without dropout)."""
    inputs = random_inputs(device, config, 2, length, dtype)
    found = forward_backward(name, inputs, 0.0)
    exact_inputs = (*(tensor.detach().double().requires_grad_() for tensor in inputs[:3]), inputs[3])
    with device.autocast(dtype, enabled=False):
        exact = forward_backward("plain", exact_inputs, 0.0)
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True))


def seconds(name: str, inputs: tuple, dropout_prob: float, device) -> float:
    device.synchronize()
    began = time.perf_counter()
    forward_backward(name, inputs, dropout_prob)
    device.synchronize()
    return time.perf_counter() - began
