"""The short way to a compiled kernel: found by a key that is as fine as Triton's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
_launch = pytest.importorskip("blockell_kernels._triton._launch")


class Parameter(SimpleNamespace):
    default = None


class Compiled:
    """What compiling returns: it notes its runs."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.run = lambda *args: log.append(args)


class Kernel:
    """A kernel (t, n, BLOCK) that counts how often it goes Triton's own way."""

    __name__ = "kernel"

    def __init__(self):
        names = {"t": False, "n": False, "BLOCK": True}
        self.params = [Parameter(name=n, is_constexpr=c) for n, c in names.items()]
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.slow.append((grid, args, constants))
            return Compiled(self.fast)

        return run


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_ready", {})
    return Kernel()


def test_a_launcher_may_decide_to_wait_for_the_end(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "overlaps", lambda device: True)
    kernel.params.append(Parameter(name="OVERLAPS", is_constexpr=True, default=False))
    for _ in range(2):
        _launch.launch(kernel, (3,), torch.zeros(64), 32, BLOCK=16, OVERLAPS=False)
    assert [call[2] for call in kernel.slow] == [{"BLOCK": 16, "OVERLAPS": False}]
    assert kernel.fast[0][-2:] == (16, False)


@pytest.mark.parametrize("able", [True, False])
def test_a_kernel_that_waits_is_launched_while_the_one_before_it_ends(kernel, monkeypatch, able):
    monkeypatch.setattr(_launch, "overlaps", lambda device: able)
    kernel.params.append(Parameter(name="OVERLAPS", is_constexpr=True, default=False))
    for _ in range(2):
        _launch.launch(kernel, (3,), torch.zeros(64), 32, BLOCK=16)
    asked = {"OVERLAPS": True, "launch_pdl": True} if able else {}
    assert [call[2] for call in kernel.slow] == [{"BLOCK": 16} | asked]
    assert kernel.fast[0][-2:] == (16, able)


def test_the_second_launch_runs_the_compiled_kernel(kernel):
    t = torch.zeros(64)
    _launch.launch(kernel, (3,), t, 32, BLOCK=16, num_warps=4)
    _launch.launch(kernel, (5, 2), t, 48, BLOCK=16, num_warps=4)
    assert [call[0] for call in kernel.slow] == [(3,)]
    assert kernel.fast == [(5, 2, 1, 7, "function", "metadata", None, None, None, t, 48, 16)]


@pytest.mark.parametrize(
    "changed",
    [
        {"n": 1},
        {"n": 17},
        {"n": 2**31},
        {"n": 2**31 + 1},
        {"n": None},
        {"n": True},
        {"n": 1.5},
        {"t": torch.zeros(64, dtype=torch.bfloat16)},
        {"t": torch.zeros(65)[1:]},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_specialises_on_is_compiled_anew(kernel, changed):
    call = {"t": torch.zeros(64), "n": 32, "BLOCK": 16, "num_warps": 4}
    for given in (call, call | changed):
        t, n, *_ = given.values()
        _launch.launch(kernel, (1,), t, n, BLOCK=given["BLOCK"], num_warps=given["num_warps"])
    assert len(kernel.slow) == 2
    assert not kernel.fast


def test_a_profiler_hears_of_every_launch(kernel):
    def hook(metadata):
        raise AssertionError("the stand-in kernel launches nothing")

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            _launch.launch(kernel, (1,), torch.zeros(4), 32, BLOCK=16)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.slow) == 2


def test_arguments_that_the_launcher_cannot_place_are_refused(kernel):
    with pytest.raises(TypeError, match="argument n must be positional"):
        _launch.launch(kernel, (1,), torch.zeros(4), n=3, BLOCK=16)


def test_descriptors_are_those_of_triton():
    t = torch.zeros(32, 64, dtype=torch.bfloat16)
    ours = _launch.descriptor(t, [16, 32])
    theirs = _launch.TensorDescriptor.from_tensor(t, [16, 32])
    names = ("shape", "strides", "block_shape", "padding")
    assert all(list(getattr(ours, n)) == list(getattr(theirs, n)) for n in names)
    assert ours.base is t
