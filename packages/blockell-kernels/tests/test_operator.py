"""The operators as torch sees them: opcheck, autocast, what is saved and what is computed."""

import copy
import re

import pytest
import torch

from blockell_format import transposed_index
from blockell_kernels import _backends, _plan, block_ell_linear, probe_size


def call(o, x=None, values=None, bias=None, **kwargs):
    return block_ell_linear(
        o.x if x is None else x,
        o.values if values is None else values,
        o.col_indices,
        o.bias if bias is None else bias,
        row_group=o.row_group,
        num_live=o.num_live,
        **kwargs,
    )


@pytest.mark.parametrize("with_probe", [False, True])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_opcheck_linear(make_operands, with_probe, leading):
    N = torch.Size(leading).numel() if leading else 5
    o = make_operands(N, 4, 3, 2, 8, row_group=2)
    x = o.x.view(*leading, 24) if leading else o.x
    index = transposed_index(o.col_indices, 3)
    probe = torch.zeros(probe_size(4, 3), requires_grad=True) if with_probe else None
    args = (
        x.clone().requires_grad_(),
        o.values.requires_grad_(),
        o.col_indices,
        o.bias.requires_grad_(),
        probe,
        *(index if with_probe else (None, None)),
        2,
        2,
        "gradient" if with_probe else "none",
        "",
    )
    torch.library.opcheck(torch.ops.blockell.linear.default, args)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("sample", ["none", "norms", "gradient"])
def test_opcheck_linear_backward(make_operands, needs, sample):
    o = make_operands(5, 4, 3, 2, 8)
    args = (o.dy, o.x, o.values, o.col_indices, None, None, 3, 8, 1, 2, *needs, sample, "")
    torch.library.opcheck(torch.ops.blockell.linear_backward.default, args)


def test_autocast_casts_operands_but_not_the_probe(make_operands):
    o = make_operands(9, 4, 3, 2, 16)
    probe = torch.zeros(probe_size(4, 3), requires_grad=True)
    values, bias = o.values.requires_grad_(), o.bias.requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y = call(o, probe=probe, sample="norms")
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), call(o), rtol=3e-2, atol=3e-2)
    y.backward(o.dy.to(y.dtype))
    assert values.grad.dtype == bias.grad.dtype == probe.grad.dtype == torch.float32
    row_sq = o.dy.to(y.dtype).double().view(9, 4, 16).square().sum((0, 2)).float()
    torch.testing.assert_close(probe.grad[:4], row_sq)


