"""The fused MLP against two layers and an activation in float64: output and gradients, by name.

Legend: R, C, K, B of each layer, N tokens; h pre-activation.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_format import transposed_index
from blockell_kernels import _mlp_ops, block_ell_linear, block_ell_mlp, probe_size
from blockell_kernels._activation import ACTIVATIONS, activate

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAMES = ("x", "values1", "bias1", "values2", "bias2")


class Problem:
    """Operands of both layers: R1*B1 = C2*B2 hidden features."""

    def __init__(self, make_operands, N=9, dtype=torch.float32, bias=True, tiles=(8, 16), **kwargs):
        B1, B2 = tiles
        kwargs = {"spare": 1, "bias": bias, "dtype": dtype} | kwargs
        self.first = make_operands(N, 96 // B1, 5, 3, B1, row_group=2, **kwargs)
        self.second = make_operands(N, 4, 96 // B2, 2, B2, row_group=2, seed=1, **kwargs)
        self.dtype = dtype

    def inputs(self, dtype=None):
        one, two = self.first, self.second
        tensors = (one.x, one.values, one.bias, two.values, two.bias)
        return [
            None if t is None else t.detach().to(dtype or self.dtype).requires_grad_()
            for t in tensors
        ]

    def fused(self, inputs, activation="gelu", probes=(None, None), **kwargs):
        x, values1, bias1, values2, bias2 = inputs
        one, two = self.first, self.second
        return block_ell_mlp(
            x, values1, one.col_indices, bias1, values2, two.col_indices, bias2, activation,
            row_group1=2, row_group2=2, num_live1=3, num_live2=2,
            probe1=probes[0], probe2=probes[1], **kwargs,
        )  # fmt: skip

    def separate(self, inputs, activation="gelu", probes=(None, None), samples=("none", "none")):
        x, values1, bias1, values2, bias2 = inputs
        one, two = self.first, self.second
        h = block_ell_linear(
            x, values1, one.col_indices, bias1, row_group=2, num_live=3,
            probe=probes[0], sample=samples[0],
        )  # fmt: skip
        return block_ell_linear(
            activate(h, activation), values2, two.col_indices, bias2, row_group=2, num_live=2,
            probe=probes[1], sample=samples[1],
        )  # fmt: skip

    def probes(self):
        sizes = (
            probe_size(self.first.values.shape[0], self.first.C),
            probe_size(self.second.values.shape[0], self.second.C),
        )
        return [torch.zeros(size, requires_grad=True) for size in sizes]


def gradients(problem, y, inputs):
    y.backward(problem.second.dy.to(y.dtype).reshape(y.shape))
    return {"y": y.detach()} | {
        name: t.grad for name, t in zip(NAMES, inputs, strict=True) if t is not None
    }


def compare(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        actual = got[name].double().reshape(expected.shape)
        assert torch.isfinite(actual).all(), name
        if expected.numel() == 0:
            continue
        # spare slots of the weight hold NaN, of its gradient zeros
        error = (actual - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        assert error < tolerance, (name, float(error))


def check(problem, activation="gelu", **kwargs):
    exact, inputs = problem.inputs(torch.float64), problem.inputs()
    want = gradients(problem, problem.separate(exact, activation), exact)
    got = gradients(problem, problem.fused(inputs, activation, **kwargs), inputs)
    compare(got, want, TOLERANCE[problem.dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_dtypes(make_operands, activation, dtype):
    for recompute, backend in (("none", "auto"), ("activation", "dense"), ("hidden", None)):
        problem = Problem(make_operands, dtype=dtype)
        check(problem, activation, recompute=recompute, backend=backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [0, 1, 7, 129])
@pytest.mark.parametrize("tiles", [(8, 16), (16, 8), (8, 32)])
def test_odd_sizes(make_operands, N, tiles):
    check(Problem(make_operands, N=N, tiles=tiles, bias=N != 7))


def test_leading_dimensions_and_strides(make_operands):
    problem = Problem(make_operands, N=12)
    flat = problem.fused(problem.inputs())
    for x in (
        problem.first.x.view(3, 4, 40),
        problem.first.x.T.contiguous().T,
        problem.first.x.view(3, 4, 40).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        inputs = [x, *problem.inputs()[1:]]
        torch.testing.assert_close(problem.fused(inputs).reshape(12, -1), flat)
    empty = problem.fused([problem.first.x.new_zeros(2, 0, 40), *problem.inputs()[1:]])
    assert empty.shape == (2, 0, 64)
    assert problem.fused([problem.first.x[0], *problem.inputs()[1:]]).shape == (64,)


def test_the_result_may_be_changed_in_place(make_operands):
    problem = Problem(make_operands, N=12)
    for shape in ((12, 40), (3, 4, 40)):
        inputs = problem.inputs()
        problem.fused([inputs[0].view(shape), *inputs[1:]]).mul_(2).sum().backward()
        assert inputs[1].grad is not None


@pytest.mark.parametrize(
    "samples", [("none", "norms"), ("gradient", "none"), ("norms", "gradient")], ids=str
)
def test_statistics_are_those_of_two_layers(make_operands, samples):
    problem = Problem(make_operands)
    want, got = problem.probes(), problem.probes()
    kwargs = {"sample1": samples[0], "sample2": samples[1], "recompute": "activation"}
    inputs, others = problem.inputs(), problem.inputs()
    gradients(problem, problem.separate(others, "silu", want, samples), others)
    gradients(problem, problem.fused(inputs, "silu", got, **kwargs), inputs)
    for mine, theirs, sample in zip(got, want, samples, strict=True):
        assert (mine.grad is None) == (sample == "none") == (theirs.grad is None)
        if sample != "none":
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_statistics_count_a_recomputed_forward_once(make_operands):
    problem = Problem(make_operands)
    want, got = problem.probes(), problem.probes()
    kwargs = {"sample1": "gradient", "sample2": "norms"}
    inputs = problem.inputs()
    gradients(problem, problem.fused(inputs, "gelu", want, **kwargs), inputs)

    def again(x):
        return problem.fused([x, *inputs[1:]], "gelu", got, **kwargs)

    y = checkpoint(again, inputs[0], use_reentrant=False)
    gradients(problem, y, inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("recompute", ["none", "activation", "hidden"])
def test_only_what_is_asked_for(make_operands, recompute):
    problem = Problem(make_operands)
    everything = problem.inputs()
    want = gradients(problem, problem.fused(everything), everything)
    for wanted in (*((name,) for name in NAMES), ("x", "bias1"), ("values2", "x")):
        inputs = problem.inputs()
        for name, t in zip(NAMES, inputs, strict=True):
            t.requires_grad_(name in wanted)
        got = gradients(problem, problem.fused(inputs, recompute=recompute), inputs)
        for name in NAMES:
            assert (got[name] is not None) == (name in wanted), (name, wanted)
            if name in wanted:
                torch.testing.assert_close(got[name], want[name])


def test_what_is_saved(make_operands):
    problem = Problem(make_operands, N=50)

    def saved(**kwargs):
        kept, inputs = [], problem.inputs()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
            problem.fused(inputs, **kwargs)
        return sum(t.shape == (50, 96) for t in kept)

    assert [saved(recompute=r) for r in ("none", "activation", "hidden")] == [2, 1, 0]
    with torch.no_grad():
        assert saved() == 0


def test_autocast(make_operands):
    problem = Problem(make_operands)
    inputs, plain = problem.inputs(), problem.inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = problem.fused(inputs)
    assert y.dtype == torch.bfloat16
    got = gradients(problem, y, inputs)
    compare(got, gradients(problem, problem.fused(plain), plain), 1e-2)
    assert got["values1"].dtype == torch.float32


def arguments(problem, recompute="activation", sample="gradient"):
    x, values1, bias1, values2, bias2 = problem.inputs()
    one, two = problem.first, problem.second
    probe1, probe2 = problem.probes()
    index = transposed_index(one.col_indices, one.C)
    return (
        x, values1, one.col_indices, bias1, probe1, *index, 2, 3, sample,
        values2, two.col_indices, bias2, probe2, None, None, 2, 2, sample,
        "gelu", recompute, "",
    )  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "hidden"])
def test_opcheck(make_operands, recompute):
    problem = Problem(make_operands, spare=0)
    torch.library.opcheck(_mlp_ops.mlp_op, arguments(problem, recompute))


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False]])
def test_opcheck_backward(make_operands, needs):
    problem = Problem(make_operands, spare=0)
    one, two = problem.first, problem.second
    h = torch.randn(9, 96)
    args = (
        two.dy, one.x, h, None, one.values, one.col_indices, one.bias, None, None, 5, 8, 2, 3,
        "norms", two.values, two.col_indices, None, None, 16, 2, 2, "gradient", needs, "relu", "",
    )  # fmt: skip
    torch.library.opcheck(_mlp_ops.mlp_backward_op, args)


def test_gradcheck(make_operands):
    problem = Problem(make_operands, N=3, dtype=torch.float64, spare=0)
    inputs = problem.inputs()
    assert torch.autograd.gradcheck(
        lambda *inputs: problem.fused(inputs, "gelu_tanh", recompute="hidden"),
        inputs,
        fast_mode=True,
    )


def test_second_derivative_is_refused(make_operands):
    problem = Problem(make_operands)
    inputs = problem.inputs()
    y = problem.fused(inputs)
    (g,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="block_ell_mlp can be differentiated once"):
        g.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["activation", "hidden"])
def test_compiled_in_one_graph(make_operands, recompute):
    torch._dynamo.reset()
    problem = Problem(make_operands, N=33)
    want_probes, probes = problem.probes(), problem.probes()
    kwargs = {"sample1": "gradient", "sample2": "norms", "recompute": recompute}
    eager, inputs = problem.inputs(), problem.inputs()
    want = gradients(problem, problem.fused(eager, "gelu", want_probes, **kwargs), eager)
    compiled = torch.compile(lambda *t: problem.fused(t, "gelu", probes, **kwargs), fullgraph=True)
    compare(gradients(problem, compiled(*inputs), inputs), want, 1e-5)
    for mine, theirs in zip(probes, want_probes, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, r"activation \(='tanh'\) must be one of none, gelu, gelu_tanh"),
        ({"recompute": "all"}, r"recompute \(='all'\) must be one of none, activation, hidden"),
        ({"bias1": torch.zeros(7)}, r"first layer: bias has shape \(7,\); it must be \(96,\)"),
        ({"values2": torch.zeros(4, 3, 64, 64)}, r"second layer: .*\(=96\) must be a multiple of"),
        ({"num_live2": 9}, r"second layer: num_live \(=9\) must be in \[1, 3\]"),
        ({"sample2": "norms", "probe2": None}, r"second layer: sample .* needs a probe"),
        ({"x": torch.zeros(2, 41)}, r"first layer: the last dimension of x \(=41\)"),
    ],
)
def test_messages(make_operands, change, message):
    problem = Problem(make_operands)
    x, values1, bias1, values2, bias2 = problem.inputs()
    given = {
        "x": x, "values1": values1, "col_indices1": problem.first.col_indices, "bias1": bias1,
        "values2": values2, "col_indices2": problem.second.col_indices, "bias2": bias2,
        "num_live1": 3, "num_live2": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_ell_mlp(**(given | change))
