"""Operands with gaps between their elements: kernels read values, columns and biases without."""

import pytest
import torch

from blockell_kernels import block_ell_linear, block_ell_mlp
from blockell_kernels._backends import get_backend

MANY = 600 if torch.cuda.is_available() else 70


def with_gaps(t):
    """The same numbers, every other one of what lies in memory."""
    other = torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    assert torch.equal(other, t)
    assert not other.is_contiguous()
    return other


class Index:
    def __init__(self, order, col_start):
        self.order, self.col_start = order, col_start


def gradients(p, activation, **changes):
    """y and all gradients of a layer, some of its operands replaced, by name."""
    o = {"x": p.x, "values": p.values, "bias": p.bias, "cols": p.pattern.col_indices}
    o |= {"order": p.pattern.order, "start": p.pattern.col_start} | changes
    leaves = {name: o[name].detach().requires_grad_() for name in ("x", "values", "bias")}
    y = block_ell_linear(
        leaves["x"], leaves["values"], o["cols"], leaves["bias"], row_group=p.G, num_live=p.K,
        index=Index(o["order"], o["start"]), activation=activation, backend="triton",
    )  # fmt: skip
    y.backward(p.dy)
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("B", [16, 64])
def test_a_layer_of_operands_with_gaps(make_problem, B, activation):
    p = make_problem(B=B, R=2, C=3, K=2, N=21, spare=1)
    given = {
        "values": p.values, "bias": p.bias, "cols": p.pattern.col_indices,
        "order": p.pattern.order, "start": p.pattern.col_start,
    }  # fmt: skip
    want = gradients(p, activation)
    for name, t in given.items():
        got = gradients(p, activation, **{name: with_gaps(t)})
        for result in want:
            assert torch.equal(got[result], want[result]), (name, result)


def mlp(p, *changed):
    """y and all gradients of an MLP with one layer twice, some of its operands with gaps."""
    o = {"values": p.values, "bias": p.bias, "cols": p.pattern.col_indices}
    o |= {name: with_gaps(o[name]) for name in changed}
    x, values, bias = (t.detach().requires_grad_() for t in (p.x, o["values"], o["bias"]))
    layer = values, o["cols"], bias
    y = block_ell_mlp(x, *layer, *layer, num_live1=p.K, num_live2=p.K, backend="triton")
    y.mean(0).square().sum().backward()  # its gradient in y: rows one above the other, stride 0
    return y.detach(), x.grad, values.grad, bias.grad


def test_an_mlp_of_operands_with_gaps(make_problem):
    p = make_problem(B=16, R=3, C=3, K=2, N=21)
    want = mlp(p)
    for got, wanted in zip(mlp(p, "values", "bias", "cols"), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("B", [16, 128])
def test_tokens_that_are_one_and_the_same(make_problem, error, B, dtype, tolerance):
    """Rows with stride 0."""
    p = make_problem(B=B, R=2, C=3, K=2, N=MANY, dtype=dtype)
    p.x, p.dy = p.x[:1].expand(MANY, -1), p.dy[:1].expand(MANY, -1)
    expected, backend = p.expected(), get_backend("triton")
    y = backend.forward(p.x, p.values, None, p.pattern)
    assert error(y, expected["y"] - p.bias.cpu().double()) < tolerance
    dx = backend.grad_input(p.dy, p.values, p.pattern)
    assert error(dx, expected["grad_input"]) < tolerance
    dv = backend.grad_values(p.dy, p.x, p.pattern)
    assert error(dv, expected["grad_values"]) < tolerance


@pytest.mark.parametrize(("B", "N"), [(8, 5), (16, 70), (32, MANY), (128, 5)])
def test_columns_far_apart(make_problem, error, B, N):
    """Of a transposed x: more than 2^31 elements lie between the first and the last."""
    p = make_problem(B=B, R=2, C=3, K=2, N=N, dtype=torch.bfloat16)
    expected, backend = p.expected(), get_backend("triton")
    apart = 2**31 // (p.C * B - 4)  # four columns lie behind
    assert (p.pattern.col_indices == p.C - 1).any()
    storage = torch.UntypedStorage(2 * apart * p.C * B, device=p.x.device)  # on a CPU not touched
    x = torch.empty(0, dtype=p.x.dtype, device=p.x.device).set_(storage, 0, p.x.shape, (1, apart))
    p.x = x.copy_(p.x)
    y = backend.forward(p.x, p.values, None, p.pattern)
    assert error(y, expected["y"] - p.bias.cpu().double()) < 5e-3
    assert error(backend.grad_values(p.dy, p.x, p.pattern), expected["grad_values"]) < 5e-3
