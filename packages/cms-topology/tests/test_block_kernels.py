"""The kernels that treat many layers in one launch: what torch computes, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest
import torch

from cms_topology._blocks import block_norms, clear_blocks

RunAlone = Callable[[str, Mapping[str, str]], None]

CHECK = """
import sys, torch
from cms_topology import _averages, _blocks, _block_kernels
device = sys.argv[1]
torch.manual_seed(0)
for B, dtype in ((8, torch.float32), (16, torch.bfloat16), (128, torch.float32)):
    shapes = [(3, 5), (4, 1), (7, 2), (1, 1)]
    tensors = [torch.randn(R, K, B, B, device=device).to(dtype) for R, K in shapes]
    tensors[1][2, 0, 0, 0], tensors[2][6, 1, -1, -1] = float("inf"), float("nan")
    norms, finite = _block_kernels.norms(tensors)
    assert not finite and _block_kernels.norms([tensors[0], tensors[3]])[1]
    for got, tensor in zip(norms, tensors):
        plain = torch.linalg.vector_norm(tensor, dim=(2, 3), dtype=torch.float32)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=0, equal_nan=True)
    for got, tensor in zip(norms, tensors):
        (alone,), its = _block_kernels.norms([tensor])
        assert its == alone.isfinite().all()
        assert torch.equal(got.nan_to_num(7.0), alone.nan_to_num(7.0)), "depends on its neighbours"
    masks = [torch.rand(R, max(1, K - 1), device=device) < 0.5 for R, K in shapes]
    versions = [tensor._version for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    for tensor, mask in zip(expected, masks):
        tensor[:, : mask.shape[1]].masked_fill_(mask[:, :, None, None], 0.0)
    _block_kernels.clear(tensors, masks)
    for got, want, version in zip(tensors, expected, versions):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and got._version > version
    if device == "cuda":
        launches = _blocks._launches([*tensors, tensors[0].transpose(2, 3)])
        assert [len(members) for members, _ in launches] == [4, 1]
        assert [kernels is None for _, kernels in launches] == [False, True]
for decay in (0.95, 0.3, 0.0):
    shapes = [(3, 5), (40, 21), (1, 1)]
    def draw(): return [torch.rand(shape, device=device) for shape in shapes]
    emas, weights, scores = draw(), draw(), draw()
    ages = [torch.randint(9, shape, device=device, dtype=torch.int32) for shape in shapes]
    for finite in (torch.tensor(True, device=device), torch.tensor(False, device=device)):
        results = []
        for way in (_averages._advance, _block_kernels.advance):
            held = zip(emas, weights, ages)
            state = [_averages.Averages(*(x.clone() for x in of)) for of in held]
            way(state, scores, finite, decay)
            results.append([x for averages in state for x in averages])
        for plain, got in zip(*results):
            torch.testing.assert_close(got, plain, rtol=1e-6, atol=0)
            assert plain.is_floating_point() or torch.equal(got, plain)
        if not finite:
            assert torch.equal(got, ages[-1]) and torch.equal(results[1][0], emas[0])
print("agrees")
"""


def test_the_kernels_agree_with_torch(run_alone: RunAlone) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(CHECK, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))


SHORT_WAY = """
import copy, sys, torch
from cms_topology import CMSBlockLinear, _accumulate, _block_kernels, _blocks, _step_kernels
from cms_topology import accumulate_scores
device = sys.argv[1]
torch.manual_seed(0)
if device == "cpu":  # in the interpreter
    _step_kernels._one_launch = lambda layers: True
    _step_kernels.kernels = lambda: _block_kernels
    _accumulate.finite_block_norms = _block_kernels.norms
layers = [CMSBlockLinear(24, 40, tile_size=8, device=device), CMSBlockLinear(40, 24, tile_size=8,
          density=0.4, max_density=0.6, device=device)]
others = copy.deepcopy(layers)
short = _step_kernels.StepKernels(layers)
for step in range(4):
    for one, other in zip(layers, others):
        one.values.grad = torch.randn_like(one.values)
        if step == 2:
            one.values.grad[0, 0, 0, 0] = float("inf")
        other.values.grad = one.values.grad.clone()
    assert short.holds()
    finite = short.accumulate()
    assert finite == accumulate_scores(others) == (step != 2)
    for one, other in zip(layers, others):
        for key, value in one.scorer.state_dict().items():
            same = {"rtol": 0 if device == "cuda" else 1e-6, "atol": 0}  # torch's lerp on a CPU
            torch.testing.assert_close(value, other.scorer.state_dict()[key], **same)
assert layers[0].scorer.block_age.max() == 3
layers[0]._probe.grad = torch.zeros_like(layers[0]._probe)
assert short.accumulate() is None, "statistics of absent blocks"
layers[0]._probe.grad = layers[1].values.grad = None
assert short.accumulate() is None, "a layer without a gradient"
layers[1].scorer.score_ema = layers[1].scorer.score_ema.clone()
assert not short.holds()
if device == "cuda":
    assert not _step_kernels.StepKernels([*layers, CMSBlockLinear(32, 32, device=device)])._fits
print("agrees")
"""


def test_the_short_way_is_the_long_way(run_alone: RunAlone) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(SHORT_WAY, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))


AHEAD = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cms_topology._birth_kernels import _correct_young
from cms_topology._block_kernels import BLOCK, _advance, _block_norms, _clear_blocks
pointers = {"table_ptr": "*i64", "step_ptr": "*fp32", "last_ptr": "*fp32", "rate_ptr": "*fp32",
            "norms_ptr": "*fp32"}
floats = dict.fromkeys(("rate", "rise", "beta1", "beta2", "eps", "grown_up"), "fp32")
kinds = {"VALUES": tl.bfloat16, "MEAN": tl.float32, "SQUARE": tl.float32}
for E, slots, piece, rate in ((16384, 1, 4096, {}), (256, 16, 256, {"rate_ptr": None})):
    sizes = {"E": E, "SLOTS": slots, "PIECE": piece}
    for kernel, constants in (
        (_correct_young, sizes | kinds | rate),
        (_block_norms, sizes | {"KIND": tl.float32}),
        (_clear_blocks, {"E": E, "PIECE": piece, "KIND": tl.float16}),
        (_advance, {"SMALL": E > 256, "BLOCK": BLOCK}),
    ):
        flag = {"finite_ptr": "*i1" if kernel is _advance else "*i8"}
        signature = {
            name: "constexpr" if name in constants else (pointers | floats | flag).get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        for architecture in (80, 90):
            triton.compile(source, target=GPUTarget("cuda", architecture, 32))
print("agrees")
"""


def test_the_kernels_compile_without_a_gpu(run_alone: RunAlone) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run_alone(AHEAD, environment)


def test_what_kernels_do_not_take_is_done_one_by_one() -> None:
    tensors = [torch.randn(2, 3, 8, 8), torch.randn(2, 2, 16, 16, dtype=torch.float64)]
    for norms, tensor in zip(block_norms(tensors), tensors, strict=True):
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms, tensor.flatten(2).norm(dim=2).float())
    masks = [torch.tensor([[True, False], [False, True]]), torch.ones(2, 1, dtype=torch.bool)]
    clear_blocks(tensors, masks)
    assert [int((t == 0).all(3).all(2).sum()) for t in tensors] == [2, 2]
