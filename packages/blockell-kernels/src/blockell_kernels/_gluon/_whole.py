"""Launches forward and input gradient by the whole weight, put together block by block.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit: 128
outputs; a step: 64 of the features that are summed over.

Where a dense product is as good as a sparse one, or nearly: rows that share few columns, dense
weights. A dense copy of the weight would be written and read again first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._support import SUPPORTED, runs_on
from blockell_kernels._triton._device import (
    INTERPRETED,
    capability,
    describable,
    num_sms,
    on_its_device,
)
from blockell_kernels._triton._few_tokens import add_parts_of
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._places import STEP, UNIT, places_of
from blockell_kernels._triton._tiling import ceil_div

SHARED_BYTES = 226 * 1024
LOADERS = {16: 8, 32: 4, 64: 2, 128: 1}
"""Loading warps, by tile: blocks to a step divided so that one warp can issue its share."""
PIECES, PARTS = (2, 4, 5), (1, 2, 3, 4, 6, 8)
"""Of 64 tokens to a program, and of the sums."""
ROW_CLOCKS, PIECE_CLOCKS = 1.6, 256
"""What the copy engine takes per row of a box, and the tensor cores per 64 tokens of a step."""
L2_BYTES = 45
"""To a clock and multiprocessor."""
TILE_CLOCKS = 4000
"""Filling the pipeline and storing a tile."""
PARTS_CLOCKS, PARTS_BYTES = 5000, 2000
"""Of the kernel that adds up parts of the sums, and bytes to a clock that it moves."""


class Cut(NamedTuple):
    """How a product is cut: `pieces` times 64 tokens to a program, sums in `parts`."""

    pieces: int
    parts: int


def available(device: torch.device) -> bool:
    """Whether GPUs of this kind run the kernel."""
    return SUPPORTED and not INTERPRETED and capability(device)[0] == 9


def takes(a: Tensor, b: Tensor, B: int) -> bool:
    """Whether these kernels can run on a product's operands.

    x or dy [N, features] and values [R, slots, B, B]; or, for the weight gradient, dy and x.
    """
    return (
        runs_on(a)
        and B in LOADERS
        and describable(a)
        and describable(b)
        and (b.ndim == 2 or b.is_contiguous())
    )


@lru_cache(maxsize=4096)
def cut(N: int, outputs: int, depth: int, B: int, sms: int) -> Cut:
    """The cut that should take least time."""
    return cuts(N, outputs, depth, B, sms)[0]


def cuts(N: int, outputs: int, depth: int, B: int, sms: int) -> list[Cut]:
    """All cuts, those that should take least time first."""
    units, steps = ceil_div(outputs, UNIT), ceil_div(depth, STEP)

    def clocks(cut: Cut) -> float:
        engine = ROW_CLOCKS * (UNIT * STEP // min(B, STEP) + 64 * cut.pieces)
        step = max(
            PIECE_CLOCKS * cut.pieces, engine, (64 * cut.pieces + UNIT) * STEP * 2 / L2_BYTES
        )
        tiles = ceil_div(N, 64 * cut.pieces) * units * cut.parts
        taken = ceil_div(tiles, sms) * (ceil_div(steps, cut.parts) * step + TILE_CLOCKS)
        if cut.parts > 1:
            taken += PARTS_CLOCKS + 8 * cut.parts * N * outputs / PARTS_BYTES
        return taken

    found = [Cut(pieces, parts) for pieces in PIECES for parts in PARTS]
    return sorted((c for c in found if c.parts == 1 or steps >= 4 * c.parts), key=clocks)


def constants(B: int, forward: bool, cut: Cut, has_bias: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters."""
    stage = (64 * cut.pieces + UNIT) * STEP * 2
    outs = 2 * 64 * UNIT * 2
    return {
        "B": B,
        "FORWARD": forward,
        "LOADERS": LOADERS[B],
        "PIECES0": (cut.pieces + 1) // 2,
        "PIECES1": cut.pieces // 2,
        "STAGES": (SHARED_BYTES - outs) // stage,
        "GROUP_M": 8,
        "HAS_BIAS": has_bias and cut.parts == 1,
        "PARTS": cut.parts > 1,
    }


def box(B: int, forward: bool) -> list[int]:
    """What is loaded of the weight at once: a block, or a half of one that is wider than a step."""
    if B < UNIT:
        return [B, B]
    return [UNIT, STEP] if forward else [STEP, UNIT]


@on_its_device
def product(
    a: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    forward: bool,
    chosen: Cut | None = None,
) -> Tensor:
    """y [N, R*B] from x [N, C*B] and bias [R*B] (`forward`), else dx [N, C*B] from dy [N, R*B].

    Args:
        a: x or dy; see `takes`.
        values: [R, slots, B, B].
        bias: [R*B], of the forward product only.
        pattern: where the blocks lie.
        forward: which of the two products.
        chosen: how to cut it; None: as `cut` says.
    """
    from blockell_kernels._gluon._descriptors import descriptor
    from blockell_kernels._gluon._whole_kernels import whole_weight

    N, R, C, B, slots = a.shape[0], pattern.R, pattern.C, pattern.B, pattern.slots
    outputs, depth = (R * B, C * B) if forward else (C * B, R * B)
    out = a.new_empty(N, outputs)
    if out.numel() == 0:
        return out
    chosen = chosen or cut(N, outputs, depth, B, num_sms(a.device))
    places, units, _ = places_of(pattern, forward)
    steps = ceil_div(depth, STEP)
    per_part = ceil_div(steps, chosen.parts)
    parts = ceil_div(steps, per_part)
    target = out
    if chosen.parts > 1:
        target = torch.empty(parts, N, outputs, dtype=torch.float32, device=a.device)
    tiles = ceil_div(N, 64 * chosen.pieces) * units * parts
    launch(
        whole_weight,
        (min(tiles, num_sms(a.device)),),
        descriptor(a, [64, STEP]),
        descriptor(values.view(R * slots * B, B), box(B, forward)),
        descriptor(out, [64, UNIT]),
        target,
        places,
        out if bias is None else bias,
        N,
        outputs,
        units,
        steps,
        per_part,
        **constants(B, forward, chosen, bias is not None),
        num_warps=4,
    )
    if chosen.parts > 1:
        add_parts_of(target, bias, out)
    return out
