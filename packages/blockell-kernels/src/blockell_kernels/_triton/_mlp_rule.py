"""Which kernels compute the two products of an MLP that an activation rides on, and why.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h
pre-activation, a = f(h).

An activation rides on a product where that was measured to be faster than a pass over memory after
it; `benchmarks/results/mlp.md` has the figures.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import capability
from blockell_kernels._triton._tiling import Tiling
from blockell_kernels._triton._tilings import tiling_for

FEW_TOKENS = 512
"""Below this many tokens the passes over memory cost nothing next to the launches."""
PATHS = ("pointers", "descriptors", "packed")
"""Ways of the forward product that take an activation."""
DEEP, DEEP_ALONE = 1024, 256
"""Products summed per element of da from which f' rides on them, where a is computed again with it
and where not. On shorter sums the epilogue takes longer than the products and nothing runs beside
it; a pass of its own through L2 is faster then. Measured at 8192 tokens, 640 -> 2560, half dense
(320 products): 74 us with it and 100 with a, too; without 36 and 34 to 46 for the pass."""
SHALLOW = 1024
"""Products summed per element up to which the Gluon kernels "by turns" win, from `TURNS_TOKENS` on:
their tiles are 128 x 128, which longer sums pay for in bytes from L2. Measured with 2048 to 65536
tokens in tile 128: up to 1536 -> 6144 they gained 7 to 15% of a whole step, of 4096 -> 14336 they
lost 4 to 6%."""
TURNS_TOKENS = 2048


class Way(NamedTuple):
    """How one of the two products is computed together with f or f'."""

    kernel: Literal["turns", "dense turns", "triton", "passes"]
    """"passes": the product alone, and a pass over memory after it."""
    why: str
    tiling: Tiling | None = None
    """Of Triton's kernel."""


TURNS = Way("turns", "it rides on the product, in a kernel that multiplies beside it")
DENSE_TURNS = Way(
    "dense turns",
    "it rides on a product by the dense weight, in a kernel that multiplies beside it",
)
TOO_FEW = Way("passes", f"a pass of its own: below {FEW_TOKENS} tokens it costs next to nothing")


def _riding(tiling: Tiling) -> Way:
    return Way("triton", "it rides on the product, in its epilogue", tiling)


def forward_way(case: Case, activation: str, halves: Tiling | None, by_turns: bool) -> Way:
    """How fc1 is computed.

    Args:
        case: the forward product.
        activation: f.
        halves: the tiling of a float32 product as float16 halves, if it is chosen.
        by_turns: whether the Gluon kernel can run it.
    """
    if case.N < FEW_TOKENS:
        return TOO_FEW
    if halves is not None:
        return _riding(halves)
    shallow = case.N >= TURNS_TOKENS and case.K * case.B <= SHALLOW
    if shallow and by_turns and activation != "none":
        return TURNS
    tiling = tiling_for(case)
    # A pass over h costs more than the Gluon kernels, which take no activation, save.
    tiling = tiling.otherwise or tiling
    if tiling.path not in PATHS:
        return Way("passes", "a pass of its own: the product's kernel takes no activation")
    return _riding(tiling)


def middle_way(
    case: Case,
    *,
    sparse: bool,
    dense: bool,
    keep_a: bool,
    halves: bool,
    by_turns: bool,
    dense_by_turns: bool,
) -> Way:
    """How fc2's input gradient is computed.

    Args:
        case: the input gradient.
        sparse: whether that alone is chosen to be sparse.
        dense: whether it may be computed by a dense weight.
        keep_a: whether a is computed again with it.
        halves: whether a float32 product is computed as float16 halves.
        by_turns: whether the Gluon kernel can run it by blocks.
        dense_by_turns: whether it can by a dense weight.
    """
    if case.N < FEW_TOKENS:
        return TOO_FEW
    if halves:
        return Way("passes", "a pass of its own: kernels of float16 halves take no activation")
    turns, depth = case.N >= TURNS_TOKENS, case.R * case.B
    if sparse and turns and case.density * depth < SHALLOW and by_turns:
        return TURNS
    wide_blocks = sparse and case.B == 128  # which another kernel takes without a copy
    if dense and turns and depth <= SHALLOW and not wide_blocks and dense_by_turns:
        return DENSE_TURNS
    tiling = middle_tiling_for(case, keep_a) if sparse else None
    if tiling is None:
        return Way("passes", "a pass of its own, which was measured to be faster")
    return _riding(tiling)


def middle_tiling_for(case: Case, keep_a: bool) -> Tiling | None:
    """The tiling of Triton's input gradient with this epilogue; None: two passes are better."""
    B, N = case.B, case.N
    if capability(case.device)[0] != 9 or B < 64 or N < FEW_TOKENS or case.dtype == torch.float32:
        return None
    if case.R * B * case.density < (DEEP if keep_a else DEEP_ALONE):
        return None
    if B == 64:
        return Tiling(path="descriptors", BM=128, BN=64, BK=64, warps=4, stages=4)
    return Tiling(
        path="descriptors", BM=128, BN=128, BK=64, warps=4, stages=3, store_parts=2, persistent=2
    )
