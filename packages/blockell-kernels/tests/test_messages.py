"""What users read when something does not fit: argument, value, rule, remedy."""

from typing import NamedTuple

import pytest
import torch

from blockell_kernels import (
    block_ell_linear,
    block_ell_mlp,
    block_fisher,
    block_grad_norms,
    check_topology,
    explain,
    probe_size,
)


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


class Index(NamedTuple):
    order: torch.Tensor
    col_start: torch.Tensor


INDEX = Index(X(8, dtype=INT), X(4, dtype=INT))  # of the right sizes


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
        (
            {"x": X(9, 24).int()},
            r"x has dtype torch.int32; it must be float16, bfloat16, float32 or float64: pass",
        ),
        (
            {"x": X(9, 24).to(torch.float8_e5m2), "values": X(4, 2, 8, 8).to(torch.float8_e5m2)},
            r"x has dtype torch.float8_e5m2; it must be float16, bfloat16, float32 or float64",
        ),
        (
            {"x": X(9, 24).to_sparse()},
            r"x has layout torch.sparse_coo; it must be torch.strided: call \.to_dense\(\)",
        ),
        (
            {"values": X(4, 2, 8, 8).to_sparse()},
            r"values has layout torch.sparse_coo; it must be torch.strided",
        ),
        (
            {"x": X(9, 24).double()},
            r"values has dtype torch.float32 and x torch.float64; they must be the same: cast",
        ),
        ({"bias": X(32).half()}, r"bias has dtype torch.float16 and x torch.float32"),
        ({"bias": X(31)}, r"bias has shape \(31,\); it must be \(32,\), one entry per output"),
        ({"values": X(4, 2, 8)}, r"values has shape \(4, 2, 8\); it must be \[R, K, B, B\]"),
        ({"values": X(4, 2, 8, 4)}, r"values has shape \(4, 2, 8, 4\).* with square tiles"),
        ({"values": X(0, 2, 8, 8)}, r"values has shape \(0, 2, 8, 8\).*, R at least 1"),
        ({"values": X(4, 2, 0, 0)}, r"\(4, 2, 0, 0\); tiles must be at least 1 wide"),
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
        (
            {"index": INDEX._replace(order=X(7, dtype=INT))},
            r"index.order has shape \(7,\) and dtype torch.int32; it must be int32 \[8\]: "
            r"pass transposed_index\(col_indices, 3\), made anew when the topology changes",
        ),
        (
            {"index": INDEX._replace(col_start=X(4).long())},
            r"index.col_start has shape \(4,\) and dtype torch.int64; it must be int32 \[4\]",
        ),
        (
            {"index": INDEX._replace(order=X(8, dtype=INT, device="meta"))},
            r"index.order is on meta and x on cpu: pass transposed_index",
        ),
        (
            {"index": (1, 2)},
            r"index is a tuple; it must have `order` and `col_start`: pass transposed_index",
        ),
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


@pytest.mark.parametrize("function", [block_grad_norms, block_fisher])
def test_statistics(function):
    with pytest.raises(
        ValueError, match=r"\(shape \(3, 8\), .* and x \(shape \(4, 8\), .* agree in"
    ):
        function(X(3, 8), X(4, 8), 8)
    with pytest.raises(ValueError, match=r"torch.float32, cpu\) and x .*float64, cpu\) must be"):
        function(X(3, 8), X(3, 8).double(), 8)
    with pytest.raises(ValueError, match=r"x \(shape \(3, 8\), torch.float32, meta\) must be"):
        function(X(3, 8), X(3, 8, device="meta"), 8)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., features\] and agree"):
        function(X(()), X(()), 8)
    with pytest.raises(ValueError, match=r"and x have dtype torch.int32; it must be float16"):
        function(X(3, 8).int(), X(3, 8).int(), 8)
    with pytest.raises(ValueError, match=r"last dimension of x \(=9\) must be a multiple of B"):
        function(X(3, 8), X(3, 9), 8)
    with pytest.raises(ValueError, match=r"\(=8\) must be a multiple of B \(=0\)"):
        function(X(3, 8), X(3, 8), 0)


@pytest.mark.parametrize("function", [block_grad_norms, block_fisher])
def test_statistics_of_no_tokens(function):
    assert torch.equal(function(X(2, 0, 16), X(2, 0, 24), 8), X(2, 3))


def test_the_mlp_says_which_layer(make_operands):
    o = operands(make_operands)
    layer = (o["values"], o["col_indices"], o["bias"])
    second = X(3, 4, 8, 8), X(3, 4, dtype=INT), None
    index = INDEX._replace(order=X(7, dtype=INT))
    with pytest.raises(ValueError, match=r"first layer: index.order has shape \(7,\)"):
        block_ell_mlp(o["x"], *layer, *second, index1=index)
    with pytest.raises(ValueError, match=r"second layer: index.order has shape \(7,\)"):
        block_ell_mlp(o["x"], *layer, *second, index2=index)


def test_explain_checks_as_the_product_does(make_operands):
    o = operands(make_operands, values=X(4, 2, 0, 0))
    with pytest.raises(ValueError, match="tiles must be at least 1 wide"):
        explain(o["x"], o["values"], o["col_indices"])
