# mypy: ignore-errors
"""Triton kernels behind a memory: the norm of its answers, and the gate in front of the residual.

Legend: N answers, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
PROGRAMS = 528
"""At most, of the norm's backward pass; each gathers a share of the weight's gradient."""
BLOCK = 2048


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
def _memory_gate(x_ptr, logits_ptr, y_ptr, N, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, lane < N, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + lane, lane < N, other=0.0).to(tl.float32))
    tl.store(y_ptr + lane, (gate * x).to(y_ptr.dtype.element_ty), lane < N)


@triton.jit
def _memory_gate_backward(
    grad_ptr, x_ptr, logits_ptr, grad_x_ptr, grad_logits_ptr, N, BLOCK: tl.constexpr
):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + lane, lane < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + lane, lane < N, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(logits_ptr + lane, lane < N, other=0.0).to(tl.float32))
    tl.store(grad_x_ptr + lane, (grad * gate).to(grad_x_ptr.dtype.element_ty), lane < N)
    grad_logits = grad * x * gate * (1.0 - gate)
    tl.store(grad_logits_ptr + lane, grad_logits.to(grad_logits_ptr.dtype.element_ty), lane < N)


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
    return grad_x, parts.sum(0).to(weight.dtype)


def gate(x: Tensor, logits: Tensor) -> Tensor:
    """sigmoid(logits) x, contiguous and of one shape."""
    y = torch.empty_like(x)
    N = x.numel()
    _memory_gate[(triton.cdiv(N, BLOCK),)](x, logits, y, N, BLOCK=BLOCK)
    return y


def gate_backward(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``logits``; contiguous."""
    grad_x, grad_logits = torch.empty_like(x), torch.empty_like(logits)
    N = x.numel()
    _memory_gate_backward[(triton.cdiv(N, BLOCK),)](
        grad, x, logits, grad_x, grad_logits, N, BLOCK=BLOCK
    )
    return grad_x, grad_logits
