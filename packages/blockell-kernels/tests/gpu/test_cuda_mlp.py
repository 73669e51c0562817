"""The fused MLP on a CUDA device, against two layers and an activation in float64, by name.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_format import create_random_topology, to_dense, transposed_index
from blockell_kernels import _mlp_core, _plan, block_ell_mlp, explain_mlp, probe_size
from blockell_kernels._activation import activate

# torch's, when the first product of a process is one of the backward pass
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

NAMES = ("x", "values1", "bias1", "values2", "bias2")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = {
    "tile 128": (128, 1, 128, 1),
    "tile 64": (64, 2, 64, 1),
    "tile 32, grouped": (32, 4, 32, 4),
    "tile 16": (16, 1, 16, 8),
    "tiles differ": (64, 1, 128, 1),
    "tile 8": (8, 16, 8, 1),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Compilers and graphs allocate in their own ways; the kernels' own tests poison memory."""


class MLP(torch.nn.Module):
    """width -> hidden -> width, with spare slots in the first layer."""

    def __init__(self, B1, G1, B2, G2, width=256, hidden=1024, dtype=torch.bfloat16, backend=None):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.dtype, self.backend, self.width, self.groups = dtype, backend, width, (G1, G2)
        self.sizes = [(hidden // B1, width // B1, B1), (width // B2, hidden // B2, B2)]
        tensors, self.cols, self.live = [torch.randn(8, width, generator=g)], [], []
        for (R, C, B), G, spare in zip(self.sizes, self.groups, (1, 0), strict=True):
            K = max(1, C // 2)
            cols = create_random_topology(R, C, K, generator=g, row_group=G)
            self.cols.append(torch.nn.functional.pad(cols, (0, spare), value=-1).cuda())
            values = torch.randn(R, K + spare, B, B, generator=g) / (K * B) ** 0.5
            values[:, K:] = 0
            self.live.append(K)
            tensors += [values, torch.randn(R * B, generator=g)]
        self.parameters_ = torch.nn.ParameterList([t.cuda().to(dtype) for t in tensors[1:]])
        self.index = [
            transposed_index(cols, C) for cols, (_, C, _) in zip(self.cols, self.sizes, strict=True)
        ]

    def forward(self, x, activation="gelu", function=block_ell_mlp, **kwargs):
        values1, bias1, values2, bias2 = self.parameters_
        options = {"index1": self.index[0], "index2": self.index[1], "backend": self.backend}
        return function(
            x, values1, self.cols[0], bias1, values2, self.cols[1], bias2, activation,
            row_group1=self.groups[0], row_group2=self.groups[1], num_live1=self.live[0],
            num_live2=self.live[1], **(options | kwargs),
        )  # fmt: skip

    def expected(self, x, dy, activation="gelu"):
        inputs = [t.detach().double().requires_grad_() for t in (x, *self.parameters_)]
        weights = []
        for values, cols, live, (R, C, B) in zip(
            (inputs[1], inputs[3]), self.cols, self.live, self.sizes, strict=True
        ):
            weights.append(to_dense(values[:, :live], cols[:, :live], R, C, live, B))
        h = torch.nn.functional.linear(inputs[0], weights[0], inputs[2])
        y = torch.nn.functional.linear(activate(h, activation), weights[1], inputs[4])
        y.backward(dy.double())
        return {"y": y.detach()} | {name: t.grad for name, t in zip(NAMES, inputs, strict=True)}

    def random(self, N):
        g = torch.Generator("cuda").manual_seed(N)
        x, dy = (torch.randn(N, self.width, generator=g, device="cuda") for _ in range(2))
        return x.to(self.dtype), dy.to(self.dtype)


def gradients(f, x, dy, module):
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = f(x)
    y.backward(dy)
    grads = (x.grad, *(p.grad.clone() for p in module.parameters_))
    return {"y": y.detach()} | dict(zip(NAMES, grads, strict=True))


def compare(error, got, want, tolerance):
    for name, expected in want.items():
        assert error(got[name], expected.cpu().double()) < tolerance, name


@pytest.mark.parametrize("N", [0, 1, 700])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_odd_sizes(error, layout, N):
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float32, None)):
        mlp = MLP(*layout, dtype=dtype, backend=backend)
        x, dy = mlp.random(N)
        want = mlp.expected(x, dy)
        for recompute in ("none", "activation", "hidden"):
            got = gradients(partial(mlp, recompute=recompute), x, dy, mlp)
            compare(error, got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_activations_are_as_accurate_as_torch(error, activation):
    """Not above the error of the same MLP in dense bfloat16 by more than a tenth."""
    mlp = MLP(128, 1, 128, 1, width=512, hidden=2048, backend="triton")
    x, dy = mlp.random(1000)
    want = mlp.expected(x, dy, activation)
    got = gradients(lambda x: mlp(x, activation), x, dy, mlp)
    mlp.backend = "dense"
    dense = gradients(lambda x: mlp(x, activation, recompute="none"), x, dy, mlp)
    for name, exact in want.items():
        exact = exact.cpu().double()
        assert error(got[name], exact) < 1.1 * error(dense[name], exact), name


def test_deterministic_strided_and_batched():
    mlp = MLP(128, 1, 128, 1, backend="triton")
    x, dy = mlp.random(1200)
    first = gradients(mlp, x, dy, mlp)
    for other in (x, x.T.contiguous().T, x.view(3, 400, -1)):
        y = mlp(other)
        assert torch.equal(y.reshape(first["y"].shape), first["y"])
    second = gradients(mlp, x, dy, mlp)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", ["triton", "dense"])
def test_statistics_and_checkpointing(error, backend):
    mlp = MLP(128, 1, 128, 1, backend=backend)
    x, dy = mlp.random(900)
    probes = [torch.zeros(probe_size(R, C), device="cuda", requires_grad=True)
              for R, C, _ in mlp.sizes]  # fmt: skip
    options = {"probe1": probes[0], "probe2": probes[1], "sample1": "gradient", "sample2": "norms"}
    checkpoint(lambda x: mlp(x, **options), x.requires_grad_(), use_reentrant=False).backward(dy)
    (R1, C1, B1), (R2, C2, B2) = mlp.sizes
    x64, dy64 = x.detach().double(), dy.double()
    values1, bias1, values2, _ = (t.detach().double() for t in mlp.parameters_)
    live1 = mlp.live[0]
    h = x64 @ to_dense(values1[:, :live1], mlp.cols[0][:, :live1], R1, C1, live1, B1).T + bias1
    h = h.detach().requires_grad_()
    a = activate(h, "gelu")
    a.backward(dy64 @ to_dense(values2, mlp.cols[1], R2, C2, mlp.live[1], B2))
    product = (h.grad.T @ x64).view(R1, B1, C1, B1).square().sum((1, 3))
    row_sq, col_sq, norm_sq = probes[0].grad.split([R1, C1, R1 * C1])
    assert error(row_sq, h.grad.square().sum(0).view(R1, B1).sum(1).cpu()) < 1e-2
    assert error(col_sq, x64.square().sum(0).view(C1, B1).sum(1).cpu()) < 1e-5
    assert error(norm_sq.view(R1, C1), product.cpu()) < 2e-2
    row_sq, col_sq, norm_sq = probes[1].grad.split([R2, C2, R2 * C2])
    assert error(row_sq, dy64.square().sum(0).view(R2, B2).sum(1).cpu()) < 1e-5
    assert error(col_sq, a.detach().square().sum(0).view(C2, B2).sum(1).cpu()) < 1e-2
    assert not norm_sq.any()


def test_compiled_captured_and_under_autocast(error):
    mlp = MLP(128, 1, 128, 1, dtype=torch.float32)
    x, dy = mlp.random(1024)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        want = gradients(mlp, x, dy.bfloat16(), mlp)
    assert want["y"].dtype == torch.bfloat16
    assert want["values1"].dtype == torch.float32
    compiled = torch.compile(mlp, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = gradients(compiled, x, dy.bfloat16(), mlp)
    for name in want:
        assert error(got[name], want[name].cpu().double()) < 1e-6, name

    inputs = [x.requires_grad_(), *mlp.parameters_]

    def step():
        return torch.autograd.grad(mlp(x), inputs, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("recompute", ["none", "activation", "hidden"])
@pytest.mark.parametrize("sizes", [(256, 1024), (512, 256)], ids=["wider inside", "narrower"])
@pytest.mark.parametrize("layout", ["tile 128", "tile 16"])
def test_a_captured_step_computes_gradients_side_by_side(monkeypatch, layout, sizes, recompute):
    """Branches of the graph, the same bits, replayed on new data."""
    monkeypatch.setattr(_plan, "_plans", {})
    mlp = MLP(*LAYOUTS[layout], *sizes)
    x, dy = mlp.random(1024)
    inputs, forked = [x.requires_grad_(), *mlp.parameters_], []
    monkeypatch.setattr(_mlp_core, "branch", lambda d: forked.append(d) or _plan.branch(d))

    def step():
        return torch.autograd.grad(mlp(x, recompute=recompute), inputs, dy)

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        assert not forked
        with torch.cuda.graph(graph, stream=side):
            captured = step()
    assert forked
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        torch.cuda.synchronize()
        for ours, expected in zip(captured, step(), strict=True):
            assert torch.equal(ours, expected)


def recorded(function, results):
    def recording(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return recording


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_explains_where_the_activation_is_computed(monkeypatch, layout):
    """What `explain_mlp` names is what a step takes."""
    kernels = pytest.importorskip("blockell_kernels._triton._mlp")
    mlp = MLP(*layout)
    for N in (100, 700, 4000):
        x, dy = mlp.random(N)
        taken = []
        for name in ("forward_way", "middle_way"):
            monkeypatch.setattr(kernels, name, recorded(getattr(kernels, name), taken))
        gradients(mlp, x, dy, mlp)
        monkeypatch.undo()
        said = mlp(x, function=explain_mlp)
        assert said.slope == taken[-1].why
        if said.first.forward.backend == "triton":
            assert said.activation == taken[0].why
        else:
            assert said.activation.startswith("a pass of its own")
