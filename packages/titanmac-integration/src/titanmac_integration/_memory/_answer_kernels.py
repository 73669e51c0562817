# mypy: ignore-errors
"""Triton kernels behind a memory: the norm of its answers, and the gate in front of the residual.

Legend: N answers, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanmac_integration._layers._project_kernels import sum_parts

ROWS = 32
PROGRAMS = 528
"""At most, of the norm's backward pass; each gathers a share of the weight's gradient."""
COLUMNS = 128
"""With ROWS the tile of the gate's kernels."""


@triton.jit
def _memory_norm(
    x_ptr,  # float32 [N, D]
    weight_ptr,  # [D]
    y_ptr,  # [N, D]
    N,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, DP)[None, :]
    inside = (row < N) & (lane < D)
    x = tl.load(x_ptr + row * D + lane, inside, other=0.0)
    weight = tl.load(weight_ptr + lane, lane < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    tl.store(y_ptr + row * D + lane, (x * scale * weight).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _memory_norm_backward(
    grad_ptr,  # [N, D]
    x_ptr,  # float32 [N, D]
    weight_ptr,  # [D]
    grad_x_ptr,  # float32 [N, D]
    parts_ptr,  # float32 [programs, D]
    N,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.arange(0, DP)[None, :]
    weight = tl.load(weight_ptr + lane, lane < D, other=0.0).to(tl.float32)
    gathered = tl.zeros((ROWS, DP), tl.float32)
    program = tl.program_id(0)
    for first in range(0, N, tl.num_programs(0) * ROWS):
        row = (first + program.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < N) & (lane < D)
        x = tl.load(x_ptr + row * D + lane, inside, other=0.0)
        grad = tl.load(grad_ptr + row * D + lane, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        unit = x * scale
        gathered += grad * unit
        grad = grad * weight
        along = tl.sum(grad * unit, 1)[:, None] / D
        tl.store(grad_x_ptr + row * D + lane, (grad - unit * along) * scale, inside)
    total = tl.sum(gathered, 0)[None, :]
    tl.store(parts_ptr + program * D + lane, total, lane < D)


@triton.jit
def load_gate(logits_ptr, bias_ptr, place, column, inside, C):
    """sigmoid(logits + bias) [rows, columns]."""
    logits = tl.load(logits_ptr + place, inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + column, column < C, other=0.0).to(tl.float32)
    return tl.sigmoid(logits)


@triton.jit
def _memory_gate(
    x_ptr,  # [S, T, C]
    logits_ptr,  # [S, A + T, C]
    bias_ptr,  # [C], or None
    beside_ptr,  # [S, P + T, C], or None
    y_ptr,  # [S, P + T, C]
    skipped,  # P
    ahead,  # A
    T,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * ROWS - skipped + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (t < T) & (column < C)
    inside = there & (t >= 0)
    x = tl.load(x_ptr + (sequence * T + t) * C + column, inside, other=0.0).to(tl.float32)
    place = (sequence * (ahead + T) + (ahead + t)) * C + column
    y = load_gate(logits_ptr, bias_ptr, place, column, inside, C) * x
    place = (sequence * (skipped + T) + (skipped + t)) * C + column
    if beside_ptr is not None:
        y += tl.load(beside_ptr + place, there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), there)


@triton.jit
def _memory_gate_backward(
    grad_ptr,  # [S, P + T, C]
    x_ptr,  # [S, T, C]
    logits_ptr,  # [S, A + T, C]
    bias_ptr,  # [C], or None
    grad_x_ptr,  # [S, T, C]
    grad_logits_ptr,  # [S, A + T, C]
    parts_ptr,  # float32 [S blocks, C], or None without a bias
    skipped,  # P
    ahead,  # A
    T,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * ROWS - ahead + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    there = (t < T) & (column < C)
    inside = there & (t >= 0)
    place = (sequence * (skipped + T) + (skipped + t)) * C + column
    grad = tl.load(grad_ptr + place, inside, other=0.0).to(tl.float32)
    of_x = (sequence * T + t) * C + column
    x = tl.load(x_ptr + of_x, inside, other=0.0).to(tl.float32)
    place = (sequence * (ahead + T) + (ahead + t)) * C + column
    gate = load_gate(logits_ptr, bias_ptr, place, column, inside, C)
    tl.store(grad_x_ptr + of_x, (grad * gate).to(grad_x_ptr.dtype.element_ty), inside)
    grad_logits = grad * x * gate * (1.0 - gate)  # zero in rows ahead
    tl.store(grad_logits_ptr + place, grad_logits.to(grad_logits_ptr.dtype.element_ty), there)
    if parts_ptr is not None:
        part = sequence * tl.num_programs(0) + tl.program_id(0)
        total = tl.sum(grad_logits, 0)[None, :]
        tl.store(parts_ptr + part * C + column, total, column < C)


def normalise(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Float32 [..., D] over its rms, times ``weight`` [D], in ``dtype``; contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    N = x.numel() // width
    constants = {"D": width, "DP": triton.next_power_of_2(width), "ROWS": ROWS}
    _memory_norm[(triton.cdiv(N, ROWS),)](x, weight, y, N, eps, **constants)
    return y


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``weight``; contiguous."""
    width = x.shape[-1]
    N = x.numel() // width
    programs = min(PROGRAMS, triton.cdiv(N, ROWS))
    grad_x = torch.empty_like(x)
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    constants = {"D": width, "DP": triton.next_power_of_2(width), "ROWS": ROWS}
    _memory_norm_backward[(programs,)](grad, x, weight, grad_x, parts, N, eps, **constants)
    return grad_x, sum_parts(parts).to(weight.dtype)


def gate(
    x: Tensor, logits: Tensor, bias: Tensor | None, skipped: int, beside: Tensor | None
) -> Tensor:
    """sigmoid(logits + bias) x behind P (``skipped``) rows of zeros, added to ``beside``.

    ``x`` [S, T, C]; of ``logits`` [S, A + T, C] the last T rows; ``bias`` [C]; ``beside``
    [S, P + T, C]; all contiguous.
    """
    S, T, C = x.shape
    y = x.new_empty(S, skipped + T, C)
    grid = (triton.cdiv(skipped + T, ROWS), triton.cdiv(C, COLUMNS), S)
    ahead = logits.shape[1] - T
    _memory_gate[grid](x, logits, bias, beside, y, skipped, ahead, T, C, ROWS=ROWS, COLUMNS=COLUMNS)
    return y


def gate_backward(
    grad: Tensor, x: Tensor, logits: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``x``, ``logits`` and ``bias``; contiguous."""
    S, T, C = x.shape
    grad_x, grad_logits = torch.empty_like(x), torch.empty_like(logits)
    skipped, ahead = grad.shape[1] - T, logits.shape[1] - T
    blocks = triton.cdiv(ahead + T, ROWS)
    parts = None if bias is None else x.new_empty(S * blocks, C, dtype=torch.float32)
    _memory_gate_backward[(blocks, triton.cdiv(C, COLUMNS), S)](
        grad,
        x,
        logits,
        bias,
        grad_x,
        grad_logits,
        parts,
        skipped,
        ahead,
        T,
        C,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return grad_x, grad_logits, None if parts is None else sum_parts(parts).to(bias.dtype)
