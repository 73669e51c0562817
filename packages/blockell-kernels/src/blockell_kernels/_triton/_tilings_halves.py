"""Which float32 products are computed as float16 halves, and how they are cut.

Legend: C block columns, B tile side, N tokens; alike: rows that share their columns (row_group*B),
the power of two in them.

Rules read off one H200, where 3xTF32 is what there is beside it.
"""

from __future__ import annotations

from functools import lru_cache

from blockell_kernels._backends import Case, Direction
from blockell_kernels._triton._tiling import Path, Tiling, ceil_div, power_of_two_divisor

DEPTH = 64
"""Of a step: what the tensor cores add up by themselves."""
OUTPUTS = 128
"""Of a program of the weight gradient."""
FEW_TOKENS, FEW_OF_LARGE, FEW_FOR_GRADIENT = 512, 128, 128
"""Below this many tokens other kernels are faster: of forward and input gradient, of a forward with
at least `LARGE_WEIGHT` elements in the dense weight, of the weight gradient."""
LARGE_WEIGHT = 2**22
SPARSER: dict[Direction, dict[int, float]] = {
    "forward": {8: 0.07, 16: 0.15, 32: 0.2},
    "grad_input": {8: 0.1, 16: 0.2, 32: 0.28},
    "grad_values": {8: 0.1, 16: 0.2, 32: 0.1, 64: 0.22},
}
"""Up to these densities, by tile, 3xTF32 of the live blocks of free rows is faster than the halves
of all of them."""
NARROW = {16: 0.2, 32: 0.4}
"""Up to these densities, by tile, the input gradient's live blocks are faster than all of them."""


def fits(direction: Direction, B: int, row_group: int) -> bool:
    """Whether enough rows are alike to multiply the live blocks only."""
    alike = power_of_two_divisor(row_group * B)
    if direction == "forward":
        return alike >= 64
    if direction == "grad_input":
        return B >= 16 and alike >= DEPTH
    return alike >= OUTPUTS


def tiling(direction: Direction, path: Path, BN: int, otherwise: Tiling | None = None) -> Tiling:
    """128 tokens (for the weight gradient: outputs) times BN; steps of 64."""
    stages = 2 if direction == "grad_values" else 3
    return Tiling(path=path, BM=128, BN=BN, BK=DEPTH, stages=stages, otherwise=otherwise)


@lru_cache(maxsize=4096)
def halves_for(case: Case) -> Tiling | None:
    """How to run a float32 case as halves, None: not at all."""
    direction, B, density = case.direction, case.B, case.density
    large = case.R * case.C * B**2 >= LARGE_WEIGHT
    few = FEW_OF_LARGE if direction == "forward" and large else FEW_TOKENS
    if fits(direction, B, case.row_group):
        if (FEW_FOR_GRADIENT if direction == "grad_values" else few) > case.N:
            return None
        if direction != "grad_input" or density <= NARROW.get(B, 1.0):
            alike = B if direction == "grad_input" else case.row_group * B
            return tiling(direction, "halves", min(128, power_of_two_divisor(alike)))
    elif density <= SPARSER[direction].get(B, 0.0):
        return None
    return None if case.N < 2 * FEW_TOKENS else tiling(direction, "dense halves", 128)


def parts_of(tiles: int, tokens: int, programs: int) -> int:
    """Into how many parts the tokens of a weight gradient are split, for two rounds at most.

    Counted in steps: a part takes four to begin and to end, and its sums are written and read once
    more, which takes as long as a step for 33 tiles. Rounds are as long as their last program.
    """
    steps = ceil_div(tokens, DEPTH)

    def cost(parts: int) -> float:
        rounds = ceil_div(tiles * parts, programs)
        return rounds * (ceil_div(steps, parts) + 4) + (parts > 1) * parts * tiles * 0.03

    return min(range(1, 1 + max(1, min(2 * programs // tiles, steps // 4))), key=cost)
