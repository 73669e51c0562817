"""Tilings of the forward product below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

By a model of the time: a multiprocessor works off its tiles one after the other; a step of 64 is
bound by its products or by its loads, whichever takes longer. Loads are bound by the number of
lines asked for, however short those are, and get faster where fewer multiprocessors load. Tiles 16
and 32 have short lines: x can be packed first, or the weight swizzled, each by a launch of its own.

Fitted to 348 layers of tiles 64 and 128 and 352 of tiles 16 and 32, whose groups are 128 outputs
tall, at 65 to 4096 tokens. On 178 others its choice takes 1 to 2% more than the best tiling tried.
On 14 shapes used nowhere else, at 25 to 100%, it is 1.06 times as fast as the rules before in tile
128, 1.13 in tile 32 and 1.23 in tile 16, 0.95 at worst (H200, 2026-11-28, 117 layers). Where 64
outputs share their columns, more bytes are loaded per product than arrive in time, and from 512
tokens on Triton's kernels, two programs on a multiprocessor, hide that better.
"""

from __future__ import annotations

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import Path, Tiling, ceil_div, power_of_two_divisor

FEWEST = 64
"""Up to this many tokens, reading the weight once decides: `_few_tokens`."""
TOKENS = (64, 128, 192, 256, 320)
OUTPUTS = (64, 128)
DEPTH = 64
"""Of a step."""
PATHS: dict[int, tuple[Path, ...]] = {
    16: ("gluon packed", "gluon", "gluon direct"),
    32: ("gluon direct",),
    64: ("gluon",),
    128: ("gluon",),
}
SHORTEST = 8
"""Steps: shorter sums of tiles 64 and 128 gain 1% on average, and lose up to 15%."""
NARROW_TOKENS = 512
"""From here on 64 outputs that share their columns go by the general rules."""
FEW_RESULTS = 12
"""Outputs per multiprocessor below which sums of tiles 16 and 32 are long: those go by other rules
up to 255 tokens, whose programs split them, and tile 16 from 3072 on, two programs at a time."""
SMALL_WEIGHT, SMALL_TOKENS = 2**22, 256
"""Elements of a dense weight of tiles 16 and 32 that up to so many tokens launches decide for."""
MULTIPLIED = 0.29
"""us that 128 tokens x 128 outputs x 64 take to multiply: 512 clocks."""
LOADED = 0.29
"""us that 256 lines of 128 bytes take to arrive where every multiprocessor loads."""
SHORT, SHORT_SHARE = 0.21, 0.7
"""The same of lines of 32 or 64 bytes, which no less than that share of it speeds up."""
STORED = 0.38
"""us between the sums of 128 x 128 outputs and the next ones."""
PACKS, SWIZZLES = 1.8, 0.7
"""us that a launch before the product takes, of x and of the weight."""
COPIED = 0.26
"""us that a megabyte takes to be read, or written, by it."""


def tiling_for(case: Case) -> Tiling | None:
    """The tiling of a case, None: that of the general rules."""
    width = power_of_two_divisor(case.row_group * case.B)
    if case.N <= FEWEST or case.B not in PATHS or width < (128 if case.B < 64 else 64):
        return None
    if case.B >= 64:
        general = ceil_div(case.K * case.B, DEPTH) < SHORTEST
        general |= width == 64 and case.N >= NARROW_TOKENS
    else:
        few = case.R * case.B / num_sms(case.device) < FEW_RESULTS
        general = few and (case.N < 256 or (case.B == 16 and case.N >= 3072))
        general |= case.N <= SMALL_TOKENS and case.R * case.C * case.B**2 <= SMALL_WEIGHT
    if general:
        return None
    cuts = [
        (path, tokens, outputs)
        for path in PATHS[case.B]
        for tokens in TOKENS
        for outputs in OUTPUTS
        if outputs <= width and _tried(case.B, path, tokens, outputs)
    ]
    path, tokens, outputs = min(cuts, key=lambda cut: product_us(case, *cut))
    return Tiling(path=path, BM=tokens, BN=outputs, BK=DEPTH)


def _tried(B: int, path: Path, tokens: int, outputs: int) -> bool:
    """Whether a cut was tried, and found good at all."""
    if B < 64 and outputs == 64:
        return tokens <= 128 and path != "gluon"
    return B != 32 or tokens < 320


def product_us(case: Case, path: Path, tokens: int, outputs: int) -> float:
    """What the tiles of a product take, beyond what every cut of it takes."""
    sms, depth = num_sms(case.device), case.K * case.B
    tiles = ceil_div(case.N, tokens) * (case.R * case.B // outputs)
    busy, share = min(1, tiles / sms), tokens * outputs / 128**2
    if case.B >= DEPTH:
        loaded = LOADED * busy * (tokens + outputs) / 256
    else:
        x_lines = tokens if path == "gluon packed" else tokens * DEPTH // case.B
        w_lines = outputs if path == "gluon" else outputs * DEPTH // case.B
        loaded = SHORT * max(busy, SHORT_SHARE) * (x_lines + w_lines) / 256
    before = 0.0
    if path == "gluon packed":
        before = PACKS + COPIED * 4e-6 * case.N * case.C * case.B
    elif path == "gluon" and case.B < DEPTH:
        before = SWIZZLES + COPIED * 4e-6 * case.R * case.B * depth
    steps = ceil_div(depth, DEPTH)
    tile = steps * max(MULTIPLIED * share, loaded) + STORED * share
    return before + ceil_div(tiles, sms) * tile
