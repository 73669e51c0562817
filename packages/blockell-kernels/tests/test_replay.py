"""Launches run again by what was recorded of them: a stand-in driver notes what it is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from blockell_kernels._backends import Pattern
from blockell_kernels._triton import _launch, _replay
from blockell_kernels._triton._launch import descriptor, launch


class Compiled:
    """What compiling returns: it notes its runs."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.run = lambda *args: log.append(args)


class Kernel:
    """A kernel of the parameters given to it, and a constant BLOCK."""

    def __init__(self, log, *names):
        parameters = {**dict.fromkeys(names, False), "BLOCK": True}
        self.params = [
            SimpleNamespace(name=n, is_constexpr=c, default=None) for n, c in parameters.items()
        ]
        self.log = log

    def __getitem__(self, grid):
        return lambda *args, **constants: Compiled(self.log)


@pytest.fixture
def log(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    for module in (_launch, _replay):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_ready", {})
    monkeypatch.setattr(_replay, "_recordings", {})
    monkeypatch.setattr(_replay, "_gpu_of", lambda t: 0)
    return []


def pattern_of(columns: int = 4) -> Pattern:
    return Pattern(torch.zeros(2, columns, dtype=torch.int32), 8, 16, 1, columns)


@pytest.fixture
def product(log):
    """A launcher of two kernels, with a scratch tensor, a descriptor and a count of its calls."""
    first = Kernel(log, "x", "box", "cols", "scratch", "n")
    second = Kernel(log, "scratch", "bias", "y", "n")

    @_replay.replayed
    def run(x, values, bias, pattern, name="f"):
        run.calls += 1
        scratch = torch.empty(3, 64, dtype=torch.float32)
        y = x.new_empty(1, 64)
        box = descriptor(values.view(8, 16), [8, 16])
        launch(first, (3, 2), x, box, pattern.col_indices, scratch, x.shape[0], BLOCK=16)
        launch(second, (1,), scratch, y if bias is None else bias, y, 5, BLOCK=32)
        return y.view(64)

    run.calls = 0
    return run


def operands(rows: int = 4):
    return torch.zeros(rows, 32), torch.zeros(2, 4, 16), torch.zeros(64)


def twice(run, *args):
    """From then on calls of that kind are replayed."""
    run(*args)
    run(*args)


def test_a_call_is_launched_again_on_its_own_operands(product, log):
    twice(product, *operands(), pattern_of())
    log.clear()
    x, values, bias = operands()
    pattern = pattern_of()
    y = product(x, values, bias, pattern)
    assert product.calls == 2
    assert (y.shape, y.dtype, y._is_view()) == ((64,), torch.float32, False)
    (*grid, stream, function, metadata, _, _, _, at, box, cols, scratch, n, block), other = log
    assert (grid, stream, function, metadata) == ([3, 2, 1], 7, "function", "metadata")
    assert (at, cols, n, block) == (x.data_ptr(), pattern.col_indices.data_ptr(), 4, 16)
    assert box.base.data_ptr() == values.data_ptr()
    expected = descriptor(values.view(8, 16), [8, 16])
    names = ("shape", "strides", "block_shape", "padding")
    assert all(getattr(box, name) == getattr(expected, name) for name in names)
    assert other[:3] == (1, 1, 1)
    assert other[9:] == (scratch, bias.data_ptr(), y.data_ptr(), 5, 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, values, bias, p: (torch.zeros(5, 32), values, bias, p),
        lambda x, values, bias, p: (torch.zeros(32, 4).T, values, bias, p),
        lambda x, values, bias, p: (x.bfloat16(), values, bias, p),
        lambda x, values, bias, p: (torch.zeros(129)[1:].view(4, 32), values, bias, p),
        lambda x, values, bias, p: (x, values, None, p),
        lambda x, values, bias, p: (x, values, bias, pattern_of(5)),
        lambda x, values, bias, p: (x, values, bias, p._replace(num_live=3)),
        lambda x, values, bias, p: (x, values, bias, p._replace(order=torch.zeros(8))),
        lambda x, values, bias, p: (x, values, bias, p, "g"),
    ],
)
def test_other_facts_are_decided_anew(product, change):
    given = *operands(), pattern_of()
    twice(product, *given)
    product(*change(*given))
    assert product.calls == 3


def test_operands_that_are_one_tensor_are_not_confused(log):
    kernel = Kernel(log, "a", "b")

    @_replay.replayed
    def run(a, b):
        out = torch.empty(16)
        launch(kernel, (1,), a, b, BLOCK=1)
        return out

    t = torch.zeros(16)
    twice(run, t, t)
    for given in ((torch.zeros(16), torch.zeros(16)), (torch.zeros(16), torch.zeros(16)), (t, t)):
        log.clear()
        run(*given)
        addresses = [arg if isinstance(arg, int) else arg.data_ptr() for arg in log[0][9:11]]
        assert addresses == [u.data_ptr() for u in given]


