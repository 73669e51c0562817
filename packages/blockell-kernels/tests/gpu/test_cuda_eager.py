"""The short eager way on a CUDA device: the dense weight kept for one step, memory, messages.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_kernels import _backends, _dense, _plan, block_ell_linear, probe_size

FREE = {"B": 16, "R": 8, "C": 6, "K": 3, "N": 70}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory is measured here; the kernels' own tests poison it."""


def call(problem, x, values, bias, **options):
    p = problem.pattern
    options = {"row_group": problem.G, "num_live": problem.K, "backend": "dense"} | options
    return block_ell_linear(x, values, p.col_indices, bias, index=index_of(p), **options)


class index_of:  # noqa: N801
    def __init__(self, pattern):
        self.order, self.col_start = pattern.order, pattern.col_start


def leaves(problem):
    operands = (problem.x, problem.values, problem.bias)
    return [t.clone().requires_grad_() for t in operands]


@pytest.fixture
def scatters(monkeypatch):
    """How often a dense weight was made."""
    count = []
    to_dense = _dense.to_dense

    def counted(*args):
        count.append(1)
        return to_dense(*args)

    monkeypatch.setattr(_dense, "to_dense", counted)
    return count


def test_gradients_are_right_to_numerical_differences(make_problem):
    problem = make_problem(B=8, R=2, C=3, K=2, N=3, dtype=torch.float64)
    inputs = leaves(problem)
    assert torch.autograd.gradcheck(lambda x, v, b: call(problem, x, v, b), inputs)


def test_the_dense_weight_is_made_once_a_step(make_problem, scatters):
    problem = make_problem(**FREE, dtype=torch.bfloat16)
    x, values, bias = leaves(problem)
    call(problem, x, values, bias).backward(problem.dy)
    assert len(scatters) == 1
    with torch.no_grad():
        call(problem, x, values, bias)
    call(problem, x.detach(), values, bias).backward(problem.dy)  # no input gradient
    assert len(scatters) == 3


def test_a_second_backward_pass_makes_it_again(make_problem, scatters):
    problem = make_problem(**FREE)
    x, values, bias = leaves(problem)
    y = call(problem, x, values, bias)
    first = torch.autograd.grad(y, [x, values, bias], problem.dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, values, bias], problem.dy)
    assert len(scatters) == 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_keeps_none(make_problem):
    problem = make_problem(B=16, R=128, C=64, K=16, N=16, dtype=torch.bfloat16)
    x, values, bias = leaves(problem)

    def held(f):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = f()
        return torch.cuda.memory_allocated() - before - y.numel() * 2

    dense = 128 * 64 * 16 * 16 * 2
    kept = held(lambda: call(problem, x, values, bias))
    packed = held(
        lambda: checkpoint(lambda t: call(problem, t, values, bias), x, use_reentrant=False)
    )
    assert kept >= dense
    assert packed < dense


def test_weights_changed_between_forward_and_backward_are_noticed(make_problem):
    problem = make_problem(**FREE)
    x, values, bias = leaves(problem)
    y = call(problem, x, values, bias)
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.dy)


def test_the_dense_weight_is_kept_where_memory_allows(make_problem):
    def keeps(N):
        x = make_problem(B=16, R=12, C=12, K=1, N=N).x
        plans = [_plan.plan_for(x, N, (12, 12, 16, 1, K), "dense") for K in (1, 8, 9, 10, 11)]
        return [plan.keeps for plan in plans]

    assert keeps(100) == [True, True, False, False, True]
    assert keeps(3) == [True, True, True, False, True]  # little is saved beside the weight


@pytest.mark.parametrize(("K", "chunks"), [(30, 1), (32, 2), (40, 2), (48, 3), (57, 5), (60, 1)])
def test_large_gradients_are_cut_where_a_step_would_take_more_memory(
    make_problem, error, monkeypatch, K, chunks
):
    monkeypatch.setattr(_dense, "WHOLE_GRADIENT_BYTES", 0)
    problem = make_problem(B=16, R=19, C=64, K=K, N=40, spare=1)
    p = problem
    assert _dense.grad_chunks(p.pattern, 4) == chunks
    actual = _dense.BACKEND.grad_values(p.dy, p.x, p.pattern)
    assert error(actual, p.expected()["grad_values"]) < 3e-6
    assert not actual[:, K:].any()


@pytest.mark.parametrize("sparse", ["forward", "grad_input"])
def test_one_copy_serves_both_where_one_is_chosen_sparse(make_problem, error, monkeypatch, sparse):
    """Kept, the copy is used by both; where nothing may be kept, each goes its own way."""
    problem = make_problem(B=16, R=8, C=6, K=3, N=20)
    p, q, run = problem, problem.pattern, []
    plan = _plan._make(torch.float32, p.x.device, 20, (8, 6, 16, 1, 3), "dense")
    assert plan.keeps
    triton = _backends.get_backend("triton")
    plan = dataclasses.replace(plan, **{f"{sparse}_backend": triton})
    original = getattr(triton, sparse)
    monkeypatch.setattr(triton, sparse, lambda *a: run.append(sparse) or original(*a))
    for keep, seen in ((True, []), (False, [sparse])):
        run.clear()
        y, weight = plan.forward(p.x, p.values, p.bias, q, keep=keep)
        needs = (True, True, False)
        dx, dvalues, _, _ = plan.backward(p.dy, p.x, p.values, q, needs, "none", [weight])
        assert run == seen
        expected = p.expected()
        for name, actual in (("y", y), ("grad_input", dx), ("grad_values", dvalues)):
            assert error(actual, expected[name]) < 3e-6, name


