"""What `explain_mlp` says."""

from __future__ import annotations

import pytest
import torch

from blockell_format import create_random_topology
from blockell_kernels import explain_mlp


def operands(device="cpu", N=10):
    cols1 = create_random_topology(8, 4, 2, torch.Generator().manual_seed(0)).to(device)
    cols2 = create_random_topology(4, 8, 4, torch.Generator().manual_seed(0)).to(device)
    values1, values2 = (torch.randn(*cols.shape, 16, 16, device=device) for cols in (cols1, cols2))
    return torch.randn(N, 64, device=device), values1, cols1, None, values2, cols2, None


def test_names_every_product_and_where_the_activation_is():
    said = explain_mlp(*operands(), "silu", index1=None, recompute="hidden")
    lines = str(said).split("\n")
    assert [line.split(":")[0] for line in lines] == [
        f"{layer} layer, {direction}"
        for layer in ("first", "second")
        for direction in ("forward", "grad_input", "grad_values")
    ] + ["activation", "slope"]
    assert said.activation == said.slope == "a pass of its own, as everywhere but on a GPU"
    assert said.second.forward.backend == "dense"  # small, with free rows


def test_follows_the_backend_and_checks_its_operands():
    x, values1, cols1, *rest = operands()
    assert explain_mlp(x, values1, cols1, *rest, backend="dense").first.forward.backend == "dense"
    assert explain_mlp(x[:0], values1, cols1, *rest).slope
    assert explain_mlp(x.view(2, 5, 64), values1, cols1, *rest).slope
    with pytest.raises(ValueError, match=r"activation \(='tanh'\) must be one of"):
        explain_mlp(x, values1, cols1, *rest, "tanh")
