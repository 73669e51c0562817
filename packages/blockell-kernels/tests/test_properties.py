"""Properties of the operator, on shapes that hypothesis thinks up."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockell_format import to_dense
from blockell_kernels import block_ell_linear

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def shapes(draw):
    """Keyword arguments of `make_operands`."""
    C = draw(st.integers(1, 9))
    row_group = draw(st.integers(1, 4))
    return {
        "N": draw(st.integers(0, 70)),
        "R": row_group * draw(st.integers(1, 4)),
        "C": C,
        "K": draw(st.integers(1, C)),
        "B": draw(st.sampled_from([1, 2, 3, 8, 16])),
        "row_group": row_group,
        "spare": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**31)),
        "dtype": torch.float64,
    }


def call(o, backend=None, **changes):
    arguments = {"x": o.x, "values": o.values, "col_indices": o.col_indices, "bias": o.bias}
    return block_ell_linear(
        **{**arguments, **changes},
        row_group=o.row_group,
        num_live=o.num_live,
        backend=backend,
    )


@quick
@given(shape=shapes(), backend=st.sampled_from(["auto", "gathered", "dense", "reference"]))
def test_equals_the_dense_weight(make_operands, shape, backend):
    o = make_operands(**shape)
    R, B = o.values.shape[0], o.values.shape[-1]
    live = o.col_indices[:, : o.num_live].contiguous()
    W = to_dense(o.values[:, : o.num_live].contiguous(), live, R, o.C, o.num_live, B)
    x, values = o.x.requires_grad_(), o.values.requires_grad_()
    y = call(o, backend, x=x, values=values)
    y.backward(o.dy)
    torch.testing.assert_close(y, o.x @ W.T + o.bias)
    torch.testing.assert_close(x.grad, o.dy @ W)
    assert (values.grad[:, o.num_live :] == 0).all()


@quick
@given(shape=shapes(), backend=st.sampled_from(["gathered", "dense"]))
def test_the_order_of_slots_does_not_matter(make_operands, shape, backend):
    o = make_operands(**shape)
    order = torch.randperm(o.num_live)
    live, tiles = o.col_indices[:, : o.num_live], o.values[:, : o.num_live]
    shuffled = o.col_indices.clone(), o.values.clone()
    shuffled[0][:, : o.num_live], shuffled[1][:, : o.num_live] = live[:, order], tiles[:, order]
    torch.testing.assert_close(
        call(o, backend, col_indices=shuffled[0], values=shuffled[1]), call(o, backend)
    )


@quick
@given(shape=shapes(), backend=st.sampled_from(["gathered", "dense"]))
def test_growing_into_spare_slots_changes_nothing_while_they_hold_zeros(
    make_operands, shape, backend
):
    o = make_operands(**shape)
    before = call(o, backend)
    o.values[:, o.num_live :] = 0
    if o.num_live == o.C or o.num_live == o.values.shape[1]:
        return
    for row in range(o.values.shape[0]):
        absent = set(range(o.C)) - set(o.col_indices[row].tolist())
        o.col_indices[row, o.num_live] = min(absent)
    o.num_live += 1
    torch.testing.assert_close(call(o, backend), before)


@quick
@given(shape=shapes(), scale=st.floats(-4, 4))
def test_linear_in_x_and_in_values(make_operands, shape, scale):
    o = make_operands(**shape)
    o.bias = None
    y = call(o)
    torch.testing.assert_close(call(o, x=scale * o.x), scale * y)
    torch.testing.assert_close(call(o, values=scale * o.values), scale * y)
    torch.testing.assert_close(call(o, x=o.x + o.x.flip(0)), y + y.flip(0))
