"""How `blockell::mlp` is differentiated and cast, and the eager way past the dispatcher.

Legend: layer 1 maps in -> hidden features, layer 2 hidden -> out; h pre-activation and a = f(h),
both [N, hidden].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels import _mlp_core as core
from blockell_kernels._eager import watched
from blockell_kernels._mlp_core import flat, shaped
from blockell_kernels._mlp_ops import (
    ACTIVATION,
    ARGUMENTS,
    BACKEND,
    BIAS1,
    BIAS2,
    FIRST,
    PROBE1,
    PROBE2,
    RECOMPUTE,
    SECOND,
    VALUES1,
    VALUES2,
    X,
    layers_of,
    mlp_backward_op,
    mlp_op,
    run_backward,
)
from blockell_kernels._registration import (
    cast_positions,
    register_autocast,
    register_autograd,
    register_backward,
)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.weights = None
        with torch._C._AutoDispatchBelowAutograd():
            y, h, a = mlp_op(*args)
        _save(ctx, args, h, a)
        ctx.mark_non_differentiable(h, a)
        return y, h, a

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ARGUMENTS
        if dy is None:
            return tuple(grads)
        x, h, a, values1, cols1, bias1, order1, start1, values2, cols2, order2, start2 = (
            ctx.saved_tensors
        )
        held = [h, a]
        del h, a
        given: tuple[Any, ...] = (
            values1, cols1, bias1, order1, start1, *ctx.sizes1, values2, cols2,
            order2, start2, *ctx.sizes2, list(ctx.needs), *ctx.names,
        )  # fmt: skip
        if ctx.weights is None or torch.is_grad_enabled() or type(dy) is not Tensor or watched():
            results = mlp_backward_op(dy, x, *held, *given)
        else:
            last = not torch._C._autograd._get_current_graph_task_keep_graph()
            ctx.maybe_clear_saved_tensors()  # now `held` alone holds h and a, unless needed again
            results = run_backward(ctx.weights, last, dy, x, held, *given)
        positions = (X, VALUES1, BIAS1, PROBE1, VALUES2, BIAS2, PROBE2)
        for position, result in zip(positions, results, strict=True):
            collected = position not in (PROBE1, PROBE2) or result.numel()
            if ctx.needs_input_grad[position] and collected:
                grads[position] = result
        return tuple(grads)


class _EagerMLP(_MLP):
    """The same past the dispatcher, with dense weights shared by forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        x, keep_pre = args[X], args[RECOMPUTE] != "hidden"
        x2d = flat(x)
        layers = layers_of(args, x2d)
        y, a, h, ctx.weights = core.forward(x2d, *layers, args[ACTIVATION], keep_pre, True)
        _save(ctx, args, h, a)
        return shaped(y, x)


def _save(ctx: Any, args: tuple[Any, ...], h: Tensor | None, a: Tensor | None) -> None:
    """Save what the backward pass needs of the operands and of h and a, and no more."""
    need, recompute = ctx.needs_input_grad, args[RECOMPUTE]
    values1, cols1, bias1, _, order1, start1, row_group1, num_live1, sample1 = args[FIRST]
    values2, cols2, _, _, order2, start2, row_group2, num_live2, sample2 = args[SECOND]
    sample1 = sample1 if need[PROBE1] else "none"
    sample2 = sample2 if need[PROBE2] else "none"
    need_dh = need[X] or need[VALUES1] or need[BIAS1] or sample1 != "none"
    need_a = need[VALUES2] or sample2 != "none"
    again = recompute == "hidden" and (need_dh or need_a)
    has_a = recompute == "none"
    ctx.needs = tuple(need[i] for i in (X, VALUES1, BIAS1, VALUES2, BIAS2))
    ctx.sizes1 = (args[X].shape[-1] // values1.shape[-1], values1.shape[-1], row_group1, num_live1)
    ctx.sizes1 += (sample1,)
    ctx.sizes2 = (values2.shape[-1], row_group2, num_live2, sample2)
    ctx.names = (args[ACTIVATION], args[BACKEND])
    keep_h = recompute != "hidden" and (need_dh or (need_a and not has_a))
    ctx.save_for_backward(
        args[X] if need[VALUES1] or sample1 != "none" or again else None,
        h if keep_h else None,
        a if has_a and need_a else None,
        values1 if need[X] or again else None,
        cols1,
        bias1 if again else None,
        order1,
        start1,
        values2 if need_dh else None,
        cols2,
        order2,
        start2,
    )


def cast_arguments(args: tuple[Any, ...], device_type: str) -> tuple[Any, ...]:
    """The arguments of `mlp` as autocast wants them; the probes stay float32."""
    return cast_positions(args, device_type, (X, VALUES1, BIAS1, VALUES2, BIAS2))


register_autograd("mlp", mlp_op, _MLP)
register_backward("mlp_backward", mlp_backward_op, "block_ell_mlp")
register_autocast("mlp", mlp_op, cast_arguments)


def eager_mlp(*args: Any) -> Tensor:
    """y for the arguments of `mlp`, where nothing but autograd and autocast may want to see it."""
    device_type = "cuda" if args[X].is_cuda else args[X].device.type
    if torch.is_autocast_enabled(device_type):
        args = cast_arguments(args, device_type)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _EagerMLP.apply(*args)
    x = flat(args[X])
    y = core.forward(x, *layers_of(args, x), args[ACTIVATION], False, False)[0]
    return shaped(y, args[X])