def test_autocast_accepts_mixed_dtypes_and_leaves_float64_alone(make_operands):
    o = make_operands(9, 4, 3, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(o, x=o.x.bfloat16()).dtype == torch.bfloat16
        d = o.to(torch.float64)
        assert call(d).dtype == torch.float64


class Spy(_backends.Backend):
    """Counts what is computed."""

    name = "gathered"

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def unsupported(self, case):
        return None

    def verdict(self, case):
        return _backends.Verdict(True, "spied on")

    def __getattribute__(self, name):
        if name in ("forward", "grad_input", "grad_values", "block_grad_norms") or (
            name == "grad_values_and_norms"
        ):
            self.calls.append(name)
            return getattr(self.backend, name)
        return super().__getattribute__(name)


@pytest.fixture
def spy(monkeypatch):
    backend = Spy(_backends.get_backend("gathered"))
    _backends.forget()
    monkeypatch.setattr(_backends, "get_backend", lambda name: backend)
    monkeypatch.setattr(_plan, "get_backend", lambda name: backend)
    monkeypatch.setattr(_plan, "_plans", {})
    yield backend
    _backends.forget()


@pytest.mark.parametrize(
    ("x", "values", "bias", "sample", "expected"),
    [
        (True, True, True, "none", ["grad_input", "grad_values"]),
        (True, False, True, "none", ["grad_input"]),
        (False, True, False, "none", ["grad_values"]),
        (False, True, False, "norms", ["grad_values"]),
        (False, False, True, "none", []),
        (False, False, True, "norms", []),
        (False, False, True, "gradient", ["block_grad_norms"]),
        (True, True, True, "gradient", ["grad_input", "grad_values_and_norms"]),
    ],
)
def test_computes_only_what_is_needed(make_operands, spy, x, values, bias, sample, expected):
    o = make_operands(9, 4, 3, 2, 8)
    probe = torch.zeros(probe_size(4, 3), requires_grad=True)
    y = call(
        o, x=o.x.requires_grad_(x), values=o.values.requires_grad_(values),
        bias=o.bias.requires_grad_(bias), probe=probe, sample=sample,
    )  # fmt: skip
    y.backward(o.dy)
    assert spy.calls == ["forward", *expected]


def test_saves_only_what_the_backward_needs(make_operands):
    o = make_operands(9, 4, 3, 2, 8)

    def saved(**kwargs):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
            call(o, **kwargs)
        return {t.data_ptr() for t in kept}

    x, values = o.x.clone().requires_grad_(), o.values.clone().requires_grad_()
    assert x.data_ptr() not in saved(x=x)
    assert o.values.data_ptr() in saved(x=x)
    assert values.data_ptr() not in saved(values=values)
    assert o.x.data_ptr() in saved(values=values)


def test_a_given_index_changes_nothing(make_operands):
    o = make_operands(9, 4, 3, 2, 8)
    x = o.x.requires_grad_()
    call(o, x=x).backward(o.dy)
    without, x.grad = x.grad, None
    call(o, x=x, index=transposed_index(o.col_indices, 3)).backward(o.dy)
    assert torch.equal(x.grad, without)


def test_second_derivative_is_refused(make_operands):
    o = make_operands(9, 4, 3, 2, 8)
    x = o.x.requires_grad_()
    (g,) = torch.autograd.grad(call(o, x=x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        g.sum().backward()


def test_meta_tensors_and_deep_copies(make_operands):
    o = make_operands(9, 4, 3, 2, 8)
    meta = copy.deepcopy(o)
    meta.x, meta.values, meta.bias = (t.to("meta") for t in (o.x, o.values, o.bias))
    meta.col_indices = o.col_indices.to("meta")
    y = call(meta, x=meta.x.requires_grad_())
    assert y.shape == (9, 32)
    y.sum().backward()
    assert meta.x.grad.shape == (9, 24)


@pytest.mark.parametrize("backend", ["gathered", "dense", "reference"])
@pytest.mark.parametrize("bad", [7, 3, -1, 2**31 - 1, -(2**31)])
def test_a_column_out_of_range_raises_and_does_not_crash(make_operands, backend, bad):
    o = make_operands(9, 4, 3, 2, 8)
    x, values = o.x.requires_grad_(), o.values.requires_grad_()
    through_x = call(o, x=x, values=values.detach(), backend=backend)
    through_values = call(o, x=x.detach(), values=values, backend=backend)
    o.col_indices.data[1, 1] = bad  # behind autograd's back, so that the backward pass meets it
    said = re.escape(f"col_indices holds column {bad}, out of range [0, 3); check_topology names")
    with pytest.raises(IndexError, match=said):
        call(o, x=x, values=values, backend=backend)
    # The input gradient of a dense product is by the copy that the forward product made.
    for y in (through_values,) if backend == "dense" else (through_x, through_values):
        with pytest.raises(IndexError, match=said):
            y.backward(o.dy)


def test_a_topology_changed_between_forward_and_backward_is_noticed(make_operands):
    o = make_operands(9, 4, 3, 2, 8)
    y = call(o, x=o.x.requires_grad_())
    o.col_indices[1, 1] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward(o.dy)


@pytest.mark.parametrize("backend", ["gathered", "dense", "reference"])
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_the_result_may_be_changed_in_place(make_operands, backend, leading):
    """As that of a dense layer: a following activation may overwrite it."""
    o = make_operands(6, 4, 3, 2, 8)
    grads = []
    for inplace in (False, True):
        x = o.x.view(*leading, -1).clone().requires_grad_()
        y = block_ell_linear(x, o.values, o.col_indices, o.bias, backend=backend)
        torch.nn.functional.relu(y, inplace=inplace).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
