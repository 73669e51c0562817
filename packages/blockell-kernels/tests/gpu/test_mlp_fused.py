"""The fused MLP on kernels that carry the activation, against two layers in float64, by name.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_format import to_dense
from blockell_kernels import block_ell_mlp
from blockell_kernels._activation import activate
from blockell_kernels._triton import _mlp, _replay
from blockell_kernels._triton._tiling import Tiling

NAMES = ("x", "values1", "bias1", "values2", "bias2")


@pytest.fixture
def carried(monkeypatch):
    """Take the fused kernels at any size, and count the two of them: no launch is replayed."""
    calls = []
    monkeypatch.setattr(_replay, "_gpu_of", lambda t: None)

    def counted(name):
        run = getattr(_mlp, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(_mlp, name, wrapper)

    monkeypatch.setattr(_mlp.rule, "FEW_TOKENS", 0)
    monkeypatch.setattr(_mlp.rule, "FORWARD_TOKENS", 0)
    tiling = Tiling(path="descriptors", BM=16, BN=64, BK=32, store_parts=2)
    monkeypatch.setattr(_mlp.rule, "middle_tiling_for", lambda case, keep_a: tiling)
    counted("_forward_activated")
    counted("grad_input_activated")
    return calls


@pytest.mark.parametrize(
    ("activation", "recompute", "bias"),
    [("gelu", "activation", True), ("silu", "hidden", True), ("relu", "none", False)],
)
def test_by_name(make_problem, error, carried, activation, recompute, bias):
    first = make_problem(B=64, R=3, C=2, K=1, N=17, spare=1)
    second = make_problem(B=64, R=2, C=3, K=2, N=17, seed=1)
    biases = (first.bias, second.bias) if bias else (None, None)
    operands = (first.x, first.values, biases[0], second.values, biases[1])
    inputs = [None if t is None else t.clone().requires_grad_() for t in operands]
    x, values1, bias1, values2, bias2 = inputs
    cols1, cols2 = first.pattern.col_indices, second.pattern.col_indices
    y = block_ell_mlp(
        x, values1, cols1, bias1, values2, cols2, bias2, activation,
        num_live1=1, recompute=recompute, backend="triton",
    )  # fmt: skip
    y.backward(second.dy)
    again = ["_forward_activated"] if recompute == "hidden" else []
    assert carried == ["_forward_activated", *again, "grad_input_activated"]

    exact = [None if t is None else t.cpu().double().requires_grad_() for t in operands]
    weight1 = to_dense(exact[1][:, :1], first.cols[:, :1], 3, 2, 1, 64)
    weight2 = to_dense(exact[3], second.cols, 2, 3, 2, 64)
    h = torch.nn.functional.linear(exact[0], weight1, exact[2])
    want = torch.nn.functional.linear(activate(h, activation), weight2, exact[4])
    want.backward(second.dy.cpu().double())
    assert error(y, want.detach()) < 4e-6
    for name, got, expected in zip(NAMES, inputs, exact, strict=True):
        if got is not None:
            assert error(got.grad, expected.grad) < 4e-6, name


@pytest.mark.parametrize(
    ("activation", "recompute"), [("gelu", "activation"), ("gelu", "none"), ("none", "none")]
)
def test_h_gives_its_memory_away_only_when_it_is_needed_no_more(
    make_problem, carried, activation, recompute
):
    first = make_problem(B=64, R=3, C=2, K=1, N=17)
    second = make_problem(B=64, R=2, C=3, K=2, N=17, seed=1)
    inputs = [t.clone().requires_grad_() for t in (first.x, first.values, second.values)]
    x, values1, values2 = inputs
    cols1, cols2 = first.pattern.col_indices, second.pattern.col_indices
    y = block_ell_mlp(
        x, values1, cols1, first.bias, values2, cols2, None, activation,
        recompute=recompute, backend="triton",
    )  # fmt: skip
    grads = [torch.autograd.grad(y, inputs, second.dy, retain_graph=True) for _ in range(2)]
    grads.append(torch.autograd.grad(y, inputs, second.dy))
    assert carried == ["_forward_activated", *["grad_input_activated"] * 3]
    for again in grads[1:]:
        assert all(map(torch.equal, again, grads[0]))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, inputs, second.dy)
