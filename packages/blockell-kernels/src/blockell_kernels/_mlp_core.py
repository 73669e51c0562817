"""What the fused MLP computes: y = f(x W1^T + b1) W2^T + b2 and its gradients, over plans.

Legend: N tokens; layer 1 maps in -> hidden features, layer 2 hidden -> out; h pre-activation and
a = f(h), both [N, hidden]; R, C, B, K of each layer as always.

Where a layer runs on the block-sparse GPU kernels, the activation rides on them: f in the epilogue
of the first product, f' in that of fc2's input gradient, which also computes a again, and the
gradient of b1, while h is at hand. Elsewhere the activation is a pass of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blockell_kernels._activation import activate, gradient_and_activation, sum_over_tokens
from blockell_kernels._backends import Pattern
from blockell_kernels._gpu import gpu_mlp
from blockell_kernels._plan import Plan, branch, join

Recompute = Literal["none", "activation", "hidden"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "activation", "hidden")

Weights = list[Tensor | None]
"""At most one dense weight, emptied when it is used for the last time; see `Plan.backward`."""


class Layer(NamedTuple):
    """One of the two layers of a call."""

    plan: Plan
    pattern: Pattern
    values: Tensor | None
    """[R, slots, B, B]; None in a backward pass that does not need them."""
    bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    values1: bool
    bias1: bool
    values2: bool
    bias2: bool


def hidden(
    layer: Layer, x: Tensor, activation: str, keep_pre: bool, keep_weight: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(a, h, dense weight of layer 1) from x [N, in]; None for what is not to be kept."""
    plan, values, bias = layer.plan, layer.values, layer.bias
    assert values is not None
    if plan.forward_backend.name == "triton" and x.dtype is plan.dtype:
        kernels = gpu_mlp()
        assert kernels is not None
        fused = kernels.forward_activated(x, values, bias, layer.pattern, activation, keep_pre)
        if fused is not None:
            return (*fused, None)
    h, weight = plan.forward(x, values, bias, layer.pattern, keep=keep_weight)
    a = activate(h, activation)
    return a, h if keep_pre else None, weight


def forward(
    x: Tensor, first: Layer, second: Layer, activation: str, keep_pre: bool, keep_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Weights, Weights]]:
    """(y [N, out], a, h or None, dense weights) from x [N, in]."""
    a, h, weight1 = hidden(first, x, activation, keep_pre, keep_weights)
    assert second.values is not None
    y, weight2 = second.plan.forward(
        a, second.values, second.bias, second.pattern, keep=keep_weights
    )
    return y, a, h, ([weight1], [weight2])


