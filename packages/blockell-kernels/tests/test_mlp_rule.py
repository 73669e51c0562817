"""Which kernels the fused MLP takes for the products that its activation rides on.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._backends import Pattern

_mlp = pytest.importorskip("blockell_kernels._triton._mlp")


@pytest.fixture
def taken(monkeypatch):
    """What is taken where every kernel could run, as names."""
    for name in ("forward_takes", "dense_middle_takes"):
        monkeypatch.setattr(_mlp._by_turns, name, lambda *args: True)
    monkeypatch.setattr(_mlp._by_turns, "middle_takes", lambda dy, values, p, pre: p.B == 128)
    blocks = torch.empty(0)

    def middle(dy, weight, pattern, *args, **kwargs):
        return ("dense weight" if pattern is None else "blocks"), None, None

    monkeypatch.setattr(_mlp, "to_dense", lambda values, pattern: blocks)
    monkeypatch.setattr(_mlp._by_turns, "middle", middle)
    monkeypatch.setattr(_mlp._by_turns, "forward", lambda *args: ("by turns", None))
    monkeypatch.setattr(_mlp, "grad_input_activated", lambda *args, **kwargs: ("Triton",))
    monkeypatch.setattr(_mlp, "_forward_activated", lambda *args: ("Triton", None))

    def fc1(N, width, hidden, B, G=1, density=0.5, activation="gelu"):
        x = torch.empty(N, width, dtype=torch.bfloat16, device="meta")
        found = _mlp.forward_activated(
            x, blocks, None, pattern(width, hidden, B, G, density), activation, True
        )
        return None if found is None else found[0]

    def fc2(N, hidden, width, B, G=1, density=0.5, sparse=True, dense=True, keep_a=False):
        dy = torch.empty(N, width, dtype=torch.bfloat16, device="meta")
        found = _mlp.middle(
            dy, blocks, None, pattern(hidden, width, B, G, density), dy, "gelu",
            sparse=sparse, dense=dense, keep_a=keep_a, need_bias=True,
        )  # fmt: skip
        return None if found is None else found[0]

    return fc1, fc2


def pattern(width, outputs, B, G, density):
    R, C = outputs // B, width // B
    return Pattern(torch.empty(R, 1), C, B, G, max(1, round(density * C)))


def test_short_sums_of_many_tokens_go_by_turns(taken):
    fc1, fc2 = taken
    for B, G in ((128, 1), (16, 8)):
        assert fc1(8192, 640, 2560, B, G) == "by turns"
        assert fc1(8192, 4096, 14336, B, G) == "Triton"
    assert fc1(8192, 640, 2560, 128, activation="none") == "Triton"
    assert fc1(8192, 640, 2560, 64) == "by turns"
    assert fc1(1000, 640, 2560, 128) is None
    assert fc1(100, 640, 2560, 128) is None
    assert fc2(8192, 2560, 640, 128) == "blocks"
    assert fc2(16384, 6144, 1536, 128) == "blocks"
    assert fc2(8192, 14336, 4096, 128) == "Triton"
    assert fc2(1000, 2560, 640, 128) == "Triton"
    assert fc2(1000, 2560, 640, 128, keep_a=True) is None
    assert fc2(100, 2560, 640, 128) is None


def test_small_tiles_go_by_a_dense_weight_unless_sums_are_long_or_it_is_not_wanted(taken):
    _, fc2 = taken
    for sparse in (False, True):
        assert fc2(8192, 2560, 640, 16, 8, sparse=sparse) == "dense weight"
        assert fc2(8192, 14336, 4096, 16, 8, sparse=sparse) is None
        assert fc2(8192, 2560, 640, 16, 8, sparse=sparse, dense=False) is None
    assert fc2(8192, 2560, 640, 128, sparse=False) == "dense weight"
    assert fc2(8192, 2560, 640, 128, sparse=False, dense=False) is None


def test_tiles_32_and_64_go_by_the_faster_of_blocks_and_dense_weight(taken):
    _, fc2 = taken
    assert fc2(8192, 2560, 640, 64) == "dense weight"
    assert fc2(2048, 2560, 640, 64) == "Triton"
    assert fc2(8192, 4096, 1024, 64) == "Triton"
    assert fc2(8192, 2560, 640, 64, density=0.25) == "Triton"
    assert fc2(8192, 2560, 640, 64, density=0.25, keep_a=True) == "dense weight"
    assert fc2(8192, 8192, 2048, 64) == "Triton"
    assert fc2(8192, 14336, 4096, 64) is None
    assert fc2(8192, 14336, 4096, 64, density=0.25) == "Triton"
    assert fc2(8192, 4096, 1024, 32, 4) == "dense weight"
    assert fc2(8192, 4096, 1024, 32, 4, density=0.25) is None
    assert fc2(8192, 2560, 640, 32, 4, density=0.25) == "dense weight"
