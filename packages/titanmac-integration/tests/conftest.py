"""Shared fixtures: models small enough for one core."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from titanmac_integration import TitanMACConfig

SEEDED = "import torch\ntorch.manual_seed(0)\n"
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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., TitanMACConfig]:
    """A function that makes a tiny configuration, with the given fields replaced."""

    def make(**changes: Any) -> TitanMACConfig:
        return TitanMACConfig(**{**TINY, **changes})

    return make


@pytest.fixture
def assert_agrees() -> Callable[[str], None]:
    """Runs a check of Triton kernels in a process of its own, in the interpreter without a GPU.

    The check takes a device from ``sys.argv`` and prints "agrees".
    """

    def run(check: str) -> None:
        pytest.importorskip("triton")
        gpu = torch.cuda.is_available()
        done = subprocess.run(
            [sys.executable, "-c", SEEDED + check, "cuda" if gpu else "cpu"],
            env=os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == "agrees", done.stderr[-2000:]

    return run
