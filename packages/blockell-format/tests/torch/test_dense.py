"""Dense matrices and block lists, both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockell_format import (
    BlockELLFormat,
    from_block_list,
    from_dense,
    to_block_list,
    to_dense,
)

Maker = Callable[..., BlockELLFormat]


def dense_of(matrix: BlockELLFormat) -> Tensor:
    sizes = (matrix.R, matrix.C, matrix.K, matrix.B)
    return to_dense(matrix.values, matrix.col_indices, *sizes)


def dense_by_loop(matrix: BlockELLFormat) -> Tensor:
    """The definition of the format, letter by letter."""
    B = matrix.B
    dense = matrix.values.new_zeros(matrix.shape)
    for r in range(matrix.R):
        for k in range(matrix.K):
            c = int(matrix.col_indices[r, k])
            if c >= 0:
                dense[r * B : (r + 1) * B, c * B : (c + 1) * B] = matrix.values[r, k]
    return dense


@given(data=st.data())
def test_round_trip(data: st.DataObject, matrix_maker: Maker) -> None:
    C = data.draw(st.integers(1, 7))
    K = data.draw(st.integers(1, C))
    group = data.draw(st.sampled_from([1, 2, 3]))
    spare = data.draw(st.integers(0, 2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    matrix = matrix_maker(
        R=group * data.draw(st.integers(1, 4)),
        C=C,
        K=K,
        B=data.draw(st.integers(1, 3)),
        row_group=group,
        spare=spare,
        dtype=dtype,
        seed=data.draw(st.integers(0, 1000)),
    )
    dense = dense_of(matrix)
    assert dense.dtype == dtype
    assert torch.equal(dense, dense_by_loop(matrix))
    back = from_dense(dense, matrix.B, K / C, group, num_slots=K + spare)
    assert back.validate() == K
    assert (back.K, back.values.dtype, back.row_group) == (K + spare, dtype, group)
    assert torch.equal(dense_of(back), dense)
    again = from_block_list(to_block_list(matrix), matrix.R, C, group, num_slots=matrix.K)
    assert torch.equal(again.values, matrix.values)
    assert torch.equal(again.col_indices, matrix.col_indices)


@pytest.mark.parametrize(
    ("density", "blocks"), [(0.5, 4), (1.0, 8), (0.01, 1), (0.3, 2), (0.45, 4)]
)
def test_from_dense_respects_density(density: float, blocks: int) -> None:
    matrix = from_dense(torch.randn(12, 32), 4, density)
    assert matrix.validate() == blocks
    assert matrix.density == blocks / 8


def test_from_dense_keeps_the_largest_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 20, generator=generator)
    norms = dense.reshape(3, 4, 5, 4).square().sum(dim=(1, 3))
    matrix = from_dense(dense, 4, 0.4)
    wanted = norms.topk(2).indices.sort().values
    assert torch.equal(matrix.col_indices.long(), wanted)


def test_from_dense_decides_by_the_norm_of_the_group() -> None:
    dense = torch.zeros(2, 3)
    # row 0 alone would keep column 0, row 1 alone column 1; together column 2 is heaviest
    dense[0] = torch.tensor([3.0, 0.0, 2.5])
    dense[1] = torch.tensor([0.0, 3.0, 2.5])
    assert from_dense(dense, 1, 0.33).col_indices.tolist() == [[0], [1]]
    assert from_dense(dense, 1, 0.33, row_group=2).col_indices.tolist() == [[2], [2]]


def test_from_dense_ties_take_the_lower_column() -> None:
    dense = torch.ones(4, 10)
    assert from_dense(dense, 2, 0.4).col_indices.tolist() == [[0, 1], [0, 1]]


def test_from_dense_norms_do_not_overflow() -> None:
    dense = torch.full((1, 3), 6e4, dtype=torch.float16)
    dense[0, 1:] = 6.5e4
    assert from_dense(dense, 1, 0.67).col_indices.tolist() == [[1, 2]]
    large = torch.tensor([[1e30, 2e30, 3e30]])
    assert from_dense(large, 1, 0.33).col_indices.tolist() == [[2]]


def test_differentiable(matrix_maker: Maker) -> None:
    matrix = matrix_maker(dtype=torch.float64, spare=1)
    matrix.values.requires_grad_()
    weight = torch.randn(matrix.shape, dtype=torch.float64)
    (dense_of(matrix) * weight).sum().backward()
    assert matrix.values.grad is not None
    expected = from_positions(weight, matrix)
    assert torch.equal(matrix.values.grad, expected)
    dense = dense_of(matrix).detach().requires_grad_()
    from_dense(dense, matrix.B, 3 / 5).values.sum().backward()
    assert dense.grad is not None
    assert torch.equal(dense.grad != 0, dense.detach() != 0)


def from_positions(dense: Tensor, matrix: BlockELLFormat) -> Tensor:
    """The blocks of `dense` where `matrix` has live ones."""
    B = matrix.B
    values = torch.zeros_like(matrix.values)
    for row, column, _ in to_block_list(matrix):
        slot = matrix.col_indices[row].tolist().index(column)
        rows, columns = slice(row * B, (row + 1) * B), slice(column * B, (column + 1) * B)
        values[row, slot] = dense[rows, columns]
    return values.detach()


def test_non_contiguous_input() -> None:
    dense = torch.randn(20, 12).T
    matrix = from_dense(dense, 4, 1.0)
    assert matrix.values.is_contiguous()
    assert torch.equal(dense_of(matrix), dense)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        (
            (650, 32),
            (16, 0.5),
            r"out_features \(=650\) must be a multiple of tile_size \(=16\); ne",
        ),
        ((32, 650), (16, 0.5), r"in_features \(=650\) must be .* nearest: 640 or 656\."),
        ((32, 7), (16, 0.5), r"in_features \(=7\) must be a multiple .* nearest: 16\."),
        ((0, 32), (16, 0.5), r"out_features \(=0\) must be a multiple"),
        ((32, 32), (0, 0.5), r"tile_size \(=0\) must be at least 1"),
        ((32, 32), (16, 0.0), r"density \(=0.0\) must be in \(0, 1\]"),
        ((32, 32), (16, 0.5, 3), r"row_group \(=3\) must be a positive divisor of R \(=2\)"),
        ((32,), (16, 0.5), r"dense has shape \(32,\) and dtype torch.float32; it must be"),
    ],
)
def test_bad_dense(shape: tuple[int, ...], arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dense(torch.zeros(shape), *arguments)  # type: ignore[arg-type]


def test_too_few_slots() -> None:
    with pytest.raises(ValueError, match=r"num_slots \(=1\) must be at least 2"):
        from_dense(torch.ones(4, 8), 2, 0.5, num_slots=1)


def test_integers_are_not_weights() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.int64; it must be a floating point matrix"):
        from_dense(torch.ones(4, 4, dtype=torch.int64), 2, 1.0)


@pytest.mark.parametrize("column", [3, 4, 99])
def test_no_block_gets_lost(column: int) -> None:
    """Before, the first column behind the last one was taken for a spare slot."""
    columns = torch.tensor([[0, -1], [column, -1]], dtype=torch.int32)
    with pytest.raises(IndexError, match="out of bounds"):
        to_dense(torch.ones(2, 2, 8, 8), columns, 2, 3, 2, 8)


def test_to_dense_checks_shapes(matrix_maker: Maker) -> None:
    matrix = matrix_maker()
    with pytest.raises(ValueError, match=r"values has shape .* \[R, K, B, B\] = \(6, 3, 4, 4\)"):
        to_dense(matrix.values, matrix.col_indices, 6, 5, 3, 4)
    with pytest.raises(ValueError, match=r"col_indices has shape \(6, 2\); .* = \(6, 3\)"):
        to_dense(matrix.values, matrix.col_indices[:, :2], 6, 5, 3, 2)


BLOCK = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "blocks is empty"),
        ([(2, 0, BLOCK)], r"row \(=2\) of block \(row 2, column 0\) must be in \[0, 2\)"),
        ([(0, 0, BLOCK)], "row 1 has 0 blocks and row 0 has 1"),
        ([(0, 0, BLOCK), (0, 1, BLOCK), (1, 0, BLOCK)], "row 1 has 1 blocks and row 0 has 2"),
        ([(0, 0, BLOCK), (1, 0, BLOCK[:1])], r"block \(row 1, column 0\) has shape \(1, 2\)"),
        ([(0, 3, BLOCK), (1, 0, BLOCK)], r"\[row 0, slot 0\] \(=3\) must be in \[0, 3\)"),
        ([(0, 1, BLOCK), (0, 1, BLOCK), (1, 0, BLOCK), (1, 1, BLOCK)], "holds column 1 twice"),
    ],
)
def test_bad_block_lists(blocks: list[tuple[int, int, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_block_list(blocks, 2, 3)
