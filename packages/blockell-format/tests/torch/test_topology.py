"""Random topologies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockell_format import create_random_topology, expand_row_group, validate_col_indices


@given(data=st.data())
def test_valid_for_all_sizes(data: st.DataObject) -> None:
    C = data.draw(st.integers(1, 12))
    K = data.draw(st.integers(1, C))
    group = data.draw(st.integers(1, 4))
    R = group * data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    columns = create_random_topology(R, C, K, generator, group)
    assert columns.dtype == torch.int32
    assert columns.shape == (R, K)
    assert columns.is_contiguous()
    assert validate_col_indices(columns.numpy(), C, group) == K


def test_uniqueness() -> None:
    columns = create_random_topology(300, 20, 10)
    assert all(len(set(row)) == 10 for row in columns.tolist())


def test_same_generator_same_result() -> None:
    draws = [create_random_topology(8, 9, 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_global_generator_is_used_only_without_another() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    create_random_topology(8, 9, 4, torch.Generator().manual_seed(1))
    create_random_topology(8, 9, 4, device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    create_random_topology(8, 9, 4)
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_column_is_equally_likely() -> None:
    columns = create_random_topology(20000, 8, 3, torch.Generator().manual_seed(0))
    share = torch.bincount(columns.flatten().long(), minlength=8) / 20000
    assert torch.allclose(share, torch.full((8,), 3 / 8), atol=0.015)


def test_meta_device() -> None:
    columns = create_random_topology(8, 9, 4, device="meta", row_group=2)
    assert columns.device.type == "meta"
    assert (columns.shape, columns.dtype) == ((8, 4), torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 5, 6), r"K \(=6\) must be in \[1, 5\]: a row cannot hold a column twice"),
        ((4, 5, 0), r"K \(=0\) must be in \[1, 5\]"),
        ((0, 5, 1), r"R \(=0\) and C \(=5\) must be at least 1"),
        ((6, 5, 1, None, 4), r"row_group \(=4\) must be a positive divisor of R \(=6\)"),
    ],
)
def test_bad_sizes(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_random_topology(*arguments)  # type: ignore[arg-type]


def test_expand_row_group() -> None:
    columns = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    assert expand_row_group(columns, 2).tolist() == [[2, 0], [2, 0], [1, 3], [1, 3]]
    copy = expand_row_group(columns, 1)
    copy[0, 0] = 9
    assert columns[0, 0] == 2
