"""The kernel of the Fisher trace, against the reference.

Legend: R block rows, C block columns, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels import _reference, block_fisher
from blockell_kernels._triton import _fisher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [8, 32, 128])
@pytest.mark.parametrize("N", [0, 1, 37] if torch.cuda.is_available() else [0, 37])
def test_token_sums(make_problem, error, B, N, dtype):
    p = make_problem(B=B, R=5, C=3, K=2, N=N, dtype=dtype)
    want = p.dy.cpu().double().view(N, 5, B).square().sum(2)
    sums = _fisher.token_sums_sq(p.dy, B)
    assert error(sums, want) < 1e-6
    assert torch.equal(_fisher.token_sums_sq(p.dy, B), sums)
    strided = torch.cat([p.dy[:, :1], p.dy], 1)[:, 1:]
    assert error(_fisher.token_sums_sq(strided, B), want) < 1e-6


def test_the_trace_is_exact_even_where_tf32_is_allowed(make_problem, error):
    p = make_problem(B=16, R=3, C=4, K=2, N=50)
    want = _reference.block_fisher(p.dy.cpu().double(), p.x.cpu().double(), 16)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        first, second = block_fisher(p.dy, p.x, 16), block_fisher(p.dy, p.x, 16)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert error(first, want) < 1e-6
    assert torch.equal(first, second)
