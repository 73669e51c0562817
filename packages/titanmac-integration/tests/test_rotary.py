"""Rotary positions: rotations of pairs, by angles that only differences of positions decide."""

from collections.abc import Callable

import torch

from titanmac_integration._layers._rotary import rotary_table, rotate

LENGTH, HEADS, WIDTH, BASE = 7, 3, 8, 100.0


def test_halves_are_the_parts_of_complex_numbers() -> None:
    x = torch.randn(2, LENGTH, 2, HEADS, WIDTH, dtype=torch.float64)
    position = torch.arange(5, 5 + LENGTH, dtype=torch.float64)
    frequency = BASE ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turn = torch.polar(torch.ones(LENGTH, WIDTH // 2).double(), position[:, None] * frequency)
    left, right = x.chunk(2, dim=-1)
    turned = torch.complex(left, right) * turn[:, None, None]
    got = rotate(x, *rotary_table(LENGTH, WIDTH, BASE, start=5))
    # the angles are single precision
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(WIDTH, generator=generator).expand(1, LENGTH, 1, 1, WIDTH) for _ in range(2)
    )
    scores = []
    for start in (0, 11):
        table = rotary_table(LENGTH, WIDTH, BASE, start=start)
        q, k = rotate(query, *table).squeeze(), rotate(key, *table).squeeze()
        scores.append(q @ k.T)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    next_one = scores[0].diagonal(1)
    torch.testing.assert_close(next_one, next_one[:1].expand_as(next_one), rtol=1e-4, atol=1e-4)
    assert (scores[0][0] - scores[0][0, 0]).abs().max() > 1e-3


CHECK = """
import sys, torch
from titanmac_integration._layers import _rotary, _rotary_kernels
device = sys.argv[1]
_rotary_kernels.ROWS = 16
calls = []
turn = _rotary_kernels.turn
_rotary_kernels.turn = lambda *a, **k: (calls.append(k["sign"]), turn(*a, **k))
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for n, width in ((3, 8), (2, 12)):
        table = _rotary.rotary_table(11, width, 100.0, start=4, device=device)
        rows = (table[0][4:], table[1][4:])
        wide = torch.randn(2, 9, 5, 3, width, dtype=dtype, device=device)[:, 2:]
        results = []
        for kernel in (False, True):
            _rotary._on_gpu = lambda x: kernel
            heads = wide[:, :, 5 - n:].detach().requires_grad_()
            parts = _rotary.turned_parts(heads, rows)
            assert len(parts) == n and parts[0].shape == (2, 3, 7, width)
            loss = sum((i + 1) * p.float().pow(3).sum() for i, p in enumerate(parts[1:]))
            loss = loss + parts[0].sum()  # a gradient without strides
            (first,) = torch.autograd.grad(loss, heads, create_graph=True)
            (second,) = torch.autograd.grad(first.float().pow(2).sum(), heads)
            results.append([*parts, first, second])
        for plain, got in zip(*results, strict=True):
            assert got.dtype == plain.dtype
            error = (got.float() - plain.float()).norm() / plain.float().norm()
            assert error < tolerance, float(error)
assert min(calls.count(sign) for sign in (1, -1)) > 2
print("agrees")
"""


def test_the_kernel_agrees_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """Values, first and second derivatives; in Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)
