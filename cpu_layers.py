"""A layer of BERT, and the masked-LM loss, for training in fp32 on CPUs: matrix products of torch, and cpu_kernels.cpp
for everything between them.

The same numbers as the modules of modeling.py, whose parameters they take, but: biases, dropout, residual and LayerNorm
are one pass over memory, gradients that meet are added by the matrix product that makes the second one, dropout draws
no random numbers and keeps no mask, and no copy is made for the layout of the heads beside the one that adds the bias.

Legend as in modeling.py, T = B·S.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import cpu_kernels

ACTIVATION = "gelu"  # the one that the kernels know


def reason_against(args, device, config) -> str | None:
    """Why a run does not compute its layers here, or None."""
    if device.kind != "cpu":
        return f"the kernels are for CPUs, not {device.kind}"
    if args.hmp:
        return "the kernels compute in fp32 only"
    if not args.use_cpu_kernels:
        return "--use_cpu_kernels False"
    if args.use_torch_compile:
        return "--use_torch_compile, in place of the kernels for this CPU, which are faster"
    if config.hidden_act != ACTIVATION:
        return f"no kernel for {config.hidden_act}"
    return cpu_kernels.problem()


def layer(modules, hidden, sequence):
    """What modeling.Layer computes.  hidden (B, S, D), sequence (B, S): the number of each token's sequence."""
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


def mean_cross_entropy(hidden, weight, bias, labels):
    """Cross entropy of the scores hidden·weightᵀ + bias, averaged over the labels that are not negative (none: 0).

    hidden (…, D), weight (V, D), bias (V), labels (…).  Scores become their own gradient while the cache holds them.
    """
    return CrossEntropyFunction.apply(hidden.flatten(0, -2), weight, bias, labels.flatten())


class LayerFunction(Function):
    """The layer as one step of autograd.  The order of the parameters is that of `layer`."""

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
        ctx.save_for_backward(x, *attention, context, total1, statistics1, between, preactivation, activated, total2,
                              statistics2, *parameters)
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, qkv, weights, dropped, context, total1, statistics1, between, preactivation, activated, total2, statistics2,
         *parameters) = ctx.saved_tensors
        _, _, dropout = ctx.settings
        projections, first, second, inner = parameters[:6], parameters[6:10], parameters[10:14], parameters[14:]
        gradient = gradient.contiguous().view(x.shape)

        d_activated, d_between, d_second = residual_norm_backward(gradient, total2, statistics2, activated, second,
                                                                  dropout[2], ctx.seeds[2])
        d_inner = dense_gelu_backward(d_activated, preactivation, between, inner, into=d_between)
        d_context, d_x, d_first = residual_norm_backward(d_between, total1, statistics1, context, first, dropout[1],
                                                         ctx.seeds[1])
        d_projections = attend_backward(d_context, (qkv, weights, dropped), x, projections, into=d_x)
        shape = (qkv.shape[1], qkv.shape[3], -1)
        return d_x.view(shape), None, None, *d_projections, *d_first, *d_second, *d_inner


