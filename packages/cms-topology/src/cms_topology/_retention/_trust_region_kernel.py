# mypy: ignore-errors
"""A Triton kernel that finds the nearest point within a budget of drift, in one launch.

Legend: L layers, N directions of all units of a layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Directions that a program holds at a time."""


@triton.jit
def _shrink(
    spectrum_ptr,  # float64 [L, N], eigenvalues
    energy_ptr,  # float64 [L, N], squares of the displacement along them
    budget_ptr,  # float64 [L]
    start_ptr,  # float64 [L]
    factor_ptr,  # float64 [L, N], written
    multiplier_ptr,  # float64 [L], written
    after_ptr,  # float64 [L], written
    N,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    at = layer.to(tl.int64) * N
    budget = tl.load(budget_ptr + layer)
    lam = tl.load(start_ptr + layer)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(spectrum_ptr + at + i, i < N, other=0.0)
        total += s * tl.load(energy_ptr + at + i, i < N, other=0.0)
    before = tl.sum(total, 0)
    for _ in range(ITERATIONS):
        drift = tl.zeros((BLOCK,), tl.float64)
        slope = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, N, BLOCK):
            i = first + tl.arange(0, BLOCK)
            s = tl.load(spectrum_ptr + at + i, i < N, other=0.0)
            inside = s * tl.load(energy_ptr + at + i, i < N, other=0.0)
            shrunk = 1.0 / (1.0 + lam * s)
            drift += inside * shrunk * shrunk
            slope += inside * s * shrunk * shrunk * shrunk
        D, Q = tl.sum(drift, 0), tl.sum(slope, 0)
        step = D * (tl.sqrt(D / budget) - 1.0) / Q
        lam = tl.maximum(lam + tl.where(Q > 0.0, step, 0.0), 0.0)
    lam = tl.where(before > budget, lam, 0.0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(spectrum_ptr + at + i, i < N, other=0.0)
        shrunk = 1.0 / (1.0 + lam * s)
        total += s * tl.load(energy_ptr + at + i, i < N, other=0.0) * shrunk * shrunk
    left = tl.sum(total, 0)
    scale = tl.where(left > budget, tl.sqrt(budget / left), 1.0)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(spectrum_ptr + at + i, i < N, other=0.0)
        factor = tl.where(s > 0.0, scale / (1.0 + lam * s), 1.0)
        tl.store(factor_ptr + at + i, factor, i < N)
    tl.store(multiplier_ptr + layer, lam)
    tl.store(after_ptr + layer, left * scale * scale)


def shrink(
    spectrum: Tensor, energy: Tensor, budget: Tensor, start: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_trust_region.shrink`."""
    spectrum, energy = spectrum.contiguous(), energy.contiguous()
    factor, multiplier, after = (torch.empty_like(t) for t in (spectrum, budget, budget))
    _shrink[(spectrum.shape[0],)](
        spectrum,
        energy,
        budget,
        start,
        factor,
        multiplier,
        after,
        spectrum[0].numel(),
        iterations,
        BLOCK,
    )
    return factor, multiplier, after
