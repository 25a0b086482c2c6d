"""Embeddings, layers and masked-LM loss of BERT for training in fp32 on CPUs, in the kernels of csrc/layers.cpp.

They compute what the modules of modeling.py do, with those modules' parameters, faster: an operation after a matmul is
done while the cache holds the matmul's rows; a matmul adds its result to a gradient that is there; attention reads the
heads in place, and only the tokens of a query's own sequence; dropout hashes the element's index, so it stores no mask;
and results reuse the memory of the step before.

Legend as in modeling.py, T = B·S.
"""

from dataclasses import fields

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops import cpu_kernels
from ops.memory_pool import pool

# What the kernels follow of BertConfig: fields of any value, and fields of certain values.  A config with another field
# is refused, so that the kernels, the default on CPUs, never compute another model than the config describes.
FREE_FIELDS = frozenset({
    "attention_probs_dropout_prob", "hidden_dropout_prob", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "type_vocab_size", "vocab_size"})
SUPPORTED_VALUES = {"hidden_act": {"gelu"}}
MIN_LANES = 8  # of a vector, as in AVX2: with fewer, PyTorch's matmul is faster than the kernels'


def unsupported_reason(config) -> str | None:
    """What the kernels do not compute of a BertConfig, or None."""
    unknown = sorted({field.name for field in fields(config)} - FREE_FIELDS - SUPPORTED_VALUES.keys())
    if unknown:
        return f"no kernel for {', '.join(unknown)}"
    for name, supported in SUPPORTED_VALUES.items():
        if getattr(config, name) not in supported:
            return f"no kernel for {getattr(config, name)}"
    return None


def too_slow_reason() -> str | None:
    """Why the kernels would be slower than PyTorch's operations on this machine, or None.

    It is not measured, so that a run that is repeated makes the same choice, whatever else the machine does.
    """
    lanes = cpu_kernels.load().lanes
    if lanes < MIN_LANES:
        return f"PyTorch's matrix products are faster than the kernels' where a vector holds {lanes} numbers"
    return None


def layer(modules, hidden, sequence):
    """modeling.Layer.  hidden (B, S, D), sequence (B, S): the number of each token's sequence → (B, S, D)."""
    projections = modules.attention.self
    parameters = [parameter for linear in (projections.query, projections.key, projections.value)
                  for parameter in (linear.weight, linear.bias)]
    for output in (modules.attention.output, modules.output):
        parameters += [output.dense.weight, output.dense.bias, output.LayerNorm.weight, output.LayerNorm.bias]
    parameters += [modules.intermediate.dense_act.weight, modules.intermediate.dense_act.bias]
    dropout = [projections.dropout_prob, modules.attention.output.dropout.p, modules.output.dropout.p]
    dropout = dropout if modules.training else [0.0] * 3
    settings = (projections.heads, modules.output.LayerNorm.eps, dropout)
    return LayerFunction.apply(hidden.contiguous(), sequence.int().contiguous(), settings, *parameters)


def embed(modules, input_ids, segment_ids, positions):
    """modeling.Embeddings.  All inputs (B, S), integers → (B, S, D).  IndexError where one is out of its table."""
    tables = [modules.word_embeddings.weight, modules.position_embeddings.weight, modules.token_type_embeddings.weight]
    indices = [index.int().contiguous() for index in (input_ids, positions, segment_ids)]
    for index, table in zip(indices, tables, strict=True):
        lowest, highest = index.aminmax()
        if lowest < 0 or highest >= len(table):
            raise IndexError(f"{lowest} to {highest}: out of the range of a table of {len(table)} embeddings")
    settings = (modules.LayerNorm.eps, modules.dropout.p if modules.training else 0.0)
    return EmbedFunction.apply(*indices, settings, *tables, modules.LayerNorm.weight, modules.LayerNorm.bias)


def dropout(x, p: float):
    """Dropout of a tensor in fp32 or bf16; PyTorch's draws its random numbers one after the other."""
    return DropoutFunction.apply(x, p) if p > 0.0 else x


def kernel_cross_entropy(hidden, weight, bias, labels):
    """Cross entropy of the logits hidden·weightᵀ + bias, averaged over the labels that are not negative (none: 0).

    hidden (T, D), weight (V, D), bias (V), labels (T).  The gradient overwrites the logits while the cache holds them.
    """
    return CrossEntropyFunction.apply(hidden, weight, bias, labels)


