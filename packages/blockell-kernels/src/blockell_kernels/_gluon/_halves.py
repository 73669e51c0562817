"""Launches the float32 products that are computed as three float16 products.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Two paths: "halves" multiplies live blocks only; "dense halves", for tiles too narrow to be
multiplied one by one, scatters the halves of the weight into a dense buffer, and multiplies that.
Both replace 3xTF32, for the same accuracy; where torch allows TF32, neither is taken.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from blockell_kernels._backends import Case, Direction, Pattern
from blockell_kernels._gluon._support import SUPPORTED
from blockell_kernels._triton._device import (
    INTERPRETED,
    capability,
    describable,
    dot_precision,
    num_sms,
)
from blockell_kernels._triton._halves import (
    split_by_column,
    split_by_row,
)
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor
from blockell_kernels._triton._tilings_halves import DEPTH, OUTPUTS, fits, halves_for, parts_of

TOKENS = 128
"""Of a program of theirs."""
WIDTH = 128
"""Columns of a program of the weight gradient."""
DENSE_BLOCK = 64
"""Tile side of a dense weight."""


def available(device: torch.device) -> bool:
    """Whether the device runs these kernels, and torch asks for more than TF32."""
    return (
        SUPPORTED
        and not INTERPRETED
        and device.type == "cuda"
        and torch.version.hip is None
        and capability(device)[0] == 9
        and dot_precision(torch.float32, device) == "tf32x3"
    )


def runs(t: Tensor, tiling: Tiling) -> bool:
    """Whether these kernels run a product of operands like `t`, chosen by this tiling."""
    return (
        tiling.path in ("halves", "dense halves")
        and t.dtype == torch.float32
        and available(t.device)
        and describable(t)
    )


def chosen(case: Case) -> Tiling | None:
    """How a float32 case is computed as float16 halves, None: another way."""
    if case.dtype is not torch.float32 or not available(case.device):
        return None
    return halves_for(case)


def reads(a: Tensor, b: Tensor, B: int) -> bool:
    """Whether a product's operands lie as the kernels read them: x and dy by descriptors."""
    return describable(a) and (describable(b) if b.ndim == 2 else b.is_contiguous())


def takes(
    direction: Direction, t: Tensor, values: Tensor, pattern: Pattern, tiling: Tiling
) -> bool:
    """Whether `forward` or `grad_input` below can run a product by this tiling."""
    return (
        runs(t, tiling)
        and values.is_contiguous()
        and (tiling.path == "dense halves" or fits(direction, pattern.B, pattern.row_group))
    )


def takes_gradient(dy: Tensor, x: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether `grad_values` or `grad_values_of_dense` below can run a product by this tiling."""
    return (
        runs(x, tiling)
        and describable(dy)
        and (tiling.path == "dense halves" or fits("grad_values", pattern.B, pattern.row_group))
    )


@cache
def _layout(width_bytes: int, bits: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(min(128, width_bytes), bits, 2)


def descriptor(t: Tensor, box: list[int]) -> Any:
    """Boxes of a matrix that is `describable`, unchecked."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), box
    size = t.element_size()
    made.layout, made.padding = _layout(size * box[1], 8 * size), "zero"
    return made


def constants(B: int, BN: int, tiling: Tiling, forward: bool, dense: bool) -> dict[str, int | bool]:
    """Compile-time parameters of forward and input gradient, but for the epilogue's."""
    return {
        "B": B,
        "BN": BN,
        "PANEL": min(B, 32),
        "DEPTH": DEPTH,
        "STAGES": tiling.stages,
        "GROUP_M": tiling.group_m,
        "FORWARD": forward,
        "DENSE": dense,
    }


def gradient_constants(B: int, tiling: Tiling, dense: bool) -> dict[str, int | bool]:
    """Compile-time parameters of the weight gradient."""
    return {
        "B": B,
        "PANEL": min(B, 32),
        "WIDTH": WIDTH,
        "BT": tiling.BK,
        "STAGES": tiling.stages,
        "DENSE": dense,
    }


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    pattern: Pattern,
    tiling: Tiling,
    activation: str,
) -> None:
    """Write y = f(h), h = x W^T + bias [N, R*B], and h to `pre` if given; see `takes`.

    x [N, C*B], values [R, slots, B, B], bias [R*B].
    """
    dense = tiling.path == "dense halves"
    weight = split_by_row(values, pattern, dense)
    BN = tiling.BN
    if not dense:
        BN = min(BN, power_of_two_divisor(pattern.row_group * pattern.B))
    boxes = [descriptor(half, [BN, DEPTH]) for half in weight.halves]
    rest = y, pre, weight.factors, weight.lifts, y if bias is None else bias
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation}
    lists = pattern.col_indices, pattern.col_indices
    _multiply(x, boxes, lists, rest, pattern, BN, tiling, epilogue)


