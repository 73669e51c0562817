"""Replayed launches do, on other operands, what the launchers would have done: bit for bit."""

from __future__ import annotations

import pytest
import torch

from blockell_format import transposed_index
from blockell_kernels import block_ell_linear, block_ell_mlp
from blockell_kernels._backends import get_backend
from blockell_kernels._triton import _replay, _sums

BF16 = torch.bfloat16
CASES = [
    (8, 1, 12, 10, 4),
    (16, 1, 12, 10, 4),
    (16, 8, 16, 10, 4),
    (32, 4, 8, 6, 3),
    (64, 2, 6, 5, 2),
    (128, 1, 5, 4, 2),
    (128, 1, 20, 5, 5),
]


@pytest.fixture
def replays(monkeypatch):
    """How many calls were replayed."""
    taken, replay = [], _replay.replay

    def noted(*args):
        taken.append(args)
        return replay(*args)

    monkeypatch.setattr(_replay, "replay", noted)
    return taken


def products(p) -> list[torch.Tensor]:
    b = get_backend("triton")
    return [
        b.forward(p.x, p.values, p.bias, p.pattern),
        b.grad_input(p.dy, p.values, p.pattern),
        b.grad_values(p.dy, p.x, p.pattern),
        _sums.column_sums(p.dy, p.dy.dtype),
    ]


def the_long_way(monkeypatch, run):
    with monkeypatch.context() as patched:
        patched.setattr(_replay, "_gpu_of", lambda t: None)
        return run()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("N", [1, 33, 200, 700, 8200])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_other_operands(make_problem, replays, monkeypatch, case, N, dtype):
    B, G, R, C, K = case
    first, second = (
        make_problem(B=B, R=R, C=C, K=K, N=N, G=G, dtype=dtype, seed=seed) for seed in (0, 1)
    )
    expected = the_long_way(monkeypatch, lambda: products(second))
    assert not replays
    products(first)
    products(first)
    assert all(map(torch.equal, products(second), expected))
    if dtype is BF16:
        assert len(replays) == 4


@pytest.mark.parametrize("recompute", ["none", "activation", "hidden"])
@pytest.mark.parametrize("N", [33, 700, 2100])
@pytest.mark.parametrize(("B", "G"), [(128, 1), (16, 8), (64, 2)])
def test_an_mlp_of_other_operands(make_problem, replays, monkeypatch, B, G, N, recompute):
    wide, narrow = 1024 // B, 512 // B
    layers = [
        (
            make_problem(B=B, R=wide, C=narrow, K=narrow // 2, N=N, G=G, dtype=BF16, seed=seed),
            make_problem(B=B, R=narrow, C=wide, K=wide // 2, N=N, G=G, dtype=BF16, seed=seed),
        )
        for seed in (0, 1)
    ]

    def step(fc1, fc2):
        operands = [
            t.clone().requires_grad_() for t in (fc1.x, fc1.values, fc1.bias, fc2.values, fc2.bias)
        ]
        x, values1, bias1, values2, bias2 = operands
        y = block_ell_mlp(
            x, values1, fc1.pattern.col_indices, bias1, values2, fc2.pattern.col_indices, bias2,
            row_group1=G, row_group2=G,
            index1=transposed_index(fc1.pattern.col_indices, fc1.C),
            index2=transposed_index(fc2.pattern.col_indices, fc2.C),
            recompute=recompute,
        )  # fmt: skip
        return [y, *torch.autograd.grad(y, operands, fc2.dy)]

    expected = the_long_way(monkeypatch, lambda: step(*layers[1]))
    assert not replays
    step(*layers[0])
    step(*layers[0])
    assert all(map(torch.equal, step(*layers[1]), expected))
    assert replays


@pytest.mark.parametrize("N", [33, 2100])
def test_a_backward_pass_that_is_run_again(make_problem, replays, N):
    """The last one may write over what forward saved; those before it may not."""
    fc1 = make_problem(B=128, R=8, C=4, K=2, N=N, dtype=BF16)
    fc2 = make_problem(B=128, R=4, C=8, K=4, N=N, dtype=BF16)
    x, values1, values2 = (t.clone().requires_grad_() for t in (fc1.x, fc1.values, fc2.values))
    found = []
    for _ in range(3):
        y = block_ell_mlp(
            x, values1, fc1.pattern.col_indices, None, values2, fc2.pattern.col_indices, None
        )
        for again in (True, True, False):
            grads = torch.autograd.grad(y, (x, values1, values2), fc2.dy, retain_graph=again)
            found.append([y.clone(), *grads])
    assert replays
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("N", [33, 700])
@pytest.mark.parametrize(("B", "G"), [(128, 1), (16, 8), (16, 1)])
def test_a_layer_of_other_operands(make_problem, replays, monkeypatch, B, G, N, needs):
    problems = [
        make_problem(B=B, R=640 // B, C=512 // B, K=256 // B, N=N, G=G, dtype=BF16, seed=seed)
        for seed in (0, 1)
    ]

    def step(p):
        x, values = (
            t.clone().requires_grad_(n) for t, n in zip((p.x, p.values), needs, strict=True)
        )
        bias = p.bias.clone().requires_grad_()
        y = block_ell_linear(
            x, values, p.pattern.col_indices, bias, row_group=G, backend="triton",
            index=transposed_index(p.pattern.col_indices, p.C),
        )  # fmt: skip
        wanted = [t for t in (x, values, bias) if t.requires_grad]
        return [y, *torch.autograd.grad(y, wanted, p.dy)]

    expected = the_long_way(monkeypatch, lambda: step(problems[1]))
    assert not replays
    step(problems[0])
    step(problems[0])
    assert all(map(torch.equal, step(problems[1]), expected))
    assert len(replays) == 2


def test_a_captured_graph_takes_replayed_launches(make_problem, replays):
    p = make_problem(B=128, R=5, C=4, K=2, N=700, dtype=BF16)
    expected = products(p)
    products(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = products(p)
    assert len(replays) == 4
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, results, expected))
