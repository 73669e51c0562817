"""The short way of an eager call: past the dispatcher, which costs more than a small product.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

The operator of `_ops` is what compilers, exporters, dispatch modes, tensor subclasses and function
transforms see. Where none of them is there, a call goes straight to its plan: checked once per kind
of call, one autograd node, and the dense weight shared by forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels._backends import requested_backend
from blockell_kernels._ops import linear_backward_op
from blockell_kernels._plan import Plan, compute_dtype, plan_for
from blockell_kernels._registration import cast_for_autocast
from blockell_kernels._transforms import transforms_active
from blockell_kernels._validation import check_operands

MAX_CHECKED = 4096
_PLAIN = (Tensor, torch.nn.Parameter)
_checked: dict[tuple[Any, ...], tuple[int, tuple[int, int, int, int, int]]] = {}


def watched() -> bool:
    """Whether something other than autograd and autocast may want to see the operator."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or transforms_active()
    )


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the short way may be taken. Not for compilers, which do not get to ask."""
    if type(x) not in _PLAIN or not (x.is_cuda or x.is_cpu) or x.layout is not torch.strided:
        return False
    for t in others:
        if t is not None and type(t) not in _PLAIN:
            return False
    return not watched()


def index_facts(order: Tensor | None, col_start: Tensor | None) -> tuple[Any, ...] | None:
    """All that is checked of an index."""
    if order is None or col_start is None:
        return None
    return (
        order.shape, order.dtype, order.device, col_start.shape, col_start.dtype, col_start.device,
    )  # fmt: skip


def eager_linear(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    order: Tensor | None,
    col_start: Tensor | None,
    row_group: int,
    num_live: int | None,
    sample: str,
    backend: str | None,
) -> Tensor:
    """`block_ell_linear` for operands that are `plain`."""
    device_type = "cuda" if x.is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [cast_for_autocast(t, dtype) for t in (x, values, bias)]
        assert cast[0] is not None
        assert cast[1] is not None
        x, values, bias = cast[0], cast[1], cast[2]
        if not x.is_cuda and compute_dtype(x) is not x.dtype:
            # Its products are of another dtype, which autocast would cast back.
            with torch.autocast(device_type, enabled=False):
                return eager_linear(
                    x, values, col_indices, bias, probe, order, col_start, row_group, num_live,
                    sample, backend,
                )  # fmt: skip
    # All that `check_operands` looks at.
    key = (
        x.shape, values.shape, col_indices.shape, row_group, num_live, sample,
        x.dtype, values.dtype, col_indices.dtype, x.device, values.device, col_indices.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if probe is None else (probe.shape, probe.dtype, probe.device),
        index_facts(order, col_start),
    )  # fmt: skip
    checked = _checked.get(key)
    if checked is None:
        live = col_indices.shape[-1] if num_live is None else num_live
        index = order, col_start
        check_operands(x, values, col_indices, bias, row_group, live, probe, sample, index)
        R, _, B, _ = values.shape
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        sizes = (R, x.shape[-1] // B, B, row_group, live)
        checked = _checked[key] = x.numel() // x.shape[-1], sizes
    plan = plan_for(x, *checked, requested_backend(backend))
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
        or (probe is not None and probe.requires_grad)
    ):
        return plan.forward(x, values, bias, plan.pattern(col_indices, order, col_start))[0]
    result: Tensor = _EagerLinear.apply(
        x, values, bias, probe, (plan, col_indices, order, col_start, sample)
    )
    return result


def _packs_saved_tensors() -> bool:
    """Whether someone wants to keep less from forward to backward: checkpoints, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _EagerLinear(torch.autograd.Function):
    """What is not differentiated comes as one argument: torch takes its time for each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        rest: tuple[Plan, Tensor, Tensor | None, Tensor | None, str],
    ) -> Tensor:
        plan, col_indices, order, col_start, sample = rest
        need_input, need_values, _, need_probe = ctx.needs_input_grad[:4]
        ctx.sample = sample if need_probe else "none"
        ctx.save_for_backward(
            x if need_values or need_probe else None,
            values if need_input else None,
            col_indices,
            order,
            col_start,
        )
        ctx.plan = plan
        pattern = plan.pattern(col_indices, order, col_start)
        keep = need_input and not _packs_saved_tensors()
        y, weight = plan.forward(x, values, bias, pattern, keep)
        ctx.weight = [weight]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *pattern = ctx.saved_tensors
        need_input, need_values, need_bias, _ = ctx.needs_input_grad[:4]
        needs, plan, sample = (need_input, need_values, need_bias), ctx.plan, ctx.sample
        if torch.is_grad_enabled() or type(dy) is not Tensor or watched():
            # By the operator, which is seen, and refuses to be differentiated twice.
            grads = linear_backward_op(
                dy, x, values, *pattern, plan.C, plan.B, plan.row_group, plan.num_live,
                *needs, sample, plan.requested,
            )  # fmt: skip
            wanted = (*needs, sample != "none")
            dx, dvalues, dbias, dprobe = (
                g if want else None for g, want in zip(grads, wanted, strict=True)
            )
        else:
            dx, dvalues, dbias, dprobe = plan.backward(
                dy, x, values, plan.pattern(*pattern), needs, sample, ctx.weight
            )
        return dx, dvalues, dbias, dprobe, None
