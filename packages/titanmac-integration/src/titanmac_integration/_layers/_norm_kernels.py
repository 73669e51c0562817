# mypy: ignore-errors
"""Triton kernels for RMS normalisation; a row of D values fits into one program's registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._project_kernels import sum_parts

PROGRAMS, WARPS = 640, 8
"""At most, of the backward pass: what the registers of an H200 hold at once. Each gathers a share
of the gradients of weight and bias."""


@triton.jit
def _norm_forward(
    x_ptr,  # [N, D]
    added_ptr,  # [N, D], or None
    bias_ptr,  # [D], added too, or None
    sum_ptr,  # [N, D], or None without added_ptr
    weight_ptr,  # [D]
    y_ptr,  # [N, D]
    scale_ptr,  # float32 [N]
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    x = tl.load(x_ptr + row * D + lane, inside, other=0.0).to(tl.float32)
    if added_ptr is not None:
        x += tl.load(added_ptr + row * D + lane, inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + lane, inside, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + lane, total, inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + lane, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + row * D + lane, (x * scale * weight).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _norm_backward(
    grad_ptr,  # [N, D]
    past_ptr,  # [N, D], the gradient that comes to x past the norm, or None
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    scale_ptr,  # float32 [N]
    grad_x_ptr,  # [N, D]
    grad_added_ptr,  # [N, D], the same in another precision, or None
    parts_ptr,  # float32 [programs, D], or [programs, 2 D] with sums of grad_x behind them
    N,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    weight = tl.load(weight_ptr + lane, inside, other=0.0).to(tl.float32)
    gathered = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, tl.num_programs(0)):
        row = first + program.to(tl.int64)
        there = inside & (row < N)
        start = row * D
        grad = tl.load(grad_ptr + start + lane, there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + lane, there, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, row < N, other=0.0)
        unit = x * scale
        gathered += grad * unit
        grad = grad * weight
        along = tl.sum(grad * unit, 0) / D
        grad_x = (grad - unit * along) * scale
        if past_ptr is not None:
            grad_x += tl.load(past_ptr + start + lane, there, other=0.0).to(tl.float32)
        if SUMS:
            sums += grad_x
        tl.store(grad_x_ptr + start + lane, grad_x.to(grad_x_ptr.dtype.element_ty), there)
        if grad_added_ptr is not None:
            grad_added = grad_x.to(grad_added_ptr.dtype.element_ty)
            tl.store(grad_added_ptr + start + lane, grad_added, there)
    part = parts_ptr + program.to(tl.int64) * (2 * D if SUMS else D) + lane
    tl.store(part, gathered, inside)
    if SUMS:
        tl.store(part + D, sums, inside)


def normalise(
    x: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + added + bias`` (or ``x``), that over its rms times ``weight``, and 1 / rms of each row.

    The second in ``dtype``, the third float32 [N]. A ``bias`` [D] only with something ``added``.
    """
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    total = x
    if added is not None:
        added = added.contiguous()
        total = torch.empty_like(x, dtype=torch.result_type(x, added))
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _norm_forward[(rows,)](
            x,
            added,
            bias,
            None if added is None else total,
            weight,
            normed,
            scales,
            eps,
            D=width,
            BLOCK=triton.next_power_of_2(width),
        )
    return total, normed, scales


def normalise_backward(
    grad: Tensor,
    past: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``x`` and of what was added to it, in their ``dtypes``, and of ``weight``.

    ``past`` is the gradient that comes to ``x`` past the norm. Last the sum of the first over the
    rows, float32 [D], if it is needed: the gradient of a bias that was added.
    """
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1]
    # all take as many rows, or the last ones would run alone
    rows = max(1, triton.cdiv(len(scales), PROGRAMS))
    programs = max(1, triton.cdiv(len(scales), rows))
    grad_x = torch.empty_like(x, dtype=dtypes[0])
    other = dtypes[1] != dtypes[0]
    grad_added = torch.empty_like(x, dtype=dtypes[1]) if other else grad_x
    parts = torch.empty(
        programs, width * (2 if need_sum else 1), dtype=torch.float32, device=x.device
    )
    _norm_backward[(programs,)](
        grad,
        None if past is None else past.contiguous(),
        x,
        weight,
        scales,
        grad_x,
        grad_added if other else None,
        parts,
        len(scales),
        SUMS=need_sum,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    gathered = sum_parts(parts)
    grad_weight = gathered[:width].to(weight.dtype)
    return grad_x, grad_added, grad_weight, gathered[width:] if need_sum else None
