"""Shared fixtures: models small enough for one core."""

from collections.abc import Callable
from typing import Any

import pytest

from titanmac_integration import TitanMACConfig

TINY: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "d_ff": 64,
    "max_seq_len": 64,
    "window_size": 8,
    "n_persistent": 2,
    "block_sparse_tile_size": 8,
    "block_sparse_layers": None,
    "block_sparse_row_group": 1,
}


@pytest.fixture
def tiny_config() -> Callable[..., TitanMACConfig]:
    """A function that makes a tiny configuration, with the given fields replaced."""

    def make(**changes: Any) -> TitanMACConfig:
        return TitanMACConfig(**{**TINY, **changes})

    return make
