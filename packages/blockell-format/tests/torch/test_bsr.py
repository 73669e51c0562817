"""BSR matrices of torch and scipy, both ways."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockell_format import BlockELLFormat, from_bsr, from_scipy, to_bsr, to_dense, to_scipy

Maker = Callable[..., BlockELLFormat]


def dense_of(matrix: BlockELLFormat) -> Tensor:
    sizes = (matrix.R, matrix.C, matrix.K, matrix.B)
    return to_dense(matrix.values, matrix.col_indices, *sizes)


def by_column(matrix: BlockELLFormat) -> tuple[Tensor, Tensor]:
    """Columns and blocks of every row, by ascending column."""
    live = matrix.num_live
    columns, order = matrix.col_indices[:, :live].sort(dim=1)
    return columns, matrix.values[torch.arange(matrix.R)[:, None], order]


@pytest.mark.parametrize(
    "said",
    [
        "Sparse BSR tensor support is in beta",
        "Sparse invariant checks are implicitly disabled. Memory",
    ],
)
def test_what_torch_says_of_sparse_tensors_is_not_passed_on(
    said: str, matrix_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.sparse_bsr_tensor

    def talkative(*args: Tensor, **options: object) -> Tensor:
        warnings.warn(said, stacklevel=2)
        return real(*args, **options)

    monkeypatch.setattr(torch, "sparse_bsr_tensor", talkative)
    assert to_bsr(matrix_maker(2, 3, 2, 4)).shape == (8, 12)


@given(data=st.data())
def test_round_trips(data: st.DataObject, matrix_maker: Maker) -> None:
    C = data.draw(st.integers(1, 7))
    K = data.draw(st.integers(1, C))
    group, spare = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(0, 2))
    R = group * data.draw(st.integers(1, 4))
    B, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1000))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    matrix = matrix_maker(R, C, K, B, row_group=group, spare=spare, dtype=dtype, seed=seed)
    columns_before, values_before = matrix.col_indices.clone(), matrix.values.clone()
    bsr, array = to_bsr(matrix), to_scipy(matrix)
    # slots stay where they are
    assert torch.equal(matrix.col_indices, columns_before)
    assert torch.equal(matrix.values, values_before)
    dense = dense_of(matrix)
    assert torch.equal(bsr.to_dense(), dense)
    assert np.array_equal(array.toarray(), dense.numpy())
    assert array.has_canonical_format
    for back in (
        from_bsr(bsr, group, num_slots=matrix.K),
        from_scipy(array, group, num_slots=matrix.K),
    ):
        assert back.validate() == K
        assert back.K == matrix.K
        assert back.values.dtype == dtype
        assert torch.equal(dense_of(back), dense)
        for ours, theirs in zip(by_column(back), by_column(matrix), strict=True):
            assert torch.equal(ours, theirs)


def test_blocks_of_zeros_are_kept(matrix_maker: Maker) -> None:
    matrix = matrix_maker()
    matrix.values[:, 0] = 0
    assert from_bsr(to_bsr(matrix)).num_live == 3
    assert from_scipy(to_scipy(matrix)).num_live == 3


def test_bfloat16_bsr(matrix_maker: Maker) -> None:
    matrix = matrix_maker(dtype=torch.bfloat16)
    back = from_bsr(to_bsr(matrix))
    assert back.values.dtype == torch.bfloat16
    assert torch.equal(dense_of(back), dense_of(matrix))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scipy_holds_two_types(matrix_maker: Maker, dtype: torch.dtype) -> None:
    message = rf"values has dtype {dtype}; scipy holds float32 and float64 only: .*\.float\(\)"
    with pytest.raises(ValueError, match=message):
        to_scipy(matrix_maker(dtype=dtype))


def test_scipy_result_is_independent(matrix_maker: Maker) -> None:
    matrix = matrix_maker()
    array = to_scipy(matrix)
    back = from_scipy(array)
    before = back.values.clone()
    array.data[:] = 7
    assert torch.equal(back.values, before)


def test_unequal_rows() -> None:
    dense = torch.zeros(4, 6)
    dense[0, 0] = dense[0, 2] = dense[2, 4] = 1
    message = r"row 1 has 1 blocks and row 0 has 2; .* use from_dense\(matrix.to_dense\(\)"
    with pytest.raises(ValueError, match=message):
        from_bsr(dense.to_sparse_bsr((2, 2)))
    with pytest.raises(ValueError, match="row 1 has 1 blocks and row 0 has 2"):
        from_scipy(scipy.sparse.bsr_array(dense.numpy(), blocksize=(2, 2)))


def test_empty_rows() -> None:
    with pytest.raises(ValueError, match="row 0 has 0 blocks"):
        from_scipy(scipy.sparse.bsr_array((4, 4), blocksize=(2, 2)))


def test_blocks_must_be_square() -> None:
    with pytest.raises(ValueError, match=r"blocks of shape \(1, 2\); Block-ELL needs square ones"):
        from_bsr(torch.ones(4, 4).to_sparse_bsr((1, 2)))


def test_other_layouts(matrix_maker: Maker) -> None:
    with pytest.raises(ValueError, match=r"layout torch.strided .* dense.to_sparse_bsr"):
        from_bsr(torch.ones(4, 4))
    array = to_scipy(matrix_maker())
    with pytest.raises(ValueError, match="array is a csr_array; it must be a scipy BSR array"):
        from_scipy(array.tocsr())
    with pytest.raises(ValueError, match="array is a ndarray; it must be a scipy BSR array"):
        from_scipy(array.toarray())
    with pytest.raises(ValueError, match="array has dtype int64; it must be float32 or float64"):
        from_scipy(array.astype(np.int64))


def test_scipy_duplicates_are_refused() -> None:
    array = scipy.sparse.bsr_array((np.ones((2, 1, 1)), [0, 0], [0, 2]), shape=(1, 3))
    with pytest.raises(ValueError, match="holds column 0 twice"):
        from_scipy(array)


def test_row_group_is_checked(matrix_maker: Maker) -> None:
    with pytest.raises(ValueError, match=r"the rows of a row group \(row_group=2\)"):
        from_bsr(to_bsr(matrix_maker(C=9)), 2)


def test_missing_scipy(matrix_maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    message = r'scipy, which is not installed; .*pip install "blockell-format\[scipy\]"'
    with pytest.raises(ImportError, match=message):
        to_scipy(matrix_maker())
    with pytest.raises(ImportError, match=message):
        from_scipy(None)
