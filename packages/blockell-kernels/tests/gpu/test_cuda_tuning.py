"""A tuning run on the device, from measurement to `explain`."""

from __future__ import annotations

import pytest
import torch

from blockell_kernels import _tuning, explain
from blockell_kernels.tune import Layout, Shape, tune


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Products are timed here, not compared."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKELL_TUNING", str(tmp_path))
    _tuning.forget()
    yield tmp_path
    _tuning.forget()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_was_measured_decides_and_is_named(make_problem, folder):
    lines = []
    path = tune(
        [Shape(128, 256)],
        layouts=[Layout(16, 8)],
        tokens=[32, 256],
        densities=[0.5],
        report=lines.append,
    )
    assert path.parent == folder
    assert len(lines) == 6
    for N in (32, 256, 300):
        problem = make_problem(B=16, R=16, C=8, K=4, N=N, G=8, dtype=torch.bfloat16)
        said = explain(problem.x, problem.values, problem.pattern.col_indices, row_group=problem.G)
        for choice in said:
            assert "tuning cache" in choice.why
            sparse, dense = (
                float(choice.why.split(f" us {word}")[0].split()[-1])
                for word in ("sparse", "dense")
            )
            assert sparse > 0
            assert dense > 0
            assert choice.backend == ("triton" if sparse <= dense else "dense") or sparse == dense
    problem = make_problem(B=16, R=16, C=8, K=4, N=4096, G=8, dtype=torch.bfloat16)
    said = explain(problem.x, problem.values, problem.pattern.col_indices, row_group=problem.G)
    assert "tuning cache" not in said.forward.why