class LayerFunction(Function):
    """The layer as one node of autograd.  `layer` gives the order of the parameters."""

    @staticmethod
    def forward(ctx, hidden, sequence, settings, *parameters):
        heads, eps, dropout = settings
        seeds = torch.randint(2**63 - 1, (3,)).tolist()
        x = hidden.view(-1, hidden.shape[-1])
        projections, first, second, inner = parameters[:6], parameters[6:10], parameters[10:14], parameters[14:]
        context, attention = attend(x, sequence, projections, heads, dropout[0], seeds[0])
        between, total1, statistics1 = residual_norm(context, x, first, eps, dropout[1], seeds[1])
        activated, preactivation = dense_gelu(between, inner)
        out, total2, statistics2 = residual_norm(activated, between, second, eps, dropout[2], seeds[2])
        ctx.settings, ctx.seeds = settings, seeds
        ctx.save_for_backward(x, sequence, *attention, context, total1, statistics1, between, preactivation, activated,
                              total2, statistics2, *parameters)
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, sequence, qkv, weights, context, total1, statistics1, between, preactivation, activated, total2,
         statistics2, *parameters) = ctx.saved_tensors
        _, _, dropout = ctx.settings
        projections, first, second, inner = parameters[:6], parameters[6:10], parameters[10:14], parameters[14:]
        gradient = gradient.contiguous().view(x.shape)

        products = Products()
        d_dense, d_between, d_second = residual_norm_backward(gradient, total2, statistics2, activated, second,
                                                              dropout[2], ctx.seeds[2], products)
        d_inner = dense_gelu_backward(d_dense, second[0], preactivation, between, inner, d_between, products)
        products.compute()
        products = Products()
        d_dense, d_x, d_first = residual_norm_backward(d_between, total1, statistics1, context, first, dropout[1],
                                                       ctx.seeds[1], products)
        d_context = products.add(d_dense, first[0])
        products.compute()
        d_projections = attend_backward(d_context, (qkv, weights, sequence), x, projections, dropout[0], ctx.seeds[0],
                                        into=d_x)
        return d_x.view(*sequence.shape, -1), None, None, *d_projections, *d_first, *d_second, *d_inner


def matmul(a, b, bias=None, into=None):
    """a (M, K) · b (K, N) + bias (N), or `into` += a · b.  Both matrices may be transposed views."""
    products = Products()
    out = products.add(a, b, bias, into)
    products.compute()
    return out


class Products:
    """Products of matrices that do not depend on each other, computed together: threads wait for each other once."""

    def __init__(self):
        self.fields, self.tensors = [], []

    def add(self, a, b, bias=None, into=None):
        """The tensor that will be a (M, K) · b (K, N) + bias (N), or `into` += a · b, as in matmul."""
        out = pool.empty(len(a), b.shape[1]) if into is None else into
        self.tensors += [a, b, bias, out]  # kept until compute()
        for dense in (out,) if bias is None else (out, bias):
            assert dense.is_contiguous() and dense.dtype == torch.float32, (dense.shape, dense.dtype)
        self.fields += [*strided(a), *strided(b), 0 if bias is None else bias.data_ptr(), out.data_ptr(), *out.shape,
                        a.shape[1], into is not None]
        return out

    def compute(self) -> None:
        count = len(self.tensors) // 4
        cpu_kernels.load().gemms(torch.tensor(self.fields, dtype=torch.int64), count)


def strided(tensor) -> tuple[int, int, int]:
    """Address and strides of a matrix, as the kernels take it."""
    assert tensor.device.type == "cpu" and tensor.dtype == torch.float32, (tensor.device, tensor.dtype)
    return tensor.data_ptr(), *tensor.stride()


def attend(x, sequence, projections, heads: int, dropout: float, seed: int):
    """x (T, D) → the context (T, D), and for the backward pass qkv (T, 3·D) and weights before dropout (B, N, S, S)."""
    rows, length = sequence.shape
    qkv = matmul(x, torch.cat(projections[::2]).t(), torch.cat(projections[1::2]))  # (T, 3·D)
    weights, context = pool.empty(rows, heads, length, length), pool.empty(*x.shape)
    cpu_kernels.load().attention(qkv, sequence, weights, context, *weights.shape[:3], x.shape[1] // heads, dropout,
                                 seed)
    return context, (qkv, weights)