def attend(x, sequence, projections, heads: int, dropout: float, seed: int):
    """x (T, D) → the context (T, D), and what the way back needs: heads, weights before and after dropout."""
    rows, length = sequence.shape
    width = x.shape[1]
    kernels = cpu_kernels.load()
    products = x.new_empty(3, *x.shape)
    for product, weight in zip(products, projections[::2], strict=True):
        torch.mm(x, weight.t(), out=product)
    qkv = x.new_empty(3, rows, heads, length, width // heads)
    kernels.split_heads(products, torch.cat(projections[1::2]), qkv, *qkv.shape[1:2], length, heads, qkv.shape[-1])
    query, key, value = qkv.flatten(1, 2)  # (B·N, S, H)
    weights = query @ key.transpose(1, 2)  # (B·N, S, S)
    dropped = torch.empty_like(weights) if dropout else weights
    kernels.attention_weights(weights, dropped, sequence, rows, heads, length, qkv.shape[-1] ** -0.5, dropout, seed)
    context = (dropped @ value).view(qkv.shape[1:]).transpose(1, 2).reshape(x.shape)
    return context, (qkv, weights, dropped)


def attend_backward(gradient, saved, x, projections, into):
    """Gradient of the context (T, D) → those of the projections; that of x is added to `into`."""
    qkv, weights, dropped = saved
    _, rows, heads, length, size = qkv.shape
    kernels = cpu_kernels.load()
    gradient = gradient.view(rows, length, heads, size).transpose(1, 2).reshape(-1, length, size)  # (B·N, S, H)
    query, key, value = qkv.flatten(1, 2)
    d_qkv = torch.empty_like(qkv)
    d_query, d_key, d_value = d_qkv.flatten(1, 2)
    torch.bmm(dropped.transpose(1, 2), gradient, out=d_value)
    d_scores = gradient @ value.transpose(1, 2)
    kernels.attention_weights_backward(d_scores, weights, dropped, d_scores.shape[0] * length, length, size ** -0.5)
    torch.bmm(d_scores, key, out=d_query)
    torch.bmm(d_scores.transpose(1, 2), query, out=d_key)
    d_products, d_biases = x.new_empty(3, *x.shape), x.new_empty(3, x.shape[1])
    kernels.split_heads_backward(d_qkv, d_products, d_biases, rows, length, heads, size)
    gradients = []
    for d_product, d_bias, weight in zip(d_products, d_biases, projections[::2], strict=True):
        into.addmm_(d_product, weight)
        gradients += [d_product.t() @ x, d_bias]
    return gradients


def residual_norm(x, residual, parameters, eps: float, dropout: float, seed: int):
    """LayerNorm(residual + dropout(dense(x))); the sum in it, and mean and 1/deviation of the rows of that."""
    weight, bias, norm_weight, norm_bias = parameters
    total = x @ weight.t()
    out, statistics = torch.empty_like(total), total.new_empty(len(total), 2)
    cpu_kernels.load().residual_norm(total, bias, residual, norm_weight, norm_bias, out, statistics, *total.shape, eps,
                                     dropout, seed)
    return out, total, statistics


def residual_norm_backward(gradient, total, statistics, x, parameters, dropout: float, seed: int):
    """Gradients of x, of the residual, and of the parameters."""
    weight, _, norm_weight, _ = parameters
    d_residual, d_product = torch.empty_like(total), torch.empty_like(total)
    sums = total.new_empty(3, total.shape[1])
    cpu_kernels.load().residual_norm_backward(gradient, total, statistics, norm_weight, d_residual, d_product, sums,
                                              *total.shape, dropout, seed)
    d_norm_weight, d_norm_bias, d_bias = sums
    return d_product @ weight, d_residual, (d_product.t() @ x, d_bias, d_norm_weight, d_norm_bias)


def dense_gelu(x, parameters):
    """GELU(dense(x)), and dense(x)."""
    weight, bias = parameters
    inner = x @ weight.t()
    out = torch.empty_like(inner)
    cpu_kernels.load().bias_gelu(inner, bias, out, *inner.shape)
    return out, inner


def dense_gelu_backward(gradient, inner, x, parameters, into):
    """Gradients of the parameters; that of x is added to `into`, and `gradient` is overwritten."""
    weight, bias = parameters
    d_bias = torch.empty_like(bias)
    cpu_kernels.load().bias_gelu_backward(gradient, inner, d_bias, *inner.shape)
    into.addmm_(gradient, weight)
    return gradient.t() @ x, d_bias


class CrossEntropyFunction(Function):
    """hidden (T, D), weight (V, D), bias (V), labels (T) → the mean loss; its gradients are made on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        scores = hidden @ weight.t()
        losses, d_bias = scores.new_empty(len(scores)), torch.empty_like(bias)
        share = 1.0 / max(1, int((labels >= 0).sum()))
        cpu_kernels.load().cross_entropy(scores, bias, labels.contiguous(), losses, d_bias, *scores.shape, share)
        ctx.save_for_backward(hidden, weight, scores, d_bias)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, d_scores, d_bias = ctx.saved_tensors
        d_weight = d_scores.t() @ (hidden * gradient)
        return (d_scores @ weight).mul_(gradient), d_weight, d_bias * gradient, None
