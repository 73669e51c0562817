"""How `blockell::mlp` is differentiated and cast, and the eager way past the dispatcher.

Legend: layer 1 maps in -> hidden features, layer 2 hidden -> out; h pre-activation and a = f(h),
both [N, hidden].
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockell_kernels import _mlp_core as core
from blockell_kernels._backends import Pattern
from blockell_kernels._eager import watched
from blockell_kernels._gpu import gpu_replay
from blockell_kernels._mlp_core import Layer, flat, shaped
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
    Sizes,
    X,
    layers_of,
    mlp_backward_op,
    mlp_op,
)
from blockell_kernels._plan import Plan
from blockell_kernels._registration import (
    cast_positions,
    register_autocast,
    register_autograd,
    register_backward,
)

DIFFERENTIATED = (X, VALUES1, BIAS1, PROBE1, VALUES2, BIAS2, PROBE2)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            y, h, a = mlp_op(*args)
        need = ctx.needs_input_grad
        _save(ctx, args, Needed(*(need[i] for i in DIFFERENTIATED)), h, a)
        ctx.mark_non_differentiable(h, a)
        return y, h, a

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ARGUMENTS
        if dy is not None:
            found = _by_operator(ctx, dy, ctx.saved_tensors)
            for position, grad in zip(DIFFERENTIATED, found, strict=True):
                grads[position] = grad
        return tuple(grads)


class _EagerMLP(torch.autograd.Function):
    """The same past the dispatcher, with plans and dense weights shared by forward and backward.

    What is not differentiated comes as one argument: torch takes its time for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values1: Tensor,
        bias1: Tensor | None,
        probe1: Tensor | None,
        values2: Tensor,
        bias2: Tensor | None,
        probe2: Tensor | None,
        rest: tuple[tuple[Any, ...], Layer, Layer],
    ) -> Tensor:
        args, first, second = rest
        y, a, h, ctx.weights = _forward(
            flat(x), first, second, args[ACTIVATION], args[RECOMPUTE] != "hidden", True
        )
        ctx.plans = first.plan, second.plan
        _save(ctx, args, Needed(*ctx.needs_input_grad[:7]), h, a)
        return shaped(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or type(dy) is not Tensor or watched():
            return (*_by_operator(ctx, dy, saved), None)
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.maybe_clear_saved_tensors()  # now `operands` alone holds h and a, unless needed again
        operands = [dy, *saved]
        del saved
        plans, weights, activation = ctx.plans, ctx.weights, ctx.names[0]
        needs, samples = ctx.needs, (ctx.sizes1[-1], ctx.sizes2[-1])

        def run(operands: list[Tensor | None]) -> list[Tensor | None]:
            dy, x, h, a, values1, cols1, bias1, order1, start1, values2, *pattern2 = operands
            operands.clear()
            held = [h, a]
            del h, a
            assert dy is not None
            assert cols1 is not None
            assert pattern2[0] is not None
            first = Layer(plans[0], plans[0].pattern(cols1, order1, start1), values1, bias1)
            second = Layer(plans[1], plans[1].pattern(*pattern2), values2, None)
            return core.backward(
                dy, x, held, first, second, needs, samples, activation, weights, last
            )

        replay = _replay_for(dy, *plans)
        if replay is None or samples != ("none", "none"):
            grads = run(operands)
        else:
            grads = replay.call((*plans, needs, activation, last), operands, run)
        return (*grads, None)


def _replay_for(t: Tensor, plan1: Plan, plan2: Plan) -> ModuleType | None:
    """What runs a pass again that is nothing but launches, one after the other."""
    if not (plan1.sparse and plan2.sparse) or (replay := gpu_replay(t)) is None:
        return None
    beside = (plan1.forks or plan2.forks) and torch.cuda.is_current_stream_capturing()
    return None if beside else replay


def _forward(
    x: Tensor, first: Layer, second: Layer, activation: str, keep_pre: bool, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[core.Weights, core.Weights]]:
    """`core.forward`, but f(h) is kept for training alone."""
    replay = _replay_for(x, first.plan, second.plan)
    if replay is None:
        return core.forward(x, first, second, activation, keep_pre, training)

    def run(_: list[Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, a, h, _weights = core.forward(x, first, second, activation, keep_pre, training)
        return (y, a, h) if training else (y, None, None)

    pattern1, pattern2 = first.pattern, second.pattern
    operands = [
        *(x, first.values, first.bias, *_tensors(pattern1)),
        *(second.values, second.bias, *_tensors(pattern2)),
    ]
    kind = (first.plan, second.plan, activation, keep_pre, training)
    y, a, h = replay.call(kind, operands, run)
    return y, a, h, ([None], [None])  # sparse products keep no dense weight


def _tensors(pattern: Pattern) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return pattern.col_indices, pattern.order, pattern.col_start


def _by_operator(ctx: Any, dy: Tensor, saved: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients of what is `DIFFERENTIATED`, by the operator: it is seen by who watches."""
    x, h, a, values1, cols1, bias1, order1, start1, values2, cols2, order2, start2 = saved
    results = mlp_backward_op(
        dy, x, h, a, values1, cols1, bias1, order1, start1, *ctx.sizes1,
        values2, cols2, order2, start2, *ctx.sizes2, list(ctx.needs), *ctx.names,
    )  # fmt: skip
    needs = ctx.needs
    sample1, sample2 = ctx.sizes1[-1] != "none", ctx.sizes2[-1] != "none"
    wanted = (needs.x, needs.values1, needs.bias1, sample1, needs.values2, needs.bias2, sample2)
    return [grad if want else None for grad, want in zip(results, wanted, strict=True)]


class Needed(NamedTuple):
    """Which arguments need a gradient, probes included."""

    x: bool
    values1: bool
    bias1: bool
    probe1: bool
    values2: bool
    bias2: bool
    probe2: bool


def _save(
    ctx: Any, args: tuple[Any, ...], need: Needed, h: Tensor | None, a: Tensor | None
) -> None:
    """Save what the backward pass needs of the operands and of h and a, and no more."""
    recompute = args[RECOMPUTE]
    values1, cols1, bias1, _, order1, start1, row_group1, num_live1, sample1 = args[FIRST]
    values2, cols2, _, _, order2, start2, row_group2, num_live2, sample2 = args[SECOND]
    sample1 = sample1 if need.probe1 else "none"
    sample2 = sample2 if need.probe2 else "none"
    need_dh = need.x or need.values1 or need.bias1 or sample1 != "none"
    need_a = need.values2 or sample2 != "none"
    again = recompute == "hidden" and (need_dh or need_a)
    has_a = recompute == "none"
    ctx.needs = core.Needs(need.x, need.values1, need.bias1, need.values2, need.bias2)
    B1, B2 = values1.shape[-1], values2.shape[-1]
    ctx.sizes1 = (args[X].shape[-1] // B1, B1, row_group1, num_live1, sample1)
    ctx.sizes2 = (B2, row_group2, num_live2, sample2)
    ctx.names = (args[ACTIVATION], args[BACKEND])
    keep_h = recompute != "hidden" and (need_dh or (need_a and not has_a))
    ctx.save_for_backward(
        args[X] if need.values1 or sample1 != "none" or again else None,
        h if keep_h else None,
        a if has_a and need_a else None,
        values1 if need.x or again else None,
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


def eager_mlp(args: tuple[Any, ...], sizes: Sizes) -> Tensor:
    """y for the arguments of `mlp`, where nothing but autograd and autocast may want to see it."""
    device_type = "cuda" if args[X].is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        args = cast_arguments(args, device_type)
    first, second = layers_of(args, sizes)
    x, values1, bias1, probe1 = args[X], args[VALUES1], args[BIAS1], args[PROBE1]
    values2, bias2, probe2 = args[VALUES2], args[BIAS2], args[PROBE2]
    operands = (x, values1, bias1, probe1, values2, bias2, probe2)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        result: Tensor = _EagerMLP.apply(*operands, (args, first, second))
        return result
    y = _forward(flat(x), first, second, args[ACTIVATION], False, False)[0]
    return shaped(y, x)