def attend_backward(gradient, saved, x, projections, dropout: float, seed: int, into):
    """Gradient of the context (T, D) → those of the projections' parameters; adds that of x to `into`."""
    qkv, weights, sequence = saved
    rows, heads, length, _ = weights.shape
    d_qkv, sums = pool.empty(*qkv.shape), x.new_empty(rows, qkv.shape[1])
    cpu_kernels.load().attention_backward(gradient, qkv, sequence, weights, d_qkv, sums, rows, heads, length,
                                          x.shape[1] // heads, dropout, seed)
    products = Products()
    products.add(d_qkv, torch.cat(projections[::2]), into=into)
    d_weights, d_biases = products.add(d_qkv.t(), x).chunk(3), sums.sum(0).chunk(3)
    products.compute()
    return [gradient for pair in zip(d_weights, d_biases, strict=True) for gradient in pair]


def residual_norm(x, residual, parameters, eps: float, dropout: float, seed: int):
    """LayerNorm(residual + dropout(dense(x))), the sum in it, and mean and 1/deviation of each of the sum's rows."""
    total, out, statistics = pool.empty(*residual.shape), pool.empty(*residual.shape), x.new_empty(len(x), 2)
    weight, bias, *norm = parameters
    cpu_kernels.load().dense_residual_norm(x, weight, bias, residual, *norm, total, out, statistics, *total.shape,
                                           x.shape[1], eps, dropout, seed)
    return out, total, statistics


def residual_norm_backward(gradient, total, statistics, x, parameters, dropout: float, seed: int, products: Products):
    """Gradients of dense(x), of the residual, and of the parameters, that of the weight among `products`."""
    d_residual, d_dense = pool.empty(*total.shape), pool.empty(*total.shape)
    sums = total.new_empty(3, total.shape[1])
    cpu_kernels.load().residual_norm_backward(gradient, total, statistics, parameters[2], d_residual, d_dense, sums,
                                              *total.shape, dropout, seed)
    d_norm_weight, d_norm_bias, d_bias = sums
    return d_dense, d_residual, (products.add(d_dense.t(), x), d_bias, d_norm_weight, d_norm_bias)


def dense_gelu(x, parameters):
    """GELU(dense(x)), and dense(x)."""
    weight, bias = parameters
    inner, out = pool.empty(len(x), len(weight)), pool.empty(len(x), len(weight))
    cpu_kernels.load().dense_gelu(x, weight, bias, inner, out, *inner.shape, x.shape[1])
    return out, inner


def dense_gelu_backward(gradient, next_weight, inner, x, parameters, into, products: Products):
    """Gradients of the parameters from that of GELU(dense(x)) · next_weightᵀ; adds that of x to `into`.

    The weight's and that of x are among `products`.
    """
    weight, bias = parameters
    d_inner, d_bias = pool.empty(*inner.shape), torch.empty_like(bias)
    cpu_kernels.load().gelu_backward(gradient, next_weight, inner, d_inner, d_bias, *inner.shape, gradient.shape[1])
    products.add(d_inner, weight, into=into)
    return products.add(d_inner.t(), x), d_bias


class DropoutFunction(Function):
    """x → dropout(x).  The backward pass computes the mask again."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.p, ctx.seed = p, torch.randint(2**63 - 1, ()).item()
        return dropped(x, p, ctx.seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return dropped(gradient, ctx.p, ctx.seed), None


def dropped(x, p: float, seed: int):
    x, kernels = x.contiguous(), cpu_kernels.load()
    out = torch.empty_like(x)
    if x.dtype == torch.bfloat16:
        kernels.dropout_bf16(x.view(torch.int16), out.view(torch.int16), x.numel(), p, seed)
    else:
        kernels.dropout_fp32(x, out, x.numel(), p, seed)
    return out


class EmbedFunction(Function):
    """ids, positions, segments (B, S), their tables (…, D), weight and bias of LayerNorm (D) → (B, S, D)."""

    @staticmethod
    def forward(ctx, ids, positions, segments, settings, *parameters):
        eps, dropout = settings
        seed = torch.randint(2**63 - 1, ()).item()
        tokens, width = ids.numel(), parameters[0].shape[1]
        total, out, statistics = pool.empty(tokens, width), pool.empty(tokens, width), torch.empty(tokens, 2)
        cpu_kernels.load().embed(ids, positions, segments, *parameters, total, out, statistics, tokens, width, eps,
                                 dropout, seed)
        ctx.dropout, ctx.seed = dropout, seed
        ctx.save_for_backward(ids, positions, segments, total, statistics, *parameters)
        return out.view(*ids.shape, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *indices, total, statistics, word_table, position_table, segment_table, norm_weight, _ = ctx.saved_tensors
        gradient = pool.empty(*total.shape).copy_(gradient.reshape(total.shape))  # the kernel overwrites it
        d_tables = [pool.empty(*table.shape).zero_() for table in (word_table, position_table, segment_table)]
        sums = total.new_empty(2, total.shape[1])
        cpu_kernels.load().embed_backward(gradient, *indices, total, statistics, norm_weight, *d_tables, sums,
                                          *total.shape, ctx.dropout, ctx.seed)
        return None, None, None, None, *d_tables, *sums


class CrossEntropyFunction(Function):
    """hidden (T, D), weight (V, D), bias (V), labels (T) → the mean loss.  The forward pass computes its gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        logits = matmul(hidden, weight.t())
        losses, d_bias = logits.new_empty(len(logits)), torch.empty_like(bias)
        share = 1.0 / max(1, int((labels >= 0).sum()))
        cpu_kernels.load().cross_entropy(logits, bias, labels.contiguous(), losses, d_bias, *logits.shape, share)
        ctx.save_for_backward(hidden, weight, logits, d_bias)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, d_logits, d_bias = ctx.saved_tensors
        products = Products()
        d_weight, d_hidden = products.add(d_logits.t(), hidden * gradient), products.add(d_logits, weight)
        products.compute()
        return d_hidden.mul_(gradient), d_weight, d_bias * gradient, None
