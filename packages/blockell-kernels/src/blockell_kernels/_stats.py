"""Per-block statistics of one backward pass, from which a layer scores its topology.

Legend: R block rows, C block columns, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Upper bound on the buffer that holds a slice of the dense gradient, in elements (16 MiB float32).
MAX_BUFFER_ELEMENTS = 4 * 2**20


def block_sums_sq(t: Tensor, B: int) -> Tensor:
    """float32 [M]: sum over tokens of |t_m|^2 per block, for t [N, M*B]."""
    t = t.float() if t.dtype != torch.float64 else t
    return torch.linalg.vector_norm(t, dim=0).square_().view(-1, B).sum(1).float()


def norms_sq_of_rows(product: Tensor, B: int) -> Tensor:
    """float32 [rows, C]: squared Frobenius norms of the B x B blocks of product [rows*B, C*B]."""
    rows, C = product.shape[0] // B, product.shape[1] // B
    return product.view(rows, B, C, B).square().sum((1, 3)).float()


def rows_per_chunk(R: int, C: int, B: int) -> int:
    """Block rows of the dense gradient that fit into the bounded buffer; at least one."""
    return max(1, min(R, MAX_BUFFER_ELEMENTS // (B * C * B)))


def block_grad_norms_sq(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """float32 [R, C]: ||dy_r^T x_c||_F^2 for all blocks; dy [N, R*B], x [N, C*B].

    float16 and bfloat16 operands are multiplied in float32.
    """
    R, C = dy.shape[1] // B, x.shape[1] // B
    if x.dtype in (torch.float16, torch.bfloat16):
        dy, x = dy.float(), x.float()
    out = torch.empty(R, C, dtype=torch.float32, device=x.device)
    step = rows_per_chunk(R, C, B)
    for start in range(0, R, step):
        stop = min(R, start + step)
        product = dy[:, start * B : stop * B].T @ x
        out[start:stop] = norms_sq_of_rows(product, B)
    return out
