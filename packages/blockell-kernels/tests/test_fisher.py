"""The per-token Fisher trace against outer products, token by token."""

import pytest
import torch

from blockell_kernels import _reference as reference
from blockell_kernels import block_fisher, block_grad_norms
from blockell_kernels._fisher import token_sums_sq


def operands(N, R, C, B, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, n * B, generator=g).to(dtype) for n in (R, C))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (1, 3, 1, 8), (7, 5, 3, 16), (63, 1, 2, 8)], ids=str
)
def test_against_the_reference(shape, dtype):
    B = shape[-1]
    dy, x = operands(*shape, dtype)
    want = reference.block_fisher(dy.double(), x.double(), B)
    got = block_fisher(dy, x, B)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0.0
    )


def test_a_single_token_is_its_gradient_norm_and_many_are_not():
    dy, x = operands(1, 4, 3, 8)
    torch.testing.assert_close(block_fisher(dy, x, 8), block_grad_norms(dy, x, 8).square())
    dy, x = operands(200, 4, 3, 8)
    assert not torch.allclose(block_fisher(dy, x, 8), block_grad_norms(dy, x, 8).square(), rtol=0.1)


def test_tokens_add_up_in_any_layout():
    dy, x = operands(24, 4, 3, 8)
    whole = block_fisher(dy, x, 8)
    parts = block_fisher(dy[:10], x[:10], 8) + block_fisher(dy[10:], x[10:], 8)
    torch.testing.assert_close(parts, whole)
    strided = block_fisher(dy.view(2, 3, 4, -1), x.T.contiguous().T.reshape(2, 3, 4, -1), 8)
    assert torch.equal(strided, whole)
    torch.testing.assert_close(block_fisher(dy.T.contiguous().T, x, 8), whole)
    assert torch.equal(block_fisher(dy, x, 8), whole)


def test_parts_of_the_tokens_at_a_time(monkeypatch):
    from blockell_kernels import _fisher

    dy, _ = operands(50, 4, 3, 8)
    whole = token_sums_sq(dy, 8)
    monkeypatch.setattr(_fisher, "SUM_ELEMENTS_CPU", 7 * 32)
    assert torch.equal(token_sums_sq(dy, 8), whole)


def test_large_and_small_gradients_keep_their_trace():
    """What float32 holds of a square, 1e-38 to 1e38, is neither rounded nor lost in the product."""
    dy, x = operands(31, 2, 2, 8)
    want = block_fisher(dy, x, 8)
    torch.testing.assert_close(block_fisher(dy * 1e-12, x * 1e9, 8) * 1e6, want)
