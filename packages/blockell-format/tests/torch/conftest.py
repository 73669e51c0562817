"""Fixtures and strategies of the torch tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blockell_format import BlockELLFormat, create_random_topology


def make_matrix(
    R: int = 6,
    C: int = 5,
    K: int = 3,
    B: int = 2,
    *,
    row_group: int = 1,
    spare: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> BlockELLFormat:
    """A random matrix whose slots are not sorted by column."""
    generator = torch.Generator().manual_seed(seed)
    columns = create_random_topology(R, C, K, generator, row_group)
    columns = columns[:, torch.randperm(K, generator=generator)]
    columns = torch.nn.functional.pad(columns, (0, spare), value=-1)
    values = torch.randn(R, K + spare, B, B, generator=generator).to(dtype)
    values[:, K:] = 0
    return BlockELLFormat(values, columns, C, row_group)


@pytest.fixture
def matrix_maker() -> Callable[..., BlockELLFormat]:
    return make_matrix
