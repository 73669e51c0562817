"""Kernel tests. They run on a CUDA device or, at small sizes, in Triton's interpreter.

On a machine with neither, nothing here is collected: `test_triton_interpreted.py` runs this folder
in a process of its own with TRITON_INTERPRET=1. The interpreter has to be switched on before triton
is imported, so it cannot be switched on for these tests alone.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

# cuBLAS is asked for determinism below, and wants this before its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if CUDA or INTERPRETED else ["test_*.py"]
if not CUDA:
    collect_ignore_glob.append("test_cuda_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CUDA and HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every `torch.empty` with NaN: an element that no kernel wrote fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_recorded():
    """Tests put other rules in place of the shipped ones: launches are decided anew in each."""
    from blockell_kernels._triton import _replay

    _replay.forget()


@dataclass(kw_only=True)
class Problem:
    """Random operands of one shape, on the device and in float64."""

    B: int
    R: int
    C: int
    K: int
    N: int
    G: int = 1
    spare: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        from blockell_format import create_random_topology, transposed_index
        from blockell_kernels._backends import Pattern

        s, self.device = self, torch.device("cuda" if CUDA else "cpu")
        generator = torch.Generator().manual_seed(self.seed)
        cols = create_random_topology(s.R, s.C, s.K, generator=generator, row_group=s.G)
        spare = torch.full((s.R, s.spare), -1, dtype=torch.int32)
        self.cols = torch.cat([cols, spare], 1)
        index = transposed_index(self.cols, s.C)
        to = self.device
        self.pattern = Pattern(
            self.cols.to(to), s.C, s.B, s.G, s.K, index.order.to(to), index.col_start.to(to)
        )

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(s.dtype).to(to)

        self.x = random(s.N, s.C * s.B)
        self.dy = random(s.N, s.R * s.B)
        self.bias = random(s.R * s.B)
        self.values = random(s.R, s.K + s.spare, s.B, s.B)
        self.values[:, s.K :] = 0

    @property
    def operands64(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, dy, values, bias in float64 on the CPU."""
        return tuple(t.cpu().double() for t in (self.x, self.dy, self.values, self.bias))

    def expected(self) -> dict[str, Tensor]:
        """The reference's results, by name."""
        from blockell_kernels import _reference

        x, dy, values, bias = self.operands64
        return {
            "y": _reference.forward(x, values, self.cols, bias, self.K),
            "grad_input": _reference.grad_input(dy, values, self.cols, self.C, self.K),
            "grad_values": _reference.grad_values(dy, x, self.cols, self.B, self.K),
        }

    def by_dense(self) -> dict[str, Tensor]:
        """The same by torch's dense products in the problem's dtype."""
        from blockell_kernels import _dense

        pattern, dense = self.pattern, _dense.BACKEND
        return {
            "y": dense.forward(self.x, self.values, self.bias, pattern),
            "grad_input": dense.grad_input(self.dy, self.values, pattern),
            "grad_values": dense.grad_values(self.dy, self.x, pattern),
        }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error against float64; infinite where a value is not finite."""
    actual = actual.detach().cpu().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture
def make_problem():
    return Problem


@pytest.fixture
def error():
    return relative_error
