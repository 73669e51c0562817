# mypy: ignore-errors
"""Triton kernel of the Fisher trace's reductions.

Legend: M blocks of a row, B tile side, N tokens.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def token_square_sums(
    t_ptr,  # [N, M*B], any strides
    sums_ptr,  # float32 [N, M]
    N,
    M,
    stride_n,
    stride_k,
    B: tl.constexpr,
    MB: tl.constexpr,  # blocks per program
    BT: tl.constexpr,  # tokens per program
):
    """Sums of squares per token and block."""
    tokens = (tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
    cols = tl.program_id(1) * MB * B + tl.arange(0, MB * B)[None, :]
    inside = (tokens < N) & (cols < M * B)
    offsets = tokens * stride_n + cols.to(tl.int64) * stride_k
    t = tl.load(t_ptr + offsets, inside, other=0.0).to(tl.float32)
    sums = tl.sum((t * t).reshape(BT, MB, B), axis=2)
    blocks = tl.program_id(1) * MB + tl.arange(0, MB)[None, :]
    tl.store(sums_ptr + tokens * M + blocks, sums, (tokens < N) & (blocks < M))
