"""Sums over tokens, against float64."""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._triton._sums import column_sums

CUDA = torch.cuda.is_available()
SHAPES = [(0, 70), (1, 8), (65, 70), (4000, 640), (70000, 33)] if CUDA else [(0, 70), (300, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_column_sums(error, shape, dtype):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = t.cuda() if CUDA else t
    want = t.cpu().double().sum(0)
    sums = column_sums(t, torch.float32)
    assert error(sums, want) < 1e-6
    assert torch.equal(column_sums(t, torch.float32), sums)
    assert torch.equal(column_sums(t, torch.float16), sums.half())
    strided = torch.cat([t[:, :1], t], 1)[:, 1:]
    assert error(column_sums(strided, torch.float32), want) < 1e-6
