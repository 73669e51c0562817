"""The operators `blockell::linear_activated` and its backward: y = f(x W^T + bias).

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h = x W^T +
bias, the pre-activation [N, R*B], saved for the backward pass.

As in `_ops`, both are opaque to the compiler and choose their backends when they run. Operands have
been validated by `block_ell_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels import _mlp_core as core
from blockell_kernels._activation import activation_gradient
from blockell_kernels._backends import requested_backend
from blockell_kernels._eager import watched
from blockell_kernels._mlp_core import Layer, flat
from blockell_kernels._ops import linear_backward_fake
from blockell_kernels._plan import plan_for
from blockell_kernels._registration import (
    TAGS,
    cast_positions,
    library,
    or_empty,
    register_autocast,
    register_autograd,
    register_backward,
)

library.define(
    "linear_activated(Tensor x, Tensor values, Tensor col_indices, Tensor? bias, Tensor? probe, "
    "Tensor? order, Tensor? col_start, int row_group, int num_live, str sample, str activation, "
    "bool keep_pre, str backend) -> (Tensor, Tensor)",
    tags=TAGS,
)
# Unneeded gradients come back empty: an operator cannot return None.
library.define(
    "linear_activated_backward(Tensor dy, Tensor h, Tensor? x, Tensor? values, Tensor col_indices, "
    "Tensor? order, Tensor? col_start, int C, int B, int row_group, int num_live, bool need_input, "
    "bool need_values, bool need_bias, str sample, str activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
activated_op = torch.ops.blockell.linear_activated.default
activated_backward_op = torch.ops.blockell.linear_activated_backward.default


def _run(keep_weight: bool, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, h or None, dense weight or None) for the arguments of `linear_activated`."""
    x, values, cols, bias, _, order, start, row_group, num_live, _ = args[:10]
    activation, keep_pre, backend = args[10:]
    x2d, (R, _, B, _) = flat(x), values.shape
    sizes = (R, x.shape[-1] // B, B, row_group, num_live)
    plan = plan_for(x, x2d.shape[0], sizes, requested_backend(backend or None))
    layer = Layer(plan, plan.pattern(cols, order, start), values, bias)
    a, h, weight = core.hidden(layer, x2d, activation, keep_pre, keep_weight)
    return core.shaped(a, x), h, weight


@torch.library.impl(library, "linear_activated", "CompositeExplicitAutograd")
def linear_activated(*args: Any) -> tuple[Tensor, Tensor]:
    """(y [..., R*B], h [N, R*B] or empty); see `block_ell_linear`."""
    y, h, _ = _run(False, *args)
    return y, or_empty(h, y)


def _activated_fake(x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    width, keep_pre = values.shape[0] * values.shape[2], rest[-2]
    h = x.new_empty(x.numel() // x.shape[-1], width) if keep_pre else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], width), h


def run_backward(
    weight: core.Weights | None,
    dy: Tensor,
    h: Tensor,
    x: Tensor | None,
    values: Tensor | None,
    col_indices: Tensor,
    order: Tensor | None,
    col_start: Tensor | None,
    C: int,
    B: int,
    row_group: int,
    num_live: int,
    need_input: bool,
    need_values: bool,
    need_bias: bool,
    sample: str,
    activation: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """(dx, dvalues, dbias, dprobe); those not needed are empty.

    `weight`: a dense weight that an eager forward pass kept; what follows is the operator's.
    """
    sizes = (col_indices.shape[0], C, B, row_group, num_live)
    plan = plan_for(dy, h.shape[0], sizes, requested_backend(backend or None))
    dh = activation_gradient(flat(dy).contiguous(), h, activation)
    needs = (need_input, need_values, need_bias)
    x2d = None if x is None else flat(x)
    pattern = plan.pattern(col_indices, order, col_start)
    dx, *others = plan.backward(dh, x2d, values, pattern, needs, sample, weight)
    if dx is not None and dy.ndim != 2:
        dx = dx.view(*dy.shape[:-1], C * B)
    return tuple(or_empty(grad, dy) for grad in (dx, *others))


@torch.library.impl(library, "linear_activated_backward", "CompositeExplicitAutograd")
def linear_activated_backward(*args: Any) -> tuple[Tensor, ...]:
    """See `run_backward`."""
    return run_backward(None, *args)


def _activated_backward_fake(dy: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return linear_backward_fake(dy, *rest[:-2], *rest[-1:])  # but the activation


torch.library.register_fake("blockell::linear_activated", _activated_fake, lib=library)
torch.library.register_fake(
    "blockell::linear_activated_backward", _activated_backward_fake, lib=library
)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.weight = None
        with torch._C._AutoDispatchBelowAutograd():
            y, h = activated_op(*args)
        _save(ctx, args, h)
        ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 13
        if dy is None:
            return tuple(grads)
        given: tuple[Any, ...] = (dy, *ctx.saved_tensors, *ctx.sizes, *ctx.needs, *ctx.names)
        if ctx.weight is None or torch.is_grad_enabled() or type(dy) is not Tensor or watched():
            results = activated_backward_op(*given)
        else:
            results = run_backward(ctx.weight, *given)
        for position, result in zip((0, 1, 3, 4), results, strict=True):
            if ctx.needs_input_grad[position] and (position != 4 or result.numel()):
                grads[position] = result
        return tuple(grads)


class _EagerActivated(_Activated):
    """The same past the dispatcher, with a dense weight shared by forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        y, h, weight = _run(True, *args)
        ctx.weight = [weight]
        _save(ctx, args, h)
        return y


def _save(ctx: Any, args: tuple[Any, ...], h: Tensor | None) -> None:
    x, values, cols, _, _, order, start, row_group, num_live, sample = args[:10]
    need_input, need_values, _, need_bias, need_probe = ctx.needs_input_grad[:5]
    sample = sample if need_probe else "none"
    keep_x = need_values or sample != "none"
    ctx.sizes = (x.shape[-1] // values.shape[-1], values.shape[-1], row_group, num_live)
    ctx.needs, ctx.names = (need_input, need_values, need_bias), (sample, args[10], args[12])
    ctx.save_for_backward(
        h, x if keep_x else None, values if need_input else None, cols, order, start
    )


def _cast(args: tuple[Any, ...], device_type: str) -> tuple[Any, ...]:
    return cast_positions(args, device_type, (0, 1, 3))


register_autograd("linear_activated", activated_op, _Activated)
register_backward("linear_activated_backward", activated_backward_op, "block_ell_linear")
register_autocast("linear_activated", activated_op, _cast)


def activated_linear(eager: bool, *args: Any) -> Tensor:
    """y for the arguments of `linear_activated` but keep_pre; `eager`: nothing watches the call."""
    operands, backend = args[:-1], args[-1]
    needed = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in operands
    )
    args = (*operands, needed, backend)
    if not eager:
        result: Tensor = activated_op(*args)[0]
        return result
    device_type = "cuda" if args[0].is_cuda else args[0].device.type
    if torch.is_autocast_enabled(device_type):
        args = _cast(args, device_type)
    if needed:
        return _EagerActivated.apply(*args)
    return _run(False, *args)[0]
