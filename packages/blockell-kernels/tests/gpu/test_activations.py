"""Activation functions in the kernels, against torch's in float64, by name.

Legend: h pre-activation, a = f(h), da and dh the gradients of a loss in a and h.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._activation import ACTIVATIONS, activate, activation_gradient
from blockell_kernels._triton import _activate, _forward, _mlp
from blockell_kernels._triton._tiling import Tiling

# numpy's, of infinities in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CUDA = torch.cuda.is_available()
FUNCTIONS = [name for name in ACTIVATIONS if name != "none"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Against float64 on the same inputs. The interpreter rounds to bfloat16 towards zero.
TOLERANCE = {FP32: 2e-6, FP16: 4e-4, BF16: 3e-3 if CUDA else 5e-3}
SMALL = {"BM": 16, "BN": 32, "BK": 16}
SUMMED = [(0, 8), (1, 200), (200, 8), (133, 200)]
if CUDA:
    SUMMED.append((64 * 65535 + 1, 8))  # more token tiles than the second axis of a grid takes
EPILOGUES = [("gelu", True), ("silu", False), ("none", True), ("none", False)]
TILINGS = {
    "pointers": Tiling(**SMALL),
    "descriptors": Tiling(path="descriptors", **SMALL),
    "packed": Tiling(path="packed", BM=16, BN=64, BK=32, store_parts=2),
    "persistent": Tiling(path="descriptors", persistent=1, store_parts=2, BM=16, BN=128, BK=32),
}


def inputs(dtype):
    h = torch.cat(
        [torch.linspace(-9, 9, 4001 if CUDA else 901), torch.randn(1000 if CUDA else 100)]
    ).to(dtype)
    device = "cuda" if CUDA else "cpu"
    return h.to(device), torch.randn(h.shape).to(dtype).to(device)


@pytest.mark.parametrize("dtype", TOLERANCE if CUDA else [FP32, BF16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_slopes(error, name, dtype):
    h, da = inputs(dtype)
    h64, da64 = h.cpu().double(), da.cpu().double()
    a = _activate.activate(h, name)
    assert error(a, activate(h64, name)) < TOLERANCE[dtype]
    dh, again, sums = _activate.gradient(da, h, name, recompute=True, need_sum=True)
    assert error(dh, activation_gradient(da64, h64, name)) < TOLERANCE[dtype]
    assert torch.equal(again, a)
    assert torch.equal(sums, dh.float()[None])
    assert torch.equal(_activate.gradient(da, h, name, recompute=False)[0], dh)
    kept = (again.clone(), sums.clone())
    over, again, sums = _activate.gradient(
        da, h, name, recompute=True, need_sum=True, overwrite=True
    )
    assert over.data_ptr() == da.data_ptr()
    assert torch.equal(over, dh)
    assert torch.equal(again, kept[0])
    assert torch.equal(sums, kept[1])
    # near zero and in the tails, where a norm sees nothing
    worst = (a.cpu().double() - activate(h64, name)).abs().max()
    assert worst < 9 * 2 * TOLERANCE[dtype]
    small = h.abs() < 1e-2
    assert error(a[small], activate(h64[small.cpu()], name)) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("N", "width"), SUMMED)
def test_sums_of_gradients_over_tokens(error, N, width):
    for dtype in (FP32, BF16) if CUDA else (FP32,):
        t = torch.randn(N, width).to(dtype)
        t = t.cuda() if CUDA else t
        dh, a, sums = _activate.gradient(t, t, "relu", recompute=False, need_sum=True)
        assert a is None
        assert error(sums.sum(0), dh.cpu().double().sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_and_inf(name, dtype):
    h = torch.tensor([float("nan"), float("inf"), 1.0] * 8, dtype=dtype)
    h = h.cuda() if CUDA else h
    got, want = _activate.activate(h, name).cpu(), activate(h.cpu().double(), name)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    dh = _activate.gradient(torch.ones_like(h), h, name, recompute=False)[0].cpu()
    want = activation_gradient(torch.ones(24).double(), h.cpu().double(), name)
    assert torch.equal(dh.isnan(), want.isnan())


@pytest.mark.parametrize(("name", "keep_pre"), EPILOGUES if CUDA else EPILOGUES[:2])
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_in_the_forward_epilogue(make_problem, error, tiling, name, keep_pre):
    for dtype in (FP32, BF16) if CUDA else (BF16 if keep_pre else FP32,):
        N = 37 if CUDA else 19
        p = make_problem(B=32, R=4 if CUDA else 2, C=3, K=2, N=N, G=2, spare=1, dtype=dtype)
        arguments = (p.x, p.values, p.bias, p.pattern, tiling)
        a, pre = _forward.forward_activated(*arguments, name, keep_pre)
        h = _forward.forward(*arguments)
        assert torch.equal(a, h if name == "none" else _activate.activate(h, name))
        assert error(a, activate(p.expected()["y"], name)) < 3 * TOLERANCE[dtype]
        if keep_pre:
            assert torch.equal(pre, h)
        else:
            assert pre is None


MIDDLES = {
    "tile 64": ({"B": 64, "R": 2, "C": 3, "K": 1, "N": 19}, {"BN": 64, "BK": 64}),
    "tile 64, group": ({"B": 64, "R": 2, "C": 2, "K": 1, "N": 20, "G": 2}, {"BN": 64, "BK": 32}),
    "tile 128": ({"B": 128, "R": 1, "C": 2, "K": 1, "N": 16, "spare": 1}, {"BN": 128, "BK": 64}),
}


@pytest.mark.parametrize("wanted", [(True, True), (False, False)] if CUDA else [(True, True)])
@pytest.mark.parametrize("options", [{}, {"persistent": 1, "store_parts": 2}])
@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_in_the_epilogue_of_the_input_gradient(make_problem, error, middle, options, wanted):
    """Empty columns (K = 1 of several) get zero gradients, and a bias gradient of zero."""
    shape, sizes = middle
    p = make_problem(**shape, dtype=FP32 if options else BF16)
    tiling = Tiling(path="descriptors", BM=16, **sizes, **options)
    pre = torch.randn_like(p.x)
    da64, h64 = p.expected()["grad_input"], pre.cpu().double()
    keep_a, need_bias = wanted
    got = _mlp.grad_input_activated(
        p.dy, p.values, p.pattern, pre, "gelu", keep_a=keep_a, need_bias=need_bias, tiling=tiling
    )
    want = activation_gradient(da64, h64, "gelu")
    tolerance = TOLERANCE[p.dtype] * 2
    assert error(got.dh, want) < tolerance
    assert (got.a is None) == (not keep_a)
    assert (got.sums is None) == (not need_bias)
    if keep_a:
        assert torch.equal(got.a, _activate.activate(pre, "gelu"))
    if need_bias:
        assert error(got.sums.sum(0), want.sum(0)) < 2 * tolerance


def test_rows_that_descriptors_cannot_read_are_left_to_others(make_problem):
    p = make_problem(B=64, R=2, C=2, K=1, N=9)
    dy = torch.cat([p.dy[:, :1], p.dy], 1)[:, 1:]
    got = _mlp.grad_input_activated(
        dy, p.values, p.pattern, p.x, "relu", keep_a=True, need_bias=True,
        tiling=Tiling(path="descriptors", BM=16, BN=64, BK=64),
    )  # fmt: skip
    assert got is None
