"""The operator on a CUDA device: autograd, compilation, graphs, autocast, checkpointing.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_format import transposed_index
from blockell_kernels import (
    _dense,
    _reference,
    block_ell_linear,
    block_grad_norms,
    explain,
    probe_size,
)

SHAPE = {"B": 32, "R": 8, "C": 6, "K": 3, "N": 70, "G": 4}
BACKENDS = ["triton", "dense", "auto"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Compilers and graphs allocate in their own ways; the kernels' own tests poison memory."""


class Layer(torch.nn.Module):
    """The operands of a problem as a layer."""

    def __init__(self, problem, backend="triton", **options):
        super().__init__()
        self.values = torch.nn.Parameter(problem.values.clone())
        self.bias = torch.nn.Parameter(problem.bias.clone())
        self.cols = problem.pattern.col_indices.clone()
        self.C = problem.C
        self.index = transposed_index(self.cols, self.C)
        self.options = {"row_group": problem.G, "num_live": problem.K, "backend": backend}
        self.options |= options

    def forward(self, x):
        return block_ell_linear(
            x, self.values, self.cols, self.bias, index=self.index, **self.options
        )


def gradients(layer, x, dy):
    """y and every gradient, by name."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    grads = {"x": x.grad, "values": layer.values.grad, "bias": layer.bias.grad}
    return {"y": y.detach()} | {name: g.clone() for name, g in grads.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_by_name(make_problem, error, dtype, backend):
    problem = make_problem(**SHAPE, dtype=dtype, spare=1)
    expected = problem.expected()
    expected["bias"] = problem.operands64[1].sum(0)
    tolerance = 3e-6 if dtype == torch.float32 else 5e-3
    actual = gradients(Layer(problem, backend), problem.x, problem.dy)
    for ours, name in (("y", "y"), ("x", "grad_input"), ("values", "grad_values")):
        assert error(actual[ours], expected[name]) < tolerance, name
    assert error(actual["bias"], expected["bias"]) < tolerance


def test_opcheck(make_problem):
    problem = make_problem(B=16, R=4, C=3, K=2, N=18, G=2)
    layer = Layer(problem)
    x = problem.x.requires_grad_()
    order, start = layer.index.order, layer.index.col_start
    arguments = (x, layer.values, layer.cols, layer.bias, None, order, start, 2, 2, "none")
    torch.library.opcheck(torch.ops.blockell.linear.default, (*arguments, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole(make_problem, backend):
    """One graph; a topology changed in place is followed without a recompilation."""
    problem = make_problem(**SHAPE, dtype=torch.bfloat16)
    layer = Layer(problem, backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    eager, actual = (gradients(f, problem.x, problem.dy) for f in (layer, _Keep(layer, compiled)))
    for name in eager:
        assert torch.equal(eager[name], actual[name]), name
    other = make_problem(**SHAPE, seed=1).pattern.col_indices
    layer.cols.copy_(other)
    transposed_index(layer.cols, layer.C, out=layer.index)
    with torch._dynamo.config.patch(error_on_recompile=True):
        eager, actual = (
            gradients(f, problem.x, problem.dy) for f in (layer, _Keep(layer, compiled))
        )
    for name in eager:
        assert torch.equal(eager[name], actual[name]), name


class _Keep:
    """A compiled layer that still answers for the layer's parameters."""

    def __init__(self, layer, compiled):
        self.layer, self.compiled = layer, compiled

    def __call__(self, x):
        return self.compiled(x)

    def __getattr__(self, name):
        return getattr(self.layer, name)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_in_a_cuda_graph(make_problem, backend):
    """A replay follows new inputs, new weights and a topology changed in place."""
    problem = make_problem(**SHAPE, dtype=torch.bfloat16)
    layer = Layer(problem, backend)
    x = problem.x.clone().requires_grad_()

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, layer.values, layer.bias], problem.dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = make_problem(**SHAPE, seed=1)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.values.copy_(torch.randn_like(layer.values))
        layer.cols.copy_(other.pattern.col_indices)
        transposed_index(layer.cols, layer.C, out=layer.index)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


