"""The custom operators `blockell::linear` and `blockell::linear_backward`.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Both are opaque to the compiler and choose their backend when they run, from the sizes at hand: a
compiled graph is not specialised on that choice, and a topology changed in place needs no new one.
Operands have been validated by `block_ell_linear`.

They are registered through `torch.library.Library` and not through its front `custom_op`, whose
generated autograd and aliasing checks cost 150 us per call here, as much as a small product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels._backends import (
    Backend,
    Case,
    Direction,
    Pattern,
    get_backend,
    requested_backend,
    select,
    warn_refused,
)
from blockell_kernels._stats import probe_gradient, probe_size

_library = torch.library.Library("blockell", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    "linear(Tensor x, Tensor values, Tensor col_indices, Tensor? bias, Tensor? probe, "
    "Tensor? order, Tensor? col_start, int row_group, int num_live, str sample, str backend) "
    "-> Tensor",
    tags=_TAGS,
)
# Unneeded gradients come back empty: an operator cannot return None.
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? values, Tensor col_indices, Tensor? order, "
    "Tensor? col_start, int C, int B, int row_group, int num_live, bool need_input, "
    "bool need_values, bool need_bias, str sample, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
linear_op = torch.ops.blockell.linear.default
linear_backward_op = torch.ops.blockell.linear_backward.default


def compute_dtype(t: Tensor) -> torch.dtype:
    """float32 for 16-bit floats on the CPU, where their own products are slow; else as it is."""
    if t.device.type == "cpu" and t.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return t.dtype


def _backend_for(direction: Direction, operand: Tensor, pattern: Pattern, backend: str) -> Backend:
    """The backend for one direction; `operand` is [N, ...]."""
    requested = requested_backend(backend or None)
    p = pattern
    sizes = (operand.shape[0], p.R, p.C, p.num_live, p.B, p.row_group)
    choice = select(Case(direction, operand.device, operand.dtype, *sizes), requested)
    if choice.refused is not None:
        warn_refused(requested, choice)
    return get_backend(choice.backend)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
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
    pattern = Pattern(col_indices, in_features // B, B, row_group, num_live, order, col_start)
    dtype = compute_dtype(x)
    x2d = x if x.ndim == 2 else x.reshape(x.numel() // in_features, in_features)
    if dtype != x.dtype:
        x2d, values = x2d.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    chosen = _backend_for("forward", x2d, pattern, backend)
    y = chosen.forward(x2d, values, bias, pattern)
    y = y.to(x.dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], R * B)


def _linear_fake(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0] * values.shape[2])


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
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
    out_features = col_indices.shape[0] * B
    pattern = Pattern(col_indices, C, B, row_group, num_live, order, col_start)
    dtype = compute_dtype(dy)
    dy2d = dy.reshape(dy.numel() // out_features, out_features).to(dtype).contiguous()
    dx, dvalues, dbias, dprobe = (dy.new_empty(0) for _ in range(4))

    if need_input:
        assert values is not None
        chosen = _backend_for("grad_input", dy2d, pattern, backend)
        dx = chosen.grad_input(dy2d, values.to(dtype), pattern)
        dx = dx.to(dy.dtype).view(*dy.shape[:-1], C * B)
    if need_values or sample != "none":
        assert x is not None
        x2d = x.reshape(dy2d.shape[0], C * B).to(dtype)
        norms_sq = None
        chosen = _backend_for("grad_values", dy2d, pattern, backend)
        if sample == "gradient" and need_values:
            dvalues, norms_sq = chosen.grad_values_and_norms(dy2d, x2d, pattern)
        elif sample == "gradient":
            norms_sq = chosen.block_grad_norms(dy2d, x2d, B)
        elif need_values:
            dvalues = chosen.grad_values(dy2d, x2d, pattern)
        dvalues = dvalues.to(dy.dtype)
        if sample != "none":
            dprobe = probe_gradient(dy2d, x2d, C, B, norms_sq)
    if need_bias:
        dbias = dy2d.sum(0).to(dy.dtype)
    return dx, dvalues, dbias, dprobe


def _linear_backward_fake(
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


torch.library.register_fake("blockell::linear", _linear_fake, lib=_library)
torch.library.register_fake("blockell::linear_backward", _linear_backward_fake, lib=_library)


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


class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return linear_backward_op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "block_ell_linear can be differentiated once; its backward has no gradient of its own. "
            "For second derivatives multiply by the dense weight (blockell_format.to_dense)."
        )


def _register_autograd(name: str, op: Any, function: type[torch.autograd.Function]) -> None:
    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, kernel, "Autograd")


_register_autograd("linear", linear_op, _Linear)
_register_autograd("linear_backward", linear_backward_op, _LinearBackward)


# torch.library.register_autocast casts every floating operand to one fixed dtype; here the dtype
# is the one in force, and the float32 probe stays as it is.
def _register_autocast(device_type: str, dispatch_key: str) -> None:
    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if t is not None and eligible else t

    def kernel(
        x: Tensor, values: Tensor, col_indices: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return linear_op(
                cast(x, dtype), cast(values, dtype), col_indices, cast(bias, dtype), *rest
            )

    _library.impl("linear", kernel, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