def grad_input(
    dy: Tensor,
    values: Tensor,
    order: Tensor,
    col_start: Tensor,
    dx: Tensor,
    pattern: Pattern,
    tiling: Tiling,
) -> None:
    """Write dx [N, C*B] from dy [N, R*B], values [R, slots, B, B], the transposed index."""
    dense = tiling.path == "dense halves"
    weight = split_by_column(values, pattern, dense)
    BN = tiling.BN if dense else min(tiling.BN, pattern.B)
    boxes = [descriptor(half, [DEPTH, BN]) for half in weight.halves]
    rest = dx, None, weight.factors, weight.lifts, dx
    epilogue = {"HAS_BIAS": False, "ACTIVATION": "none"}
    _multiply(dy, boxes, (order, col_start), rest, pattern, BN, tiling, epilogue, False)


def _multiply(
    t: Tensor,
    boxes: list[Any],
    lists: tuple[Tensor, Tensor],
    rest: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    pattern: Pattern,
    BN: int,
    tiling: Tiling,
    epilogue: dict[str, Any],
    forward: bool = True,
) -> None:
    from blockell_kernels._gluon._halves_kernels import product_of_halves

    y, pre = rest[:2]
    dense = tiling.path == "dense halves"
    B, slots, blocks = pattern.B, pattern.slots, pattern.num_live
    if dense:
        B = DENSE_BLOCK
        slots, blocks = ceil_div(y.shape[1], B), ceil_div(t.shape[1], B)
    column_tiles = ceil_div(y.shape[1], BN)
    tiles = ceil_div(t.shape[0], TOKENS) * column_tiles
    launch(
        product_of_halves,
        (min(tiles, num_sms(t.device)),),
        descriptor(t, [64, min(B, 32)]),
        *boxes,
        *lists,
        *rest,
        t.shape[0],
        slots,
        blocks,
        pattern.C,
        y.shape[1],
        column_tiles,
        **constants(B, BN, tiling, forward, dense),
        **epilogue,
        KEEP_PRE=pre is not None,
        num_warps=4,
    )


def tokens_per_part(N: int, rows: int, columns: int, device: torch.device) -> int:
    """Of a weight gradient [rows, columns], in whole steps."""
    tiles = ceil_div(rows, OUTPUTS) * ceil_div(columns, WIDTH)
    parts = parts_of(tiles, N, num_sms(device))
    return ceil_div(ceil_div(N, parts), DEPTH) * DEPTH


def grad_values(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    pattern: Pattern,
    tiling: Tiling,
    tokens_per_part: int,
) -> None:
    """Write target [parts, R, slots, B, B], float32, from dy [N, R*B] and x [N, C*B]."""
    B, K = pattern.B, pattern.num_live
    sizes = pattern.slots, K, pattern.C, target.shape[-3]
    chunks, cols = ceil_div(K * B, WIDTH), pattern.col_indices
    _gradient(dy, x, target, cols, sizes, chunks, B, tiling, tokens_per_part)


def grad_values_of_dense(
    dy: Tensor, x: Tensor, out: Tensor, pattern: Pattern, tiling: Tiling
) -> Tensor:
    """Write out [R, slots, B, B] from the whole of dy^T x, some block rows of it at a time."""
    from blockell_kernels._dense import grad_chunks
    from blockell_kernels._triton._blocks import from_dense

    (N, columns), R, B = x.shape, pattern.R, pattern.B
    step = ceil_div(R, grad_chunks(pattern, x.element_size()))
    for start in range(0, R, step):
        rows = pattern.col_indices[start : start + step]
        part = dy[:, start * B : (start + step) * B]
        chunks = ceil_div(columns, WIDTH)
        tokens = tokens_per_part(N, part.shape[1], columns, x.device)
        whole = x.new_empty(ceil_div(N, tokens), part.shape[1], columns)
        sizes = pattern.slots, columns, pattern.C, 0
        _gradient(part, x, whole, rows, sizes, chunks, DENSE_BLOCK, tiling, tokens)
        whole = whole[0] if whole.shape[0] == 1 else whole.sum(0)
        from_dense(whole, pattern._replace(col_indices=rows), out=out[start : start + step])
    return out


def _gradient(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    cols: Tensor,
    sizes: tuple[int, int, int, int],
    chunks: int,
    B: int,
    tiling: Tiling,
    tokens_per_part: int,
) -> None:
    from blockell_kernels._gluon._halves_values_kernels import grad_values_of_halves

    units = ceil_div(dy.shape[1], OUTPUTS)
    launch(
        grad_values_of_halves,
        (units * chunks, target.shape[0]),
        descriptor(dy, [tiling.BK, 64]),
        descriptor(x, [tiling.BK, min(B, 32)]),
        cols,
        target,
        x.shape[0],
        *sizes,
        target[0].numel(),
        units,
        dy.shape[1],
        tokens_per_part,
        **gradient_constants(B, tiling, tiling.path == "dense halves"),
        num_warps=4,
    )