@pytest.mark.parametrize(
    "more",
    [
        lambda x, out: out.zero_(),
        lambda x, out: x.clone(),
        lambda x, out: x @ x.T,
        lambda x, out: launch(Kernel([], "t"), (1,), torch.tensor([1.0, 2.0]), BLOCK=1),
        lambda x, out: launch(Kernel([], "t"), (1,), x[1:], BLOCK=1),
        lambda x, out: torch.empty(_replay.MAX_HELD + 1, dtype=torch.uint8),
    ],
)
def test_a_call_that_does_more_goes_the_long_way(log, more):
    kernel, calls = Kernel(log, "x", "out"), []

    @_replay.replayed
    def run(x):
        calls.append(1)
        out = torch.empty(16)
        launch(kernel, (1,), x, out, BLOCK=1)
        more(x, out)
        return out

    for _ in range(3):
        run(torch.zeros(16, 4))
    assert len(calls) == 3


def test_none_operands_and_tuples_are_returned_as_they_were(log):
    kernel, calls = Kernel(log, "x", "out"), []

    @_replay.replayed
    def run(x, h, *, keep):
        calls.append(1)
        out = torch.empty_like(x)
        launch(kernel, (1,), x, out, BLOCK=1)
        return out, h if keep else None

    @_replay.replayed
    def refuse(x):
        calls.append(1)

    for _ in range(3):
        x, h = torch.zeros(4, 4), torch.zeros(2)
        assert run(x, h, keep=True)[1] is h
        out, kept = run(x, h, keep=False)
        assert (out.shape, kept) == (x.shape, None)
        assert refuse(x) is None
    assert len(calls) == 3 * 2


def test_tensors_given_by_name_are_operands(log):
    kernel, calls = Kernel(log, "x", "out"), []

    @_replay.replayed
    def run(x, *, out, scale):
        calls.append(1)
        launch(kernel, (1,), x, out, BLOCK=scale)
        return out

    for _ in range(3):
        log.clear()
        out = torch.zeros(16)
        assert run(torch.zeros(4), out=out, scale=1) is out
        for args in log:
            assert args[10] is out or args[10] == out.data_ptr()
        run(torch.zeros(4), scale=1, out=torch.zeros(16))
        run(torch.zeros(4), out=torch.zeros(16), scale=2)
    assert len(calls) == 3 * 2


def test_a_profiler_hears_of_every_launch(product, log, monkeypatch):
    twice(product, *operands(), pattern_of())
    monkeypatch.setattr(_launch, "watched", lambda: True)
    product(*operands(), pattern_of())
    assert product.calls == 3


def test_launches_inside_of_a_recorded_call_are_its_own(product, log):
    @_replay.replayed
    def outer(x, values, bias, pattern):
        return product(x, values, bias, pattern)

    product(*operands(), pattern_of())
    for calls in (2, 3, 3):  # the second records itself, the third outer, the last is replayed
        log.clear()
        outer(*operands(), pattern_of())
        assert len(log) == 2
        assert product.calls == calls


def test_memory_is_free_after_its_last_use(log):
    """Of operands that are handed over, and of scratch tensors."""
    first, second = Kernel(log, "x", "scratch"), Kernel(log, "scratch", "out")

    def step(operands):
        scratch, out = torch.empty(32), torch.empty(16)
        launch(first, (1,), operands[0], scratch, BLOCK=1)
        launch(second, (1,), scratch, out, BLOCK=1)
        return [out]

    for _ in range(2):
        _replay.call(("kind",), [torch.zeros(4)], step)
    operands = [torch.zeros(4)]
    (out,) = _replay.call(("kind",), operands, step)
    assert out.shape == (16,)
    assert [t is None for t in operands] == [True, True, False]


@pytest.mark.parametrize("kind", [("other",), ("kind", 1)])
def test_a_kind_names_what_is_not_an_operand(log, kind):
    calls, kernel = [], Kernel(log, "x", "out")

    def step(operands):
        calls.append(1)
        out = torch.empty(16)
        launch(kernel, (1,), operands[0], out, BLOCK=1)
        return out

    for _ in range(3):
        _replay.call(("kind",), [torch.zeros(4), None], step)
    assert len(calls) == 2
    _replay.call(kind, [torch.zeros(4), None], step)
    _replay.call(("kind",), [torch.zeros(4), torch.zeros(4)], step)
    assert len(calls) == 4


@pytest.mark.parametrize(("dtype", "decided"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_torch_allowing_tf32_is_asked_at_every_call(log, tf32, dtype, decided):
    """It alone, of torch's settings, changes what launchers do, and of float32 alone."""
    calls, kernel = [], Kernel(log, "x", "out")

    @_replay.replayed
    def run(x):
        calls.append(1)
        out = torch.empty(16)
        launch(kernel, (1,), x, out, BLOCK=1)
        return out

    for allowed in (False, False, True, True, False, True):
        tf32.allow_tf32 = allowed
        run(torch.zeros(4, dtype=dtype))
    assert len(calls) == decided