def test_a_large_dense_copy_is_gone_before_the_next_gradient(make_problem):
    """Gradients are computed side by side where no two large dense weights are in memory then."""
    x = make_problem(B=128, R=2, C=2, K=1, N=4, dtype=torch.bfloat16).x

    def forks(R, C, requested):
        return _plan._make(torch.bfloat16, x.device, 2048, (R, C, 128, 1, C // 2), requested).forks

    assert forks(8, 8, "dense")
    assert not forks(48, 48, "dense")
    assert forks(48, 48, "triton")


def test_peak_of_a_step_is_not_above_dense():
    """Parameters, gradients and activations of a large layer, at densities up to 85%."""
    N, R, C, B = 256, 128, 128, 16

    def peak(make):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = make()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def dense():
        layer = torch.nn.Linear(C * B, R * B, device="cuda")
        return lambda: run(layer, list(layer.parameters()))

    def sparse(K):
        def make():
            from blockell_format import create_random_topology, transposed_index

            generator = torch.Generator().manual_seed(0)
            cols = create_random_topology(R, C, K, generator=generator).cuda()
            values = torch.randn(R, K, B, B, device="cuda").requires_grad_()
            index = transposed_index(cols, C)

            def layer(x):
                return block_ell_linear(x, values, cols, index=index, backend="dense")

            return lambda: run(layer, [values])

        return make

    def run(layer, parameters):
        x = torch.randn(N, C * B, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        for p in parameters:
            p.grad = None

    limit = peak(dense)
    for density in (0.25, 0.5, 0.75, 0.85):
        assert peak(sparse(round(density * C))) <= limit, density


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_few_tokens_are_captured(make_problem, error):
    problem = make_problem(B=32, R=8, C=6, K=3, N=5, G=4, dtype=torch.bfloat16)
    x, values, bias = leaves(problem)

    def step():
        y = call(problem, x, values, bias, backend="triton")
        return y, *torch.autograd.grad(y, [x, values, bias], problem.dy)

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # leaves belong to the stream of their first backward pass
        want = step()
        assert error(want[0], problem.expected()["y"]) < 5e-3
        with torch.cuda.graph(graph, stream=side):
            got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_wrong_devices_and_dtypes_are_named(make_problem):
    problem = make_problem(**FREE, dtype=torch.bfloat16)
    x, values, bias, cols = problem.x, problem.values, problem.bias, problem.pattern.col_indices
    with pytest.raises(ValueError, match=r"values is on cpu and x on cuda:0; .* one device"):
        block_ell_linear(x, values.cpu(), cols)
    with pytest.raises(ValueError, match=r"col_indices is on cpu and x on cuda:0"):
        block_ell_linear(x, values, cols.cpu())
    with pytest.raises(ValueError, match=r"bias is on cpu and x on cuda:0"):
        block_ell_linear(x, values, cols, bias.cpu())
    with pytest.raises(ValueError, match=r"values has dtype torch.float32 and x torch.bfloat16"):
        block_ell_linear(x, values.float(), cols)
    with pytest.raises(ValueError, match=r"col_indices has dtype torch.int64"):
        block_ell_linear(x, values, cols.long())


@pytest.mark.parametrize("backend", ["dense", "triton"])
@pytest.mark.parametrize("sample", ["none", "gradient"])
def test_a_captured_step_computes_both_gradients_at_a_time(
    make_problem, monkeypatch, backend, sample
):
    """Two branches of the graph, the same bits, replayed on new data."""
    monkeypatch.setattr(_plan, "_plans", {})
    problem = make_problem(B=16, R=8, C=6, K=3, N=200, dtype=torch.bfloat16)
    x, values, bias = leaves(problem)
    probe = torch.zeros(probe_size(8, 6), device="cuda", requires_grad=True)
    forked = []
    original = _plan.Plan._backward_forked
    monkeypatch.setattr(_plan.Plan, "_backward_forked", lambda *a: forked.append(1) or original(*a))

    def step():
        y = call(problem, x, values, bias, backend=backend, probe=probe, sample=sample)
        inputs = [x, values, bias] + ([probe] if sample != "none" else [])
        return torch.autograd.grad(y, inputs, problem.dy)

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        assert not forked
        with torch.cuda.graph(graph, stream=side):
            got = step()
    assert forked
    for seed in (1, 2):
        other = make_problem(B=16, R=8, C=6, K=3, N=200, dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            x.copy_(other.x)
            problem.dy.copy_(other.dy)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, step(), strict=True):
            assert torch.equal(a, b)


def test_what_runs_beside_a_stream_is_on_another_one():
    """Whoever captures may hold the very stream that gradients would go to."""
    device = torch.device("cuda", torch.cuda.current_device())
    for stream in (torch.cuda.current_stream(), *_plan._side_streams(device)):
        with torch.cuda.stream(stream):
            assert _plan.branch(device) != stream
            _plan.join(device)
