"""The custom operators `blockell::linear` and `blockell::linear_backward`.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Both are opaque to the compiler and choose their backend when they run, from the sizes at hand: a
compiled graph is not specialised on that choice, and a topology changed in place needs no new one.
Operands have been validated by `block_ell_linear`.

Eager calls that nothing watches go past them (`_eager`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels._backends import requested_backend
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
from blockell_kernels._stats import probe_size

library.define(
    "linear(Tensor x, Tensor values, Tensor col_indices, Tensor? bias, Tensor? probe, "
    "Tensor? order, Tensor? col_start, int row_group, int num_live, str sample, str backend) "
    "-> Tensor",
    tags=TAGS,
)
# Unneeded gradients come back empty: an operator cannot return None.
library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? values, Tensor col_indices, Tensor? order, "
    "Tensor? col_start, int C, int B, int row_group, int num_live, bool need_input, "
    "bool need_values, bool need_bias, str sample, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
linear_op = torch.ops.blockell.linear.default
linear_backward_op = torch.ops.blockell.linear_backward.default


@torch.library.impl(library, "linear", "CompositeExplicitAutograd")
def linear(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    order: Tensor | None,
    col_start: Tensor | None,
    row_group: int,
    num_live: int,
    sample: str,
    backend: str,
) -> Tensor:
    """y [..., R*B] from x [..., C*B]; see `block_ell_linear`."""
    R, _, B, _ = values.shape
    in_features = x.shape[-1]
    sizes = (R, in_features // B, B, row_group, num_live)
    plan = plan_for(x, x.numel() // in_features, sizes, requested_backend(backend or None))
    return plan.forward(x, values, bias, plan.pattern(col_indices, order, col_start))[0]


def _linear_fake(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0] * values.shape[2])


@torch.library.impl(library, "linear_backward", "CompositeExplicitAutograd")
def linear_backward(
    dy: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dvalues, dbias, dprobe); those not needed are empty. See `block_ell_linear`."""
    R = col_indices.shape[0]
    sizes = (R, C, B, row_group, num_live)
    plan = plan_for(dy, dy.numel() // (R * B), sizes, requested_backend(backend or None))
    pattern = plan.pattern(col_indices, order, col_start)
    needs = (need_input, need_values, need_bias)
    dx, dvalues, dbias, dprobe = plan.backward(dy, x, values, pattern, needs, sample)

    return or_empty(dx, dy), or_empty(dvalues, dy), or_empty(dbias, dy), or_empty(dprobe, dy)


def linear_backward_fake(
    dy: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, slots = col_indices.shape
    probe_elements = probe_size(R, C) if sample != "none" else 0
    return (
        dy.new_empty(*dy.shape[:-1], C * B) if need_input else dy.new_empty(0),
        dy.new_empty(R, slots, B, B) if need_values else dy.new_empty(0),
        dy.new_empty(R * B) if need_bias else dy.new_empty(0),
        dy.new_empty(probe_elements, dtype=torch.float32 if probe_elements else dy.dtype),
    )


torch.library.register_fake("blockell::linear", _linear_fake, lib=library)
torch.library.register_fake("blockell::linear_backward", linear_backward_fake, lib=library)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, values, col_indices, _, _, order, col_start, row_group, num_live, sample, backend = args
        need_input, need_values, _, _, need_probe = ctx.needs_input_grad[:5]
        ctx.sample = sample if need_probe else "none"
        keep_x = need_values or ctx.sample != "none"
        ctx.save_for_backward(
            x if keep_x else None, values if need_input else None, col_indices, order, col_start
        )
        ctx.sizes = (x.shape[-1] // values.shape[-1], values.shape[-1], row_group, num_live)
        ctx.backend = backend
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = linear_op(*args)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_input, need_values, _, need_bias, _ = ctx.needs_input_grad[:5]
        needs = (need_input, need_values, need_bias)
        dx, dvalues, dbias, dprobe = linear_backward_op(
            dy, *ctx.saved_tensors, *ctx.sizes, *needs, ctx.sample, ctx.backend
        )
        return (
            dx if need_input else None,
            dvalues if need_values else None,
            None,
            dbias if need_bias else None,
            dprobe if ctx.sample != "none" else None,
            *(None,) * 6,
        )


register_autograd("linear", linear_op, _Linear)
register_backward("linear_backward", linear_backward_op, "block_ell_linear")
register_autocast(
    "linear", linear_op, lambda args, device_type: cast_positions(args, device_type, (0, 1, 3))
)
