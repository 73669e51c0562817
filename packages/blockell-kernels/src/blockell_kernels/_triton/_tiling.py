"""How a product is cut into programs.

Legend: B tile side, N tokens.

A tiling is chosen per (direction, element size, outputs that share a column list, class of token
counts): a new number of tokens inside a class compiles nothing and tunes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Path = Literal[
    "pointers",
    "descriptors",
    "packed",
    "gluon",
    "gluon direct",
    "gluon packed",
    "gluon streamed",
    "gluon streamed packed",
    "halves",
    "dense halves",
]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """One way to run a product.

    forward and grad_input own `BM` tokens x `BN` outputs per program and step `BK` deep;
    grad_values owns `BM` rows of the weight x `BN` columns and steps over `BK` tokens.
    """

    path: Path = "pointers"
    """Loads through pointers (any GPU) or tensor descriptors (TMA, Hopper); "packed" (forward,
    Hopper): x through pointers, a packed copy of the weight through descriptors; "gluon": the
    kernels of `_gluon` (Hopper), "gluon packed" (tiles 16 and 32): with a packed copy of x; "gluon
    direct" (forward, tiles 16 and 32): with no copy of the weight, either; "gluon streamed" and
    "gluon streamed packed" (grad_values): those of `_streamed_values`; "halves" and "dense halves":
    those for float32, see its `_halves`."""
    BM: int
    BN: int
    BK: int
    warps: int = 4
    stages: int = 3
    group_m: int = 8
    """Token tiles that pass over the outputs together, for reuse in L2."""
    persistent: int = 0
    """Programs per multiprocessor of a persistent grid; 0: one program per tile."""
    store_parts: int = 1
    """Pieces in which the forward epilogue is stored."""
    waves: int = 1
    """grad_values: programs per multiprocessor that the tokens are split for."""
    parts: int = 0
    """grad_values: parts that the tokens are split into; 0: as many as `waves` says. grad_input by
    descriptors: parts that the sums are split into; 0: none."""
    otherwise: Tiling | None = None
    """Taken where the operands do not allow a path of `_gluon`."""


# Triton's own versions of these go through its compiler's wrappers: 4 us a call.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_divisor(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def round_up_to_power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
