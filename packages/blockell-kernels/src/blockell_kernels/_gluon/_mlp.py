"""Launches the two products of an MLP that an activation rides on.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h
pre-activation, a = f(h), dh the gradient of h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton._activate import arithmetic
from blockell_kernels._triton._device import describable, num_sms
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div, power_of_two_divisor

TILE = 128
"""Tokens, and hidden features, of a tile."""
DEPTH = 64
"""Of a stage."""
SHARED_BYTES = 225 * 1024
"""Of a program, less the barriers."""
ROWS = 32
"""Tokens that the activation is applied to at a time, by 64 features."""
SUMS_ROWS = 8
"""Rows of the partial bias gradient for every token tile."""
FORWARD_GROUP, MIDDLE_GROUP = 8, 64
"""Token tiles that pass over the hidden features together. In the middle many: columns differ in
length, and are dealt out to the programs in order of it."""
MAX_SORTED_COLUMNS = 32


def _stages(piece_buffers: int) -> int:
    """Stages that fit beside so many buffers of 64 tokens."""
    return (SHARED_BYTES - piece_buffers * 64 * TILE * 2) // (2 * TILE * DEPTH * 2)


def forward_takes(x: Tensor, values: Tensor, pattern: Pattern) -> bool:
    """Whether `forward` can run this product."""
    return (
        runs_on(x)
        and pattern.B >= 16
        and power_of_two_divisor(pattern.row_group * pattern.B) % TILE == 0
        and values.is_contiguous()
        and describable(x)
        and describable(values)
    )


def forward_constants(B: int, keep_pre: bool) -> dict[str, int | bool]:
    """The forward kernel's compile-time parameters."""
    panel = min(B, DEPTH)
    return {
        "B": B,
        "PANEL": panel,
        "PANELS": DEPTH // panel,
        "STAGES": _stages(4),
        "ROWS": ROWS,
        "GROUP_M": FORWARD_GROUP,
        "KEEP_PRE": keep_pre,
    }


def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """(f(h), h or None) for h = x W^T + bias [N, R*B]; see `forward_takes`."""
    from blockell_kernels._gluon._descriptors import descriptor, weight_descriptor
    from blockell_kernels._gluon._mlp_kernels import forward_by_turns

    N, B = x.shape[0], pattern.B
    y = torch.empty(N, pattern.R * B, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if keep_pre else None
    units = pattern.R * B // TILE
    tiles = ceil_div(N, TILE) * units
    box = [64, TILE]
    launch(
        forward_by_turns,
        (min(tiles, num_sms(x.device)),),
        descriptor(x, [64, min(B, DEPTH)]),
        weight_descriptor(values, TILE // B, min(B, DEPTH)),
        descriptor(y, box),
        descriptor(y if pre is None else pre, box),
        pattern.col_indices,
        y if bias is None else bias,
        N,
        pattern.slots,
        pattern.num_live,
        pattern.C,
        units,
        **forward_constants(B, keep_pre),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(y),
        num_warps=4,
    )
    return y, pre


def middle_takes(dy: Tensor, values: Tensor, pattern: Pattern, pre: Tensor) -> bool:
    """Whether `middle` can run this product."""
    return (
        runs_on(dy)
        and pattern.B == TILE
        and values.is_contiguous()
        and all(map(describable, (dy, values, pre)))
    )


def dense_middle_takes(dy: Tensor, pre: Tensor) -> bool:
    """Whether `middle` can run this product by a dense weight."""
    return runs_on(dy) and pre.shape[1] % TILE == 0 and describable(dy) and describable(pre)


def middle_constants(dense: bool, columns: int, keep_a: bool) -> dict[str, int | bool]:
    """The middle kernel's compile-time parameters."""
    return {
        "DENSE": dense,
        "SORTED": not dense and columns <= MAX_SORTED_COLUMNS,
        "STAGES": _stages(8),
        "ROWS": ROWS,
        "GROUP_M": 8 if dense else MIDDLE_GROUP,
        "KEEP_A": keep_a,
    }


def middle(
    dy: Tensor,
    weight: Tensor,
    pattern: Pattern | None,
    pre: Tensor,
    activation: str,
    *,
    keep_a: bool,
    need_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dh, f(h) or None, sums or None): float32 sums [any, hidden] of dh over some tokens each.

    See `middle_takes`.

    Args:
        dy: gradient of the MLP's output, [N, out].
        weight: fc2's values [R, slots, B, B], or, without a pattern, its dense weight
            [out, hidden].
        pattern: of the values.
        pre: h, [N, hidden].
        activation: f.
        keep_a: whether f(h) is asked for.
        need_bias: whether the sums are asked for.
        overwrite: whether f(h), or dh where that is not asked for, may take the memory of h. A
            program reads a tile of h before it writes that of the other.
    """
    from blockell_kernels._gluon._descriptors import descriptor
    from blockell_kernels._gluon._mlp_kernels import middle_by_turns

    (N, width), depth = pre.shape, dy.shape[1]
    spare = pre if overwrite else torch.empty_like(pre)
    dh, a = (torch.empty_like(pre), spare) if keep_a else (spare, None)
    token_tiles, columns = ceil_div(N, TILE), width // TILE
    sums = None
    if need_bias:
        sums = torch.empty(SUMS_ROWS * token_tiles, width, dtype=torch.float32, device=dy.device)
    if pattern is None:
        order = start = dh
        slots, weight2d = 1, weight
    else:
        order, start = pattern.transposed()
        slots, weight2d = pattern.slots, weight.view(-1, TILE)
    box = [64, TILE]
    launch(
        middle_by_turns,
        (min(token_tiles * columns, num_sms(dy.device)),),
        descriptor(dy, [64, DEPTH]),
        descriptor(weight2d, [DEPTH, TILE]),
        descriptor(dh, box),
        descriptor(pre, box),
        descriptor(dh if a is None else a, box),
        dh if sums is None else sums,
        order,
        start,
        N,
        slots,
        columns,
        depth,
        **middle_constants(pattern is None, columns, keep_a),
        NEED_SUMS=need_bias,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(dh),
        num_warps=4,
    )
    return dh, a, sums
