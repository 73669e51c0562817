"""The products that an MLP's activation rides on, in Gluon, against float64, by name. Hopper only.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h
pre-activation, a = f(h), dh the gradient of h.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._activation import ACTIVATIONS, activate
from blockell_kernels._gluon import _mlp as by_turns
from blockell_kernels._gluon._support import runs_on

pytestmark = pytest.mark.skipif(
    not runs_on(torch.empty(0, dtype=torch.bfloat16, device="cuda")),
    reason="needs a Hopper GPU and Triton 3.6",
)

BF16, FP16 = torch.bfloat16, torch.float16
ROUNDING = {BF16: 3e-3, FP16: 4e-4}
"""Relative error of a tensor that was computed exactly and rounded, and a little more."""
FORWARD = {
    "tile 128, one token": {"B": 128, "R": 2, "C": 3, "K": 1, "N": 1},
    "tile 128": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 411, "spare": 1},
    "tile 128, many tiles": {"B": 128, "R": 20, "C": 5, "K": 2, "N": 4100},
    "tile 64, pairs": {"B": 64, "R": 6, "C": 7, "K": 3, "N": 700, "G": 2},
    "tile 32": {"B": 32, "R": 8, "C": 9, "K": 5, "N": 129, "G": 4, "spare": 2},
    "tile 16": {"B": 16, "R": 16, "C": 37, "K": 11, "N": 1000, "G": 8},
}
MIDDLE = {
    "one token": {"B": 128, "R": 2, "C": 3, "K": 1, "N": 1},
    "empty columns": {"B": 128, "R": 1, "C": 5, "K": 1, "N": 300},
    "spare": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 411, "spare": 2},
    "many tiles": {"B": 128, "R": 5, "C": 20, "K": 10, "N": 4100},
    "too many columns to sort": {"B": 128, "R": 3, "C": 37, "K": 9, "N": 1000},
    "all present": {"B": 128, "R": 4, "C": 2, "K": 2, "N": 128},
}


def value_and_slope(h, activation):
    h = h.detach().cpu().double().requires_grad_()
    a = activate(h, activation)
    return a.detach(), torch.autograd.grad(a.sum(), h)[0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", FORWARD.values(), ids=FORWARD)
def test_forward(make_problem, error, shape, dtype):
    p = make_problem(**shape, dtype=dtype)
    assert by_turns.forward_takes(p.x, p.values, p.pattern)
    want, by_dense = p.expected()["y"], p.by_dense()["y"]
    a, h = by_turns.forward(p.x, p.values, p.bias, p.pattern, "gelu", True)
    assert error(h, want) <= 1.1 * error(by_dense, want)
    assert error(a, value_and_slope(h, "gelu")[0]) < ROUNDING[dtype]
    alone, none = by_turns.forward(p.x, p.values, p.bias, p.pattern, "gelu", False)
    assert none is None
    assert torch.equal(alone, a)


@pytest.mark.parametrize("activation", [f for f in ACTIVATIONS if f != "none"])
def test_activations(make_problem, error, activation):
    first = make_problem(**FORWARD["tile 128"], dtype=BF16)
    a, h = by_turns.forward(first.x, first.values, None, first.pattern, activation, True)
    assert error(a, value_and_slope(h, activation)[0]) < ROUNDING[BF16]
    second = make_problem(**MIDDLE["spare"], dtype=BF16)
    check_middle(second, error, activation, keep_a=True, need_bias=True, dense=False)


def check_middle(p, error, activation, *, keep_a, need_bias, dense):
    h = torch.randn(p.N, p.C * p.B, generator=torch.Generator().manual_seed(1))
    h = h.to(p.dtype).to(p.device)
    weight, pattern = p.values, p.pattern
    if dense:
        from blockell_kernels._dense import to_dense

        weight, pattern = to_dense(p.values, p.pattern), None
    else:
        assert by_turns.middle_takes(p.dy, p.values, p.pattern, h)

    def run():
        return by_turns.middle(
            p.dy, weight, pattern, h, activation, keep_a=keep_a, need_bias=need_bias
        )

    dh, a, sums = run()
    want_a, slope = value_and_slope(h, activation)
    want = p.expected()["grad_input"] * slope
    tolerance = ROUNDING[p.dtype]
    assert error(dh, want) < tolerance
    assert (a is None) == (not keep_a)
    assert a is None or error(a, want_a) < tolerance
    assert (sums is None) == (not need_bias)
    # The sum is taken before dh is rounded.
    assert sums is None or error(sums.sum(0), want.sum(0)) < tolerance
    assert torch.equal(dh, run()[0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", MIDDLE.values(), ids=MIDDLE)
def test_middle(make_problem, error, shape, dense, dtype):
    p = make_problem(**shape, dtype=dtype)
    for keep_a, need_bias in ((True, True), (False, True), (True, False), (False, False)):
        check_middle(p, error, "gelu", keep_a=keep_a, need_bias=need_bias, dense=dense)


def test_middle_by_a_dense_weight_of_any_depth(make_problem, error):
    """The depth of the products is no multiple of a stage's."""
    p = make_problem(B=8, R=13, C=32, K=9, N=200, dtype=BF16)
    check_middle(p, error, "silu", keep_a=True, need_bias=True, dense=True)
