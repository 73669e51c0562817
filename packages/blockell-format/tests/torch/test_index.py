"""The transposed index."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blockell_format import (
    BlockELLFormat,
    TransposedIndex,
    create_random_topology,
    transposed_index,
)

Maker = Callable[..., BlockELLFormat]


def by_loop(columns: torch.Tensor, C: int) -> list[list[tuple[int, int]]]:
    """For every column the (row, slot) pairs that hold it."""
    held: list[list[tuple[int, int]]] = [[] for _ in range(C)]
    for row, entries in enumerate(columns.tolist()):
        for slot, column in enumerate(entries):
            if column >= 0:
                held[column].append((row, slot))
    return held


def pairs(index: TransposedIndex, C: int, K: int) -> list[list[tuple[int, int]]]:
    rows, slots = index.rows(K).tolist(), index.slots(K).tolist()
    starts = index.col_start.tolist()
    return [list(zip(rows[a:b], slots[a:b], strict=True)) for a, b in itertools.pairwise(starts)]


@given(data=st.data())
def test_equals_the_loop(data: st.DataObject, matrix_maker: Maker) -> None:
    C = data.draw(st.integers(1, 8))
    K, spare = data.draw(st.integers(1, C)), data.draw(st.integers(0, 2))
    R, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 1000))
    columns = matrix_maker(R, C, K, 1, spare=spare, seed=seed).col_indices
    index = transposed_index(columns, C)
    assert index.order.dtype == index.col_start.dtype == torch.int32
    assert index.order.shape == (R * (K + spare),)
    assert index.col_start.shape == (C + 1,)
    assert pairs(index, C, K + spare) == by_loop(columns, C)
    assert sorted(index.order.tolist()) == list(range(R * (K + spare)))
    assert index.col_start[-1] == R * K
    assert index.counts.tolist() == [len(held) for held in by_loop(columns, C)]


def test_empty_columns() -> None:
    columns = torch.tensor([[3, 1], [1, 3]], dtype=torch.int32)
    index = transposed_index(columns, 5)
    assert index.col_start.tolist() == [0, 0, 2, 2, 4, 4]
    assert index.order.tolist() == [1, 2, 0, 3]


def test_in_place(matrix_maker: Maker) -> None:
    first, second = (matrix_maker(seed=seed, spare=1).col_indices for seed in (1, 2))
    index = transposed_index(first, 5)
    addresses = [tensor.data_ptr() for tensor in index]
    again = transposed_index(second, 5, out=index)
    assert again is index
    assert [tensor.data_ptr() for tensor in index] == addresses
    for got, wanted in zip(index, transposed_index(second, 5), strict=True):
        assert torch.equal(got, wanted)


class Recorder(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation(matrix_maker: Maker) -> None:
    columns = matrix_maker(spare=1).col_indices
    index = transposed_index(columns, 5)
    with Recorder() as recorder:
        transposed_index(columns, 5, out=index)
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy"}
    assert not recorder.names & (waiting | {"aten::bincount", "aten::unique_dim", "aten::equal"})
    # on a device without content, anything that reads values fails
    meta = transposed_index(columns.to("meta"), 5)
    assert meta.order.shape == (24,)


def test_compiles_without_recompiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(transposed_index, fullgraph=True, backend="aot_eager")
    index = transposed_index(create_random_topology(6, 5, 3), 5)
    with torch.compiler.set_stance("default"):
        compiled(create_random_topology(6, 5, 3), 5, out=index)
    with torch.compiler.set_stance("fail_on_recompile"):
        columns = create_random_topology(6, 5, 3)
        compiled(columns, 5, out=index)
    for got, wanted in zip(index, transposed_index(columns, 5), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    columns = create_random_topology(6, 5, 3)
    compiled = torch.compile(transposed_index, fullgraph=True)
    for got, wanted in zip(compiled(columns, 5), transposed_index(columns, 5), strict=True):
        assert torch.equal(got, wanted)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"col_indices has shape \(3,\); it must be \[R, K\]"):
        transposed_index(torch.zeros(3, dtype=torch.int32), 5)
    index = transposed_index(create_random_topology(6, 5, 3), 5)
    with pytest.raises(ValueError, match=r"out has shapes \(18,\) and \(6,\); .* \(12,\) and \(6,"):
        transposed_index(create_random_topology(6, 5, 2), 5, out=index)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_the_device_without_waiting() -> None:
    columns = create_random_topology(160, 40, 20)
    wanted = transposed_index(columns, 40)
    columns = columns.cuda()
    index = transposed_index(columns, 40)
    try:
        torch.cuda.set_sync_debug_mode("error")
        transposed_index(columns, 40, out=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, expected in zip(index, wanted, strict=True):
        assert torch.equal(got.cpu(), expected)
