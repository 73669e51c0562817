"""torch.compile: one graph, no new one when weights or topology change in place."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_format import transposed_index
from blockell_kernels import block_ell_linear, probe_size

pytestmark = pytest.mark.slow


class Counter:
    """A backend that counts compilations and runs the graph as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def layer(o, probe=None, sample="none", index=None):
    def f(x, values, bias):
        return block_ell_linear(
            x, values, o.col_indices, bias, row_group=o.row_group, num_live=o.num_live,
            probe=probe, sample=sample, index=index,
        ).relu()  # fmt: skip

    return f


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(f, o):
    inputs = [t.detach().clone().requires_grad_() for t in (o.x, o.values, o.bias)]
    y = f(*inputs)
    y.backward(o.dy)
    return {"y": y.detach(), **dict(zip(("dx", "dv", "db"), (t.grad for t in inputs), strict=True))}


@pytest.mark.parametrize("row_group", [1, 4])
def test_full_graph_with_inductor_equals_eager(make_operands, row_group):
    o = make_operands(33, 8, 6, 3, 16, row_group=row_group)
    index = transposed_index(o.col_indices, o.C)
    eager_probe, probe = (torch.zeros(probe_size(8, 6), requires_grad=True) for _ in range(2))
    want = gradients(layer(o, eager_probe, "gradient", index), o)
    compiled = torch.compile(layer(o, probe, "gradient", index), fullgraph=True)
    got = gradients(compiled, o)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    torch.testing.assert_close(probe.grad, eager_probe.grad)


def test_no_recompilation_when_topology_and_weights_change_in_place(make_operands):
    o, other = make_operands(33, 8, 6, 3, 16), make_operands(33, 8, 6, 3, 16, seed=1)
    counter = Counter()
    compiled = torch.compile(layer(o), fullgraph=True, backend=counter)
    gradients(compiled, o)
    assert counter.graphs == 1
    o.col_indices.copy_(other.col_indices)
    o.values.copy_(other.values)
    got = gradients(compiled, o)
    assert counter.graphs == 1
    want = gradients(layer(other), o)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_a_new_number_of_tokens_compiles_at_most_once_more(make_operands):
    o = make_operands(64, 8, 6, 3, 16)
    counter = Counter()
    compiled = torch.compile(layer(o), fullgraph=True, backend=counter)
    for N in (64, 33, 7, 48, 2):
        y = compiled(o.x[:N], o.values, o.bias)
        torch.testing.assert_close(y, layer(o)(o.x[:N], o.values, o.bias))
    assert counter.graphs <= 2


def test_autocast_and_checkpointing_inside_a_compiled_graph(make_operands):
    o = make_operands(32, 8, 6, 3, 16)
    probe = torch.zeros(probe_size(8, 6), requires_grad=True)
    f = layer(o, probe, "norms")

    def g(x, values, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(f, x, values, bias, use_reentrant=False).float()

    want = gradients(g, o)
    eager, probe.grad = probe.grad, None
    got = gradients(torch.compile(g, fullgraph=True), o)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    torch.testing.assert_close(probe.grad, eager)


def test_export(make_operands):
    o = make_operands(32, 8, 6, 3, 16)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return layer(o)(x, o.values, o.bias)

    program = torch.export.export(Layer(), (o.x,))
    torch.testing.assert_close(program.module()(o.x), Layer()(o.x))
