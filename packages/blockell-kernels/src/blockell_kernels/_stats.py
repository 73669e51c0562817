"""Per-block statistics of one backward pass, from which a layer scores its topology.

Legend: R block rows, C block columns, B tile side, N tokens.

They travel as the gradient of a *probe*, a float32 leaf tensor of R + C + R*C elements that the
forward pass ignores:

    [:R]        row_sq[r] = sum over tokens of |dy_r|^2
    [R : R+C]   col_sq[c] = sum over tokens of |x_c|^2
    [R+C :]     norm_sq[r, c] = ||dy_r^T x_c||_F^2, or zeros (sample="norms")

So autograd adds them up over micro-batches, counts a recomputed forward pass once, and computes
nothing where no gradient flows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blockell_kernels._gpu import gpu_blocks

Sample = Literal["none", "norms", "gradient"]
SAMPLES: tuple[Sample, ...] = ("none", "norms", "gradient")

# Upper bound on the buffer that holds a slice of the dense gradient, in elements (16 MiB float32).
MAX_BUFFER_ELEMENTS = 4 * 2**20
# Elements squared at a time: on the CPU few enough to stay in the cache (2 ms instead of 4 for
# [2048, 2560]; vector_norm takes 22), elsewhere few launches.
SUM_ELEMENTS_CPU = 2**19
SUM_ELEMENTS = 2**26


def probe_size(R: int, C: int) -> int:
    """Elements of a probe for R block rows and C block columns: R + C + R*C."""
    return R + C + R * C


def wide(t: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that."""
    return t if t.dtype == torch.float64 else t.float()


def block_sums_sq(t: Tensor, B: int) -> Tensor:
    """[M]: sum over tokens of |t_m|^2 per block, for t [N, M*B]."""
    if (kernels := gpu_blocks(t, B)) and t.dtype != torch.float64:
        return kernels.block_sums_sq(t, B)
    budget = SUM_ELEMENTS_CPU if t.device.type == "cpu" else SUM_ELEMENTS
    total = wide(t[:0]).sum(0)
    for chunk in t.split(max(1, budget // max(1, t.shape[1]))):
        total += wide(chunk).square().sum(0)
    return total.view(-1, B).sum(1)


def norms_sq_of_rows(product: Tensor, B: int) -> Tensor:
    """[rows, C]: squared Frobenius norms of the B x B blocks of product [rows*B, C*B]."""
    rows, C = product.shape[0] // B, product.shape[1] // B
    return product.view(rows, B, C, B).square().sum((1, 3))


def rows_per_chunk(R: int, C: int, B: int) -> int:
    """Block rows of the dense gradient that fit into the bounded buffer; at least one."""
    return max(1, min(R, MAX_BUFFER_ELEMENTS // (B * C * B)))


def block_grad_norms_sq(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """[R, C]: ||dy_r^T x_c||_F^2 for all blocks; dy [N, R*B], x [N, C*B], in float32 or float64."""
    if (kernels := gpu_blocks(x, B)) and x.dtype != torch.float64:
        return kernels.block_norms_sq(dy, x, B)
    R, C = dy.shape[1] // B, x.shape[1] // B
    dy, x = wide(dy), wide(x)
    step = rows_per_chunk(R, C, B)
    chunks = [
        norms_sq_of_rows(dy[:, start * B : (start + step) * B].T @ x, B)
        for start in range(0, R, step)
    ]
    return torch.cat(chunks)


def probe_gradient(dy: Tensor, x: Tensor, C: int, B: int, norms_sq: Tensor | None = None) -> Tensor:
    """The probe's gradient, float32 [R + C + R*C]; `norms_sq` [R, C] or None for zeros."""
    R = dy.shape[1] // B
    grad = torch.zeros(probe_size(R, C), dtype=torch.float32, device=dy.device)
    grad[:R] = block_sums_sq(dy, B)
    grad[R : R + C] = block_sums_sq(x, B)
    if norms_sq is not None:
        grad[R + C :] = norms_sq.reshape(-1)
    return grad
