"""The projection onto a drift budget: nearest point, never beyond, the same from any start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cms_topology._retention._basis import eigenbasis
from cms_topology._retention._trust_region import drift, shrink


def case(seed: int, n: int, decades: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues over some decades and energies of two layers of three units, [2, 3, n]."""
    generator = torch.Generator().manual_seed(seed)
    exponent = decades * torch.rand(2, 3, n, generator=generator, dtype=torch.float64)
    energy = torch.rand(2, 3, n, generator=generator, dtype=torch.float64)
    return 10**-exponent, energy


def bisected(spectrum: Tensor, energy: Tensor, budget: float) -> float:
    low, high = 0.0, 1e30
    for _ in range(400):
        middle = (low + high) / 2 if high < 1e3 * max(low, 1.0) else max(low, 1.0) * 10
        shrunk = energy / (1 + middle * spectrum).square()
        if float((spectrum * shrunk).sum()) > budget:
            low = middle
        else:
            high = middle
    return low


@given(
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.floats(0, 6),
    st.floats(1e-3, 2.0),
    st.floats(0.3, 3.0),
)
@settings(max_examples=25, deadline=None)
def test_the_nearest_point_within_the_budget(
    seed: int, n: int, decades: float, share: float, guess: float
) -> None:
    spectrum, energy = case(seed, n, decades)
    before = drift(spectrum, energy)
    budget = share * before
    wanted = torch.tensor(
        [bisected(s, e, float(b)) for s, e, b in zip(spectrum, energy, budget, strict=True)],
        dtype=torch.float64,
    )
    factor, found, left = shrink(spectrum, energy, budget, guess * wanted)
    after = drift(spectrum, energy * factor.square())
    torch.testing.assert_close(left, after, rtol=1e-9, atol=0)
    assert (after <= budget * (1 + 1e-9)).all()
    assert (factor <= 1).all()
    if share >= 1:
        assert (factor == 1).all()  # to the bit
        assert (found == 0).all()
    else:
        torch.testing.assert_close(after, budget, rtol=1e-3, atol=0)
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-9)
        moved = (energy * (1 - factor).square()).sum((1, 2))
        nearest = 1 / (1 + wanted[:, None, None] * spectrum)
        least = (energy * (1 - nearest).square()).sum((1, 2))
        assert (moved <= 1.001 * least + 1e-12).all()


@given(st.integers(0, 2**31), st.floats(1e-6, 0.5))
@settings(max_examples=15, deadline=None)
def test_from_any_start_the_budget_holds_and_steps_settle(seed: int, share: float) -> None:
    spectrum, energy = case(seed, 12, 3.0)
    budget = share * drift(spectrum, energy)
    start = torch.zeros(2, dtype=torch.float64)
    for _ in range(4):  # as over four steps of a training run
        factor, start, _ = shrink(spectrum, energy, budget, start)
        assert (drift(spectrum, energy * factor.square()) <= budget * (1 + 1e-9)).all()
    wanted = [bisected(s, e, float(b)) for s, e, b in zip(spectrum, energy, budget, strict=True)]
    torch.testing.assert_close(start, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=0)


def test_nothing_drifts_where_nothing_can() -> None:
    zero = torch.zeros(2, 3, 4, dtype=torch.float64)
    budget = torch.full((2,), 1e-3, dtype=torch.float64)
    for spectrum, energy in ((zero, zero + 1), (zero + 1, zero)):
        factor, found, _ = shrink(spectrum, energy, budget, budget)
        assert (factor == 1).all()
        assert (found == 0).all()


@given(st.integers(0, 2**31), st.integers(1, 16), st.integers(1, 24), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_leading_directions_bound_the_covariance_tightly(
    seed: int, n: int, tokens: int, decades: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, n, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -decades, n, dtype=torch.float64)
    K = x.mT @ x / tokens
    basis = eigenbasis(K, torch.float64)
    U = basis.vectors
    outside = torch.eye(n, dtype=torch.float64) - U @ U.mT
    bound = (U * basis.values[:, None]) @ U.mT + basis.rest[:, None, None] * outside
    trace = K.diagonal(dim1=1, dim2=2).sum(1)
    excess = torch.linalg.eigvalsh(bound - K)
    assert (excess >= -1e-6 * trace[:, None]).all()  # never too small, beyond the noise floor
    assert (excess.sum(1) <= 2e-4 * trace).all()
    same = eigenbasis(K, torch.float64, basis.rank)
    torch.testing.assert_close(same.values, basis.values)
    padded = basis.padded(n + 3)
    assert padded.rank == n + 3
    assert torch.equal(padded.cut(basis.rank).vectors, U)


KERNEL = """
import sys, torch
from cms_topology._retention import _trust_region, _trust_region_kernel
from cms_topology._retention._trust_region import ITERATIONS, drift, shrink_by_torch
device = sys.argv[1]
torch.manual_seed(0)
for L, G, n in ((1, 1, 1), (3, 2, 7), (2, 3, 342), (2, 1, 1024), (1, 5, 1281)):
    spectrum = 10 ** (-4 * torch.rand(L, G, n, dtype=torch.float64, device=device))
    spectrum[..., n // 2 + 1 :] = 0.0
    energy = torch.rand(L, G, n, dtype=torch.float64, device=device)
    if L > 2:
        energy[2] = 0.0  # nothing has moved
    for share in (1e-4, 0.3, 1.01, 2.0):
        budget = (share * drift(spectrum, energy)).clamp(min=1e-6)
        start = torch.rand(L, dtype=torch.float64, device=device)
        expected = shrink_by_torch(spectrum, energy, budget, start)
        found = _trust_region_kernel.shrink(spectrum, energy, budget, start, ITERATIONS)
        for name, got, want in zip(("factor", "multiplier", "left"), found, expected):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-300, msg=f"{name} {L, G, n}")
        assert (found[2] <= budget * (1 + 1e-9)).all()
        if share >= 1:
            assert (found[0] == 1).all() and (found[1] == 0).all()
        if device == "cuda":
            chosen = _trust_region.shrink(spectrum, energy, budget, start)
            assert all(torch.equal(a, b) for a, b in zip(chosen, found))
print("agrees")
"""


def test_the_kernel_agrees_with_torch(run_alone: Callable[[str, Mapping[str, str]], None]) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(KERNEL, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))