def backward(
    dy: Tensor,
    x: Tensor | None,
    held: list[Tensor | None],
    first: Layer,
    second: Layer,
    needs: Needs,
    samples: tuple[str, str],
    activation: str,
    weights: tuple[Weights, Weights] | None = None,
    last: bool = False,
) -> list[Tensor | None]:
    """[dx, dvalues1, dbias1, dprobe1, dvalues2, dbias2, dprobe2] of dy [..., out], x [..., in].

    None where not needed. `held` is [h, a], and is emptied, so that they are in memory no longer
    than needed; what is needed of them and was not saved is computed again. `last`: f(h), or else
    the gradient of h, may take the memory of h.
    """
    h, a = held
    held.clear()
    leading, dy, x = dy.shape[:-1], flat(dy).contiguous(), None if x is None else flat(x)
    weight1, weight2 = weights or (None, None)
    need_dh = needs.x or needs.values1 or needs.bias1 or samples[0] != "none"
    need_first = need_dh and (needs.x or needs.values1 or samples[0] != "none")
    need_a = needs.values2 or samples[1] != "none"
    if (need_dh and h is None) or (need_a and a is None and h is None):
        assert x is not None
        a, h, _ = hidden(first, x, activation, keep_pre=True)
        last = True
    forked = need_first and _forks(first, second)
    # Beside the gradients of layer 1, too? a is in memory longer then, while dx is: no more than h
    # and dh were before, if dx is no wider.
    long = forked and first.plan.C * first.plan.B <= first.plan.R * first.plan.B
    only2 = (False, needs.values2, False)
    again = need_a and a is None
    dvalues2 = dprobe2 = None
    with _beside(forked, dy):
        dbias2 = sum_over_tokens(dy) if needs.bias2 else None
        if forked and not again:
            _, dvalues2, _, dprobe2 = second.plan.backward(
                dy, a, None, second.pattern, only2, samples[1]
            )
    dh = sums = None
    if need_dh:
        assert h is not None
        if a is not None and a.data_ptr() == h.data_ptr():
            last = False  # no activation: f(h) is h, and still needed
        wants = {"keep_a": again, "need_bias": needs.bias1, "overwrite": last}
        dh, a_again, sums = _middle(dy, h, second, activation, weight2, **wants)
        a = a_again if again else a
    elif again:
        assert h is not None
        a = activate(h, activation)
    h = None
    # Not beside the rest: then the input gradient would start before the weight gradients do, and
    # a step took 3% longer (H200, 8192 tokens, 640 -> 2560, by `h200-mlp-orders.csv`).
    dbias1 = None if sums is None else sum_over_tokens(sums, dy.dtype)
    sums = None
    if forked and not long:
        join(dy.device)
    with _beside(long, dy):
        if again or not forked:
            _, dvalues2, _, dprobe2 = second.plan.backward(
                dy, a, None, second.pattern, only2, samples[1]
            )
    if not long:
        a = None
    dx = dvalues1 = dprobe1 = None
    if need_first:
        assert dh is not None
        only1 = (needs.x, needs.values1, False)
        dx, dvalues1, _, dprobe1 = first.plan.backward(
            dh, x, first.values, first.pattern, only1, samples[0], weight1
        )
    if long:  # only now may the memory of a and dy be used again
        join(dy.device)
    if dx is not None and len(leading) != 1:
        dx = dx.view(*leading, dx.shape[1])
    return [dx, dvalues1, dbias1, dprobe1, dvalues2, dbias2, dprobe2]


def _beside(forked: bool, dy: Tensor) -> AbstractContextManager[Any]:
    """What runs inside runs beside what follows, after what came before."""
    return torch.cuda.stream(branch(dy.device)) if forked else nullcontext()


def _forks(first: Layer, second: Layer) -> bool:
    """Whether the weight gradient of layer 2 is computed beside other gradients."""
    both = first.plan.forks and second.plan.forks
    return both and torch.cuda.is_current_stream_capturing()


def _middle(
    dy: Tensor,
    h: Tensor,
    second: Layer,
    activation: str,
    weight: Weights | None,
    *,
    keep_a: bool,
    need_bias: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dh, a, sums): the input gradient of layer 2, through the activation.

    The sums [any, hidden] add up to dbias1. `overwrite`: a, or else dh, may take the memory of h.
    """
    plan, values, pattern = second.plan, second.values, second.pattern
    assert values is not None
    by_triton = plan.grad_input_backend.name == "triton"
    kernels = gpu_mlp() if dy.dtype is plan.dtype and (by_triton or dy.is_cuda) else None
    if kernels is not None:
        kept = None if weight is None else weight[0]
        fused: tuple[Tensor, Tensor | None, Tensor | None] | None = kernels.middle(
            dy, values, kept, pattern, h, activation, sparse=by_triton and kept is None,
            dense=plan.requested == "auto", keep_a=keep_a, need_bias=need_bias, overwrite=overwrite,
        )  # fmt: skip
        if fused is not None:
            if weight is not None:
                weight[0] = None
            return fused
    da = plan.backward(dy, None, values, pattern, (True, False, False), "none", weight)[0]
    assert da is not None
    return gradient_and_activation(
        da, h, activation, recompute=keep_a, need_sum=need_bias, overwrite=overwrite
    )


def flat(t: Tensor) -> Tensor:
    """[..., n] -> [N, n]."""
    return t if t.ndim == 2 else t.reshape(t.numel() // t.shape[-1], t.shape[-1])


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """A fresh result [N, n] with the leading dimensions of x.

    Not by `view`: of a view made inside an autograd function autograd allows no change in place.
    """
    if x.ndim == 2 and not y._is_view():
        return y
    result: Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
    return result
