"""Output and each gradient, by name, against the float64 reference; empty memory holds NaN."""

import itertools

import pytest
import torch

from blockell_kernels import _reference as reference
from blockell_kernels import block_ell_linear

BACKENDS = ("auto", "gathered", "dense")
# dtype: (rtol, atol as a share of the largest entry); the backends accumulate in float32 or wider
TOLERANCE = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (8e-3, 4e-3),
    torch.float16: (1e-3, 5e-4),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def expected(o):
    d = o.to(torch.float64)
    return {
        "y": reference.forward(d.x, d.values, d.col_indices, d.bias, d.num_live),
        "dx": reference.grad_input(d.dy, d.values, d.col_indices, d.C, d.num_live),
        "dvalues": reference.grad_values(d.dy, d.x, d.col_indices, d.values.shape[-1], d.num_live),
        "dbias": None if d.bias is None else reference.grad_bias(d.dy),
    }


def computed(o, backend, x=None):
    x = (o.x if x is None else x).detach().requires_grad_()
    values = o.values.detach().requires_grad_()
    bias = None if o.bias is None else o.bias.detach().requires_grad_()
    y = block_ell_linear(
        x, values, o.col_indices, bias,
        row_group=o.row_group, num_live=o.num_live, backend=backend,
    )  # fmt: skip
    y.backward(o.dy.view(y.shape))
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dvalues": values.grad,
        "dbias": None if bias is None else bias.grad,
    }


def compare(got, want, dtype):
    rtol, share = TOLERANCE[dtype]
    for name, expected_ in want.items():
        if expected_ is None:
            assert got[name] is None, name
            continue
        atol = share * float(expected_.abs().max()) if expected_.numel() else 0.0
        torch.testing.assert_close(
            got[name].double().reshape(expected_.shape),
            expected_,
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert got[name].dtype == dtype, name


def check(o, backend, x=None):
    compare(computed(o, backend, x), expected(o), o.x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("B", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("K", [1, 2, 5])  # of C = 5: one block, 40%, all
def test_tiles_densities_dtypes(make_operands, backend, dtype, B, K):
    check(make_operands(33, 3, 5, K, B, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [0, 1, 7, 63, 129])
@pytest.mark.parametrize("row_group", [1, 3, 6])
@pytest.mark.parametrize("spare", [0, 2])
def test_odd_token_counts_row_groups_spare_slots(make_operands, backend, N, row_group, spare):
    check(make_operands(N, 6, 7, 3, 16, row_group=row_group, spare=spare), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_group", [1, 4])
def test_both_schedules_of_many_tokens(make_operands, backend, row_group):
    """Enough tokens for several chunks of the batched schedule and of the tall one."""
    check(make_operands(4500, 8, 9, 4, 16, row_group=row_group), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_columns_get_zero_gradient(make_operands, backend):
    o = make_operands(9, 4, 6, 2, 8, columns=range(1, 4))
    check(o, backend)
    dx = computed(o, backend)["dx"].view(9, 6, 8)
    assert (dx[:, [0, 4, 5]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(make_operands, backend):
    check(make_operands(9, 4, 6, 2, 8, bias=False), backend)


def strided_inputs(x):
    N, size = x.shape
    yield "transposed", x.T.contiguous().T
    yield "every other row", torch.stack([x, x], 1).flatten(0, 1)[::2]
    wide = torch.cat([x, x], 1)
    yield "columns of a wider tensor", wide[:, :size]
    yield "every other column", torch.stack([x, x], 2).flatten(1)[:, ::2]
    yield (
        "three dimensions, permuted",
        x.view(3, N // 3, size).transpose(0, 1).contiguous().transpose(0, 1),
    )
    yield "one row expanded", x[:1].expand(N, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_group", [1, 4])
def test_strided_x(make_operands, backend, row_group):
    o = make_operands(129, 8, 6, 3, 16, row_group=row_group)
    for name, x in strided_inputs(o.x):
        o.x = x.reshape(129, -1).contiguous()
        try:
            check(o, backend, x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_gradient_of_the_output(make_operands, backend):
    o = make_operands(9, 4, 6, 2, 8)
    o.dy = torch.ones(()).expand(9, 32)
    check(o, backend)
    o.dy = torch.randn(32, 9).T
    check(o, backend)


@pytest.mark.parametrize("shape", [(3, 5, 2), (30,), (1, 1, 1, 30), (2, 0)], ids=str)
def test_any_leading_dimensions(make_operands, shape):
    N = torch.Size(shape).numel()
    o = make_operands(N, 4, 6, 2, 8)
    check(o, "auto", o.x.view(*shape, 48))
    y = block_ell_linear(o.x.view(*shape, 48), o.values, o.col_indices, o.bias)
    assert y.shape == (*shape, 32)


def test_a_single_vector(make_operands):
    o = make_operands(1, 4, 6, 2, 8)
    y = block_ell_linear(o.x[0], o.values, o.col_indices, o.bias)
    assert y.shape == (32,)
    torch.testing.assert_close(y, block_ell_linear(o.x, o.values, o.col_indices, o.bias)[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_through_present_blocks(make_operands, backend, bad):
    o = make_operands(5, 2, 3, 2, 8)
    o.col_indices = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    o.x[3, 0] = bad  # column 0 belongs to row 0 only
    y = block_ell_linear(o.x, o.values, o.col_indices, o.bias, backend=backend)
    assert not y[3, :8].isfinite().any()
    assert y[[0, 1, 2, 4]].isfinite().all()
    if backend in ("gathered", "reference"):
        assert y[3, 8:].isfinite().all()


def test_runs_twice_the_same(make_operands):
    for backend, row_group in itertools.product(BACKENDS, (1, 8)):
        o = make_operands(700, 16, 12, 5, 16, row_group=row_group)
        first, second = computed(o, backend), computed(o, backend)
        for name in first:
            assert torch.equal(first[name], second[name]), (backend, row_group, name)
