"""What users read when something does not fit: argument, value, rule, remedy."""

import pytest
import torch

from blockell_kernels import block_ell_linear, block_grad_norms, check_topology, probe_size


def operands(make_operands, **changes):
    """Positional and keyword arguments of a correct call, with some of them changed."""
    o = make_operands(9, 4, 3, 2, 8)
    return {
        "x": o.x,
        "values": o.values,
        "col_indices": o.col_indices,
        "bias": o.bias,
        **changes,
    }


X = torch.zeros
INT = torch.int32
PROBE = probe_size(4, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": X(9, 20)},
            r"last dimension of x \(=20\) must be a multiple of the tile size \(=8\); "
            r"nearest: 16 or 24",
        ),
        ({"x": X(9, 5)}, r"\(=5\) must be a multiple of the tile size \(=8\); nearest: 8\."),
        ({"x": X(9, 8)}, r"\(=8\) has 1 block columns of 8, fewer than the 2 distinct ones"),
        ({"x": X(())}, r"x is a scalar; it must be \[\.\.\., in_features\]"),
        ({"x": X(9, 24).int()}, r"x has dtype torch.int32; it must be a floating-point type"),
        (
            {"x": X(9, 24).double()},
            r"values has dtype torch.float32 and x torch.float64; they must be the same: cast",
        ),
        ({"bias": X(32).half()}, r"bias has dtype torch.float16 and x torch.float32"),
        ({"bias": X(31)}, r"bias has shape \(31,\); it must be \(32,\), one entry per output"),
        ({"values": X(4, 2, 8)}, r"values has shape \(4, 2, 8\); it must be \[R, K, B, B\]"),
        ({"values": X(4, 2, 8, 4)}, r"values has shape \(4, 2, 8, 4\).* with square tiles"),
        (
            {"col_indices": X(4, 3, dtype=INT)},
            r"col_indices has shape \(4, 3\); it must be \(4, 2\), one column for each tile",
        ),
        (
            {"col_indices": X(4, 2).long()},
            r"col_indices has dtype torch.int64; it must be torch.int32: pass col_indices.int\(\)",
        ),
        ({"num_live": 3}, r"num_live \(=3\) must be in \[1, 2\], the slots of a row"),
        ({"num_live": 0}, r"num_live \(=0\) must be in \[1, 2\]"),
        ({"row_group": 3}, r"row_group \(=3\) must be a positive divisor of R \(=4\)"),
        ({"row_group": 0}, r"row_group \(=0\) must be a positive divisor"),
        ({"sample": "norms"}, r"sample \(='norms'\) needs a probe: .* of 19 elements"),
        (
            {"sample": "all", "probe": X(PROBE)},
            r"sample \(='all'\) must be one of none, norms, gradient",
        ),
        (
            {"sample": "norms", "probe": X(7)},
            r"probe has shape \(7,\) .*\[probe_size\(R, C\)\] = \[19\] for R=4, C=3",
        ),
        ({"sample": "norms", "probe": X(PROBE).half()}, r"dtype torch.float16; it must be float32"),
        (
            {"sample": "norms", "probe": X(PROBE, device="meta")},
            r"probe is on meta and x on cpu; move it with .to\(\)",
        ),
        (
            {"values": X(4, 2, 8, 8, device="meta")},
            r"values is on meta and x on cpu; they must be on one device: move the input",
        ),
        ({"col_indices": X(4, 2, dtype=INT, device="meta")}, r"col_indices is on meta and x on"),
        ({"bias": X(32, device="meta")}, r"bias is on meta and x on cpu"),
    ],
)
def test_block_ell_linear(make_operands, changes, message):
    with pytest.raises(ValueError, match=message):
        block_ell_linear(**operands(make_operands, **changes))


@pytest.mark.parametrize(
    ("columns", "kwargs", "message"),
    [
        ([[0, 1], [1, 3]], {}, r"row 1, slot 1\] \(=3\) must be in \[0, 3\)"),
        ([[0, 1], [2, 2]], {}, r"row 1\] holds column 2 twice"),
        ([[0, 1], [1, -1]], {}, r"row 1 has 1 live blocks but row 0 has 2"),
        ([[0, 1], [1, 0]], {"row_group": 2}, r"row 1, slot 0\].* differs from row 0"),
        ([[0, -1], [1, -1]], {"num_live": 2}, r"num_live \(=2\) differs from the 1 live blocks"),
    ],
)
def test_check_topology(columns, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_topology(torch.tensor(columns, dtype=INT), 3, **kwargs)


def test_check_topology_wants_int32_and_accepts_what_is_right():
    with pytest.raises(ValueError, match=r"it must be torch\.int32"):
        check_topology(torch.tensor([[0, 1]]), 3)
    check_topology(torch.tensor([[0, 2], [0, 2]], dtype=INT), 3, row_group=2, num_live=2)


def test_block_grad_norms():
    with pytest.raises(ValueError, match=r"grad_out \(shape \(3, 8\)\) and x \(shape \(4, 8\)\)"):
        block_grad_norms(X(3, 8), X(4, 8), 8)
    with pytest.raises(ValueError, match=r"last dimension of x \(=9\) must be a multiple of B"):
        block_grad_norms(X(3, 8), X(3, 9), 8)
    with pytest.raises(ValueError, match=r"of grad_out \(=8\) must be a multiple of B \(=0\)"):
        block_grad_norms(X(3, 8), X(3, 8), 0)
