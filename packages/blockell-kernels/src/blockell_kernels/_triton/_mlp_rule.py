"""Which kernels compute the two products of an MLP that an activation rides on, and why.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h
pre-activation, a = f(h).

An activation rides on a product where that was measured to be faster than a pass over memory after
it; `benchmarks/results/mlp.md` has the figures.
"""

from __future__ import annotations

from dataclasses import replace
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
DEEP, DEEP_ALONE = 1024, 128
"""Products summed per element of da from which f' rides on Triton's kernel, where a is computed
again with it and where not. On shorter sums the epilogue takes longer than the products and nothing
runs beside it; a pass of its own through L2 is faster then."""
LONG_64 = 1536
"""Products summed up to which it rides there in tile 64: 1024 took 382 us (385 by two passes), 2048
1200 (1087)."""
FORWARD_TOKENS = 1024
"""Below this many tokens f has a pass of its own: 1024 tokens of 640 -> 2560 took 15 us by two
passes and 18 by Triton's fused product."""
SHALLOW = 1024
"""Products summed per element up to which the Gluon kernels "by turns" win, from `TURNS_TOKENS` on:
their tiles are 128 x 128, which longer sums pay for in bytes from L2. Measured with 2048 to 65536
tokens in tile 128: up to 1536 -> 6144 they gained 7 to 15% of a whole step, of 4096 -> 14336 they
lost 4 to 6%. At 1024 tokens of 640 -> 2560 fc1 took 14 us by them and 15 by two passes."""
TURNS_TOKENS = 1024
FEW_BLOCKS, NARROW, DENSE_64_TOKENS = 1 / 3, 768, 4096
"""Where fc2 could be computed by a dense weight "by turns", its blocks are faster in tile 64 below
`DENSE_64_TOKENS`, beyond `NARROW` outputs, or up to the density `FEW_BLOCKS`, and in tile 32 where
both of the latter hold. Measured with 1024 to 65536 tokens of 640 -> 2560 to 2048 -> 8192."""


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
    if case.N < FORWARD_TOKENS:
        return Way("passes", f"a pass of its own: faster below {FORWARD_TOKENS} tokens")
    shallow = case.N >= TURNS_TOKENS and case.K * case.B <= SHALLOW
    if shallow and by_turns and activation != "none":
        return TURNS
    tiling = tiling_for(case)
    # A pass over h costs more than the Gluon kernels, which take no activation, save.
    tiling = tiling.otherwise or tiling
    if tiling.path not in PATHS:
        return Way("passes", "a pass of its own: the product's kernel takes no activation")
    if tiling.BM == 256 and tiling.persistent == 1 and case.K * case.B < DEEP:
        # Short sums: f wants a second program that multiplies meanwhile.
        tiling = replace(tiling, BM=128, group_m=8, persistent=2, store_parts=2)
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
    by_blocks = sparse and _blocks_win(case, keep_a)
    if dense and turns and depth <= SHALLOW and not by_blocks and dense_by_turns:
        return DENSE_TURNS
    tiling = middle_tiling_for(case, keep_a) if sparse else None
    if tiling is None:
        return Way("passes", "a pass of its own, which was measured to be faster")
    return _riding(tiling)


def _blocks_win(case: Case, keep_a: bool) -> bool:
    """Whether fc2's blocks are faster than a dense weight "by turns"."""
    narrow, few = case.R * case.B <= NARROW, case.density <= FEW_BLOCKS
    if case.B == 64:
        return case.N < DENSE_64_TOKENS or not narrow or (few and not keep_a)
    return case.B == 128 or (case.B == 32 and not narrow and few)


def middle_tiling_for(case: Case, keep_a: bool) -> Tiling | None:
    """The tiling of Triton's input gradient with this epilogue; None: two passes are better."""
    B, N = case.B, case.N
    if capability(case.device)[0] != 9 or B < 64 or N < FEW_TOKENS or case.dtype == torch.float32:
        return None
    products = case.R * B * case.density
    if products < (DEEP if keep_a else DEEP_ALONE) or (B == 64 and products > LONG_64):
        return None
    if B == 64:
        return Tiling(path="descriptors", BM=128, BN=64, BK=64, warps=4, stages=4)
    return Tiling(
        path="descriptors", BM=128, BN=128, BK=64, warps=4, stages=3, store_parts=2, persistent=2
    )
