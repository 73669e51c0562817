"""The per-token Fisher trace of every block of a layer's weight.

Legend: R block rows, C block columns, B tile side, N tokens.

For y = x W^T the gradient of one token's loss in block (r, c) is the outer product dy_r^T x_c. Its
squared Frobenius norm is |dy_r|^2 |x_c|^2; summed over the tokens that is the trace of the block's
empirical Fisher matrix, every token's gradient by itself (J. Martens, "New Insights and
Perspectives on the Natural Gradient Method", JMLR 2020). `block_grad_norms` adds the gradients up
first and takes the norm then. No gradient is formed here: two reductions and one small product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._gpu import gpu_blocks
from blockell_kernels._stats import SUM_ELEMENTS, SUM_ELEMENTS_CPU, wide
from blockell_kernels._validation import check_gradient_and_input


def token_sums_sq(t: Tensor, B: int) -> Tensor:
    """float32 (float64 for float64) [N, M]: |t_n,m|^2 per token and block, for t [N, M*B]."""
    N, M = t.shape[0], t.shape[1] // B
    if gpu_blocks(t, B) and t.dtype != torch.float64:
        from blockell_kernels._triton import _fisher

        result: Tensor = _fisher.token_sums_sq(t, B)
        return result
    sums = wide(t[:0]).new_empty(N, M)
    # a part at a time: never a float32 copy of the whole operand
    step = max(1, (SUM_ELEMENTS_CPU if t.device.type == "cpu" else SUM_ELEMENTS) // max(1, M * B))
    for start in range(0, N, step):
        part = wide(t[start : start + step]).square()
        torch.sum(part.view(-1, M, B), 2, out=sums[start : start + step])
    return sums


def block_fisher(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """Per-token Fisher trace of all B x B blocks: F_rc = sum_t |dy_t,r|^2 |x_t,c|^2.

    Exact, deterministic, not differentiable. Squares are summed in float32 and multiplied in
    float64, so that neither TF32 nor the number of tokens blurs the result. Cost: one read of
    each operand and a product [R, N] x [N, C].

    Args:
        dy: [..., R*B], the gradient of a loss in the layer's output. Of a loss that is a mean over
            tokens, multiply the result by the square of their number for a sum over single losses.
        x: [..., C*B], the layer's input: same leading dimensions, dtype and device.
        B: tile side.

    Returns:
        float32 [R, C] (float64 for float64 operands).

    Raises:
        ValueError: leading dimensions, dtypes or devices differ, or B divides no width.
    """
    check_gradient_and_input("dy", dy, x, B)
    with torch.no_grad():
        N = dy.shape[:-1].numel()
        dy_sq = token_sums_sq(dy.reshape(N, dy.shape[-1]), B)
        x_sq = token_sums_sq(x.reshape(N, x.shape[-1]), B)
        return (dy_sq.double().T @ x_sq.double()).to(dy_sq.dtype)
