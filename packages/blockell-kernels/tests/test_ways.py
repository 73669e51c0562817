"""Which of the ways a product takes: by its case, and by how its operands lie. Needs no GPU.

Legend: B tile side, N tokens.
"""

from __future__ import annotations

import sys

import pytest
import torch

from blockell_kernels._backends import DIRECTIONS, Case, Pattern

pytest.importorskip("triton")
from blockell_kernels._triton import BACKEND, _ways

BF16, FP32 = torch.bfloat16, torch.float32


def case(direction, N, shape, B, G=1, density=0.5, dtype=BF16, device="cuda"):
    R, C = shape[1] // B, shape[0] // B
    sizes = N, R, C, max(1, round(density * C)), B, G
    return Case(direction, torch.device(device), dtype, *sizes)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of that kind is there, as far as choices go."""
    facts = {"capability": (9, 0), "num_sms": 132}
    for name, module in list(sys.modules.items()):
        if name.startswith(("blockell_kernels._triton", "blockell_kernels._gluon")):
            for fact in facts.keys() & vars(module).keys():
                monkeypatch.setattr(module, fact, lambda device, fact=fact: facts[fact])
    for module in (_ways._by_halves, _ways._whole):
        monkeypatch.setattr(module, "available", lambda device: True)
    caches = (_ways.takes_whole, _ways._walk.walk_for, _ways._few_tokens.strip_for)
    for cached in (*caches, _ways.tiling_for):
        cached.cache_clear()
    yield
    for cached in (*caches, _ways.tiling_for):
        cached.cache_clear()


LARGE, SMALL = (4096, 14336), (640, 2560)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("way", "chosen"),
    [
        (_ways.WHOLE, {"N": 512, "shape": LARGE, "B": 64, "density": 1.0}),
        (_ways.WALK, {"N": 128, "shape": LARGE, "B": 8}),
        (_ways.HALVES, {"N": 8192, "shape": SMALL, "B": 128, "dtype": FP32}),
        (_ways.FEW, {"N": 1, "shape": SMALL, "B": 16, "G": 8}),
        (_ways.BLOCKS, {"N": 8192, "shape": SMALL, "B": 128}),
    ],
    ids=[way.name for way in _ways.WAYS],
)
def test_every_way_is_taken_where_it_was_measured_to_win(hopper, direction, way, chosen):
    found = case(direction, **chosen)
    assert _ways.way_of(found) is way
    assert f"by {way.name}, in {way.cost}" in BACKEND.details(found)


def way(name, how, reads=True):
    """A way that says what it is given."""
    said = {n: lambda *given, n=n: (name, n, *given) for n in DIRECTIONS}
    return _ways.Way(name, "no time", lambda case: how, lambda a, b, B: reads, **said)


def test_the_first_that_computes_the_case_and_reads_its_operands_is_taken(monkeypatch):
    x, dy, values = torch.zeros(5, 32), torch.zeros(5, 16), torch.zeros(1, 2, 16, 16)
    pattern = Pattern(torch.zeros(1, 2, dtype=torch.int32), 2, 16, 1, 2)
    last = way("last", "how")
    for first in (way("unfit", None), way("unread", "other", reads=False), way("later", "how")):
        monkeypatch.setattr(_ways, "WAYS", (first, last))
        name = "later" if first.name == "later" else "last"
        y = _ways.forward(x, values, None, pattern)
        assert y == (name, "forward", x, values, None, pattern, "how")
        assert _ways.grad_input(dy, values, pattern)[:2] == (name, "grad_input")
        assert _ways.grad_values(dy, x, pattern) == (name, "grad_values", dy, x, pattern, "how")


def test_ways_are_asked_about_the_call(monkeypatch):
    asked = []
    noting = way("noting", None)._replace(
        how=lambda case: asked.append(case) or "how",
        takes=lambda *operands: asked.append(operands) or True,
    )
    monkeypatch.setattr(_ways, "WAYS", (noting,))
    x, dy = torch.zeros(5, 48, dtype=BF16), torch.zeros(5, 32, dtype=BF16)
    pattern = Pattern(torch.zeros(2, 4, dtype=torch.int32), 3, 16, 2, 1)
    _ways.grad_values(dy, x, pattern)
    expected = Case("grad_values", torch.device("cpu"), BF16, 5, 2, 3, 1, 16, 2)
    assert asked == [expected, (dy, x, 16)]


@pytest.mark.parametrize("name", [w.name for w in (_ways.WHOLE, _ways.WALK, _ways.HALVES)])
def test_operands_that_descriptors_cannot_read_are_left_to_others(monkeypatch, name):
    """Rows that do not begin at 16 bytes, features that lie apart, tiles that are a part."""
    monkeypatch.setattr(_ways._whole, "runs_on", lambda t: True)
    takes = next(w.takes for w in _ways.WAYS if w.name == name)
    x, dy = torch.zeros(8, 32, dtype=BF16), torch.zeros(8, 16, dtype=BF16)
    values = torch.zeros(1, 2, 16, 16, dtype=BF16)
    unaligned, apart = torch.zeros(8, 33, dtype=BF16)[:, 1:], torch.zeros(32, 8, dtype=BF16).T
    assert takes(x, values, 16)
    assert takes(dy, x, 16)
    for t in (unaligned, apart):
        assert not takes(t, values, 16)
        assert not takes(dy, t, 16)
    assert takes(x, values.transpose(2, 3), 16) is (name == _ways.WALK.name)