def test_autocast(make_problem, error):
    problem = make_problem(**SHAPE)
    expected = problem.expected()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = gradients(Layer(problem), problem.x, problem.dy.bfloat16())
    assert actual["y"].dtype == torch.bfloat16
    assert actual["values"].dtype == torch.float32
    assert error(actual["y"], expected["y"]) < 1e-2
    assert error(actual["values"], expected["grad_values"]) < 1e-2
    assert error(actual["x"], expected["grad_input"]) < 1e-2


@pytest.mark.parametrize("sample", ["none", "norms", "gradient"])
@pytest.mark.parametrize("backend", ["triton", "dense"])
def test_statistics_and_checkpointing(make_problem, error, backend, sample):
    """Recomputed under activation checkpointing, the statistics count once."""
    problem = make_problem(**SHAPE)
    probe = torch.zeros(probe_size(8, 6), device="cuda", requires_grad=True)
    layer = Layer(problem, backend, probe=probe, sample=sample)
    x = problem.x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).backward(problem.dy)
    expected = problem.expected()
    assert error(layer.values.grad, expected["grad_values"]) < 3e-6
    if sample == "none":
        assert probe.grad is None
        return
    x64, dy64, _, _ = problem.operands64
    assert error(probe.grad[:8], dy64.square().sum(0).view(8, 32).sum(1)) < 1e-6
    assert error(probe.grad[8:14], x64.square().sum(0).view(6, 32).sum(1)) < 1e-6
    norms = _reference.block_grad_norms(dy64, x64, 32)
    if sample == "gradient":
        assert error(probe.grad[14:].view(8, 6), norms.square()) < 3e-6
        assert error(block_grad_norms(problem.dy, problem.x, 32), norms) < 3e-6
    else:
        assert not probe.grad[14:].any()


def test_no_call_waits_for_the_device(make_problem):
    """Neither a step nor the rebuilding of the derived index."""
    problem = make_problem(**SHAPE)
    cols = problem.pattern.col_indices
    index = transposed_index(cols, 6)
    layer = Layer(problem)
    try:
        torch.cuda.set_sync_debug_mode("error")
        transposed_index(cols, 6, out=index)
        layer(problem.x).backward(problem.dy)
        _dense.to_dense(problem.values, problem.pattern)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_past_two_to_the_31(error):
    """N*in above 2^31 elements: the last tokens are read and written where they lie."""
    B, R, C, N = 128, 1, 64, 2**18 + 129
    x = torch.zeros(N, C * B, dtype=torch.bfloat16, device="cuda")
    x[-200:] = torch.randn(200, C * B, device="cuda").bfloat16()
    cols = torch.tensor([[63, 5]], dtype=torch.int32, device="cuda")
    values = torch.randn(R, 2, B, B, device="cuda").bfloat16().requires_grad_()
    x.requires_grad_()
    y = block_ell_linear(x, values, cols, backend="triton")
    y.backward(y.detach())
    tail = x.detach()[-200:].cpu().double()
    v = values.detach().cpu().double()
    expected = _reference.forward(tail, v, cols.cpu(), None)
    assert error(y[-200:], expected) < 5e-3
    assert not y[:-200].any()
    dy = y.detach()[-200:].cpu().double()
    assert error(x.grad[-200:], _reference.grad_input(dy, v, cols.cpu(), C)) < 5e-3
    assert error(values.grad, _reference.grad_values(dy, tail, cols.cpu(), B)) < 5e-3


def test_explain_names_the_choice_and_the_reason(make_problem):
    problem = make_problem(B=128, R=8, C=8, K=2, N=4096, dtype=torch.bfloat16)
    said = explain(problem.x, problem.values, problem.pattern.col_indices, problem.bias)
    assert said.forward.backend == "triton"
    assert "at density 0.25 takes 0." in said.forward.why
    assert said.forward.why.endswith("; by its live blocks, in time in proportion to them")
    free = make_problem(B=16, R=64, C=64, K=48, N=4096, dtype=torch.bfloat16)
    said = explain(free.x, free.values, free.pattern.col_indices, free.bias)
    assert said.forward.backend == "dense"
    assert "forward at density 0.75" in said.forward.why
    assert "takes 1." in said.forward.why
