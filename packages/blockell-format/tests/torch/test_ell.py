"""The container and its validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockell_format import BlockELLFormat

Maker = Callable[..., BlockELLFormat]


def test_properties(matrix_maker: Maker) -> None:
    matrix = matrix_maker(R=6, C=5, K=3, B=2, spare=1, row_group=2)
    assert (matrix.R, matrix.C, matrix.K, matrix.B) == (6, 5, 4, 2)
    assert (matrix.num_live, matrix.density, matrix.row_group) == (3, 3 / 5, 2)
    assert matrix.shape == (12, 10)
    assert matrix.validate() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_dtype(matrix_maker: Maker, dtype: torch.dtype) -> None:
    assert matrix_maker(dtype=dtype, spare=1).validate() == 3


def test_slots_need_not_be_sorted(matrix_maker: Maker) -> None:
    matrix = matrix_maker()
    before = matrix.col_indices.clone()
    assert not torch.equal(before, before.sort(dim=1).values)
    matrix.validate()
    assert torch.equal(matrix.col_indices, before)


def _set(matrix: BlockELLFormat, row: int, slot: int, column: int) -> None:
    matrix.col_indices[row, slot] = column


CASES: list[tuple[Callable[[BlockELLFormat], Any], str]] = [
    (lambda m: _set(m, 2, 1, int(m.col_indices[2, 0])), r"row 2\] holds column . twice, in slot 0"),
    (lambda m: _set(m, 1, 2, 5), r"\[row 1, slot 2\] \(=5\) must be in \[0, 5\)"),
    (lambda m: _set(m, 1, 2, -7), r"\[row 1, slot 2\] \(=-7\) must be in \[0, 5\)"),
    (lambda m: _set(m, 1, 0, -1), r"\[row 1, slot 0\] is spare \(-1\) but slot 1 is live"),
    (lambda m: _set(m, 1, 2, -1), "row 1 has 2 live blocks but row 0 has 3"),
    (lambda m: setattr(m, "row_group", 4), r"row_group \(=4\) must be a positive divisor of R"),
    (lambda m: setattr(m, "row_group", 2), r"differs from row \d .* \(row_group=2\)"),
    (lambda m: m.values[4, 3, 0].fill_(1.0), r"values\[row 4, slot 3\] is not zero but the slot"),
    (
        lambda m: setattr(m, "values", m.values.int()),
        "values has dtype torch.int32; it must be a floating point type",
    ),
    (
        lambda m: setattr(m, "col_indices", m.col_indices.long()),
        r"col_indices has dtype torch.int64; it must be torch.int32: col_indices.to\(torch.int32\)",
    ),
    (
        lambda m: setattr(m, "values", m.values[..., :1]),
        r"values has shape \(6, 4, 2, 1\); it must be \[R, K, B, B\]",
    ),
    (
        lambda m: setattr(m, "values", m.values[:0]),
        r"values has shape \(0, 4, 2, 2\); it must be \[R, K, B, B\], none of them 0",
    ),
    (
        lambda m: setattr(m, "col_indices", m.col_indices[:, :2]),
        r"col_indices has shape \(6, 2\); it must be \[R, K\] = \(6, 4\)",
    ),
    (
        lambda m: setattr(m, "values", m.values.to("meta")),
        "col_indices is on cpu and values on meta; they must be on one device",
    ),
]


@pytest.mark.parametrize(("damage", "message"), CASES)
def test_messages(
    matrix_maker: Maker, damage: Callable[[BlockELLFormat], Any], message: str
) -> None:
    matrix = matrix_maker(spare=1)
    damage(matrix)
    with pytest.raises(ValueError, match=message):
        matrix.validate()


def test_meta_device_checks_shapes_only() -> None:
    values = torch.empty(4, 2, 3, 3, device="meta")
    columns = torch.empty(4, 2, dtype=torch.int32, device="meta")
    assert BlockELLFormat(values, columns, 5).validate() == 2
    with pytest.raises(ValueError, match=r"row_group \(=3\)"):
        BlockELLFormat(values, columns, 5, 3).validate()


def test_validate_leaves_gradients_alone(matrix_maker: Maker) -> None:
    matrix = matrix_maker()
    matrix.values.requires_grad_()
    assert matrix.validate() == 3
