"""torch.func's transforms and dual numbers, against the same in the dense weight."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional

from blockell_format import to_dense
from blockell_kernels import block_ell_linear, block_ell_mlp

R, C, K, B = 4, 3, 2, 8


@pytest.fixture
def o(make_operands):
    return make_operands(5, R, C, K, B, bias=True)


def dense(o, values):
    return to_dense(values, o.col_indices, R, C, K, B)


def test_jvp_in_every_operand(o):
    given = (o.x, o.values, o.bias)
    along = tuple(torch.randn_like(t) for t in given)

    def sparse(x, values, bias):
        return block_ell_linear(x, values, o.col_indices, bias, activation="gelu")

    def plain(x, values, bias):
        return functional.gelu(functional.linear(x, dense(o, values), bias))

    got, wanted = torch.func.jvp(sparse, given, along), torch.func.jvp(plain, given, along)
    torch.testing.assert_close(got, wanted)


def test_dual_numbers(o):
    along = torch.randn_like(o.x)
    with forward_ad.dual_level():
        y = block_ell_linear(forward_ad.make_dual(o.x, along), o.values, o.col_indices)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, along @ dense(o, o.values).T)


def test_gradients_per_sample(o):
    """vmap of grad: row n of the result is the gradient of sample n alone."""

    def loss(values, x):
        return block_ell_linear(x, values, o.col_indices, o.bias).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(o.values, o.x)
    assert each.shape == (5, *o.values.shape)
    for n in range(5):
        values = o.values.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(values, o.x[n]), values)
        torch.testing.assert_close(each[n], wanted)


def test_hessian_of_an_mlp(o, make_operands):
    second = make_operands(5, C, R, K, B, bias=True)

    def sparse(x):
        return block_ell_mlp(
            x, o.values, o.col_indices, o.bias, second.values, second.col_indices, second.bias,
            activation="silu",
        ).square().sum()  # fmt: skip

    def plain(x):
        h = functional.silu(functional.linear(x, dense(o, o.values), o.bias))
        W2 = to_dense(second.values, second.col_indices, C, R, K, B)
        return functional.linear(h, W2, second.bias).square().sum()

    torch.testing.assert_close(
        torch.func.hessian(sparse)(o.x[0]), torch.func.hessian(plain)(o.x[0])
    )


def test_spare_slots_are_not_computed_with(o):
    spare = torch.full_like(o.values[:, :1], float("nan"))
    values = torch.cat([o.values, spare], dim=1)
    columns = torch.cat([o.col_indices, torch.full_like(o.col_indices[:, :1], -1)], dim=1)
    y = torch.func.vmap(lambda x: block_ell_linear(x, values, columns, num_live=K))(o.x)
    torch.testing.assert_close(y, o.x @ dense(o, o.values).T)


def test_what_a_transform_is_given_is_checked(o):
    with pytest.raises(ValueError, match="the last dimension of x"):
        torch.func.vmap(lambda x: block_ell_linear(x, o.values, o.col_indices))(o.x[:, 1:])
