"""Which backend runs, that it can be seen, and that a wish not followed is said once."""

import warnings

import pytest
import torch

from blockell_kernels import _backends, block_ell_linear, explain
from blockell_kernels._backends import BACKEND_NAMES, Case, select
from blockell_kernels._cpu_rule import BREAK_EVEN

CPU = torch.device("cpu")


def case(direction="forward", N=2048, R=160, C=40, K=20, B=16, row_group=1, device=CPU):
    return Case(direction, device, torch.float32, N, R, C, K, B, row_group)


def call(o, **kwargs):
    return block_ell_linear(o.x, o.values, o.col_indices, o.bias, **kwargs)


@pytest.mark.parametrize("direction", _backends.DIRECTIONS)
def test_the_cpu_rule(direction):
    assert select(case(direction, K=20)).backend == "dense"  # free rows at 50%
    assert select(case(direction, K=4)).backend == "gathered"  # at 10%
    assert select(case(direction, K=20, row_group=8)).backend == "gathered"  # tall groups
    assert select(case(direction, K=40, row_group=8)).backend == "dense"  # nothing is absent
    assert select(case(direction, K=40, N=1)).backend == "dense"


def test_the_cpu_rule_with_few_tokens():
    assert select(case(N=1, K=20)).backend == "gathered"
    assert select(case("grad_input", N=1, K=20)).backend == "gathered"
    small = {"R": 16, "C": 16, "K": 8}  # one dense copy for two products is faster
    assert select(case(N=32, **small)).backend == "dense"
    assert select(case(N=32, **small, row_group=2)).backend == "gathered"


@pytest.mark.parametrize("direction", _backends.DIRECTIONS)
def test_break_even_grows_with_the_height(direction):
    limits = list(BREAK_EVEN[direction].values())
    assert limits == sorted(limits)
    assert all(0 < limit < 1 for limit in limits)


def test_heights_between_the_measured_ones_take_the_row_below():
    at_48 = select(case(B=16, row_group=3, R=159, K=17))
    assert "0.42" in at_48.why
    assert select(case(B=4, K=1)).backend == "dense"  # lower than any that was measured


def test_a_choice_does_not_outlive_the_tf32_setting(tf32, monkeypatch):
    """Where torch allows TF32, dense products are many times as fast."""

    class Sparse(_backends.Backend):
        def verdict(self, case):
            return _backends.Verdict(not tf32.allow_tf32, "measured")

    monkeypatch.setattr(_backends, "get_backend", lambda name: Sparse())
    monkeypatch.setattr(_backends, "unavailable", lambda name: None)
    on_gpu = case(device=torch.device("cuda"))
    for allowed, expected in ((False, "triton"), (True, "dense"), (False, "triton")):
        tf32.allow_tf32 = allowed
        assert select(on_gpu).backend == expected


def test_other_devices_use_dense():
    assert select(case(device=torch.device("meta"))).backend == "dense"
    assert (
        "no sparse backend for device type 'meta'" in select(case(device=torch.device("meta"))).why
    )


def test_explain(make_operands):
    o = make_operands(700, 16, 12, 2, 16)
    explanation = explain(o.x, o.values, o.col_indices, o.bias)
    assert explanation.forward.backend == "gathered"
    assert "break-even of grad_values" in explanation.grad_values.why
    assert str(explanation).splitlines()[0].startswith("forward: gathered: density 0.17 <= ")
    asked = explain(o.x, o.values, o.col_indices, backend="dense")
    assert {choice.backend for choice in asked} == {"dense"}
    refused = explain(o.x, o.values, o.col_indices, backend="triton")
    assert refused.forward.backend == "gathered"
    assert "asked for another, but" in str(refused)


@pytest.mark.parametrize("name", [n for n in BACKEND_NAMES if n not in ("auto", "triton")])
def test_a_backend_asked_for_is_used(make_operands, monkeypatch, name):
    o = make_operands(9, 4, 3, 2, 8)
    used = []
    backend = _backends.get_backend(name)
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *args: used.append(name) or forward(*args))
    call(o, backend=name)
    monkeypatch.setenv("BLOCKELL_BACKEND", name)
    call(o)
    assert used == [name, name]
    call(o, backend="auto")  # the argument goes before the environment
    assert len(used) == (3 if name == "dense" else 2)


def test_triton_on_cpu_tensors_warns_once_and_computes(make_operands, monkeypatch):
    o = make_operands(9, 4, 3, 2, 8)
    reason = "its kernels do not run here"
    monkeypatch.setattr(_backends, "unavailable", lambda name: reason if name == "triton" else None)
    _backends.forget()
    pattern = f"backend 'triton' was asked for, but {reason}; 'dense' is used"
    with pytest.warns(RuntimeWarning, match=pattern):
        y = call(o, backend="triton")
    torch.testing.assert_close(y, call(o))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(o, backend="triton")
        monkeypatch.setenv("BLOCKELL_BACKEND", "triton")
        call(o)
    _backends.forget()


def test_a_backend_whose_module_cannot_be_imported_says_so(monkeypatch):
    monkeypatch.setitem(_backends._MODULES, "gathered", "blockell_kernels._nowhere")
    _backends.get_backend.cache_clear()
    _backends.unavailable.cache_clear()
    _backends.forget()
    try:
        choice = select(case(K=4))
        assert choice.backend == "dense"
        assert "cannot be imported" in choice.why
    finally:
        _backends.get_backend.cache_clear()
        _backends.unavailable.cache_clear()
        _backends.forget()


def test_unknown_names(make_operands, monkeypatch):
    o = make_operands(9, 4, 3, 2, 8)
    with pytest.raises(ValueError, match=r"backend \(='cuda'\) must be one of auto, triton"):
        call(o, backend="cuda")
    monkeypatch.setenv("BLOCKELL_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"environment variable BLOCKELL_BACKEND \(='fast'\)"):
        call(o)
