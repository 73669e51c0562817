"""Tilings of the forward product below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, K live blocks per row, B tile side, N tokens.

By a model of the time: a multiprocessor works off its tiles one after the other; a step of 64 is
bound by its products or by its loads, whichever takes longer, and loads are the slower the more
multiprocessors load. Fitted to 348 layers of tiles 64 and 128 whose groups are 128 outputs tall, at
65 to 4096 tokens; on 144 others its choice takes 1.1% more than the best of 14 tilings, and the
rules before took 11% more than its choice (H200, 2026-11-28). Where only 64 outputs share their
columns, more bytes are loaded per product than arrive in time, and from 512 tokens on Triton's
kernels, two programs on a multiprocessor, hide that better.
"""

from __future__ import annotations

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

FEWEST = 64
"""Up to this many tokens, reading the weight once decides: `_few_tokens`."""
TOKENS = (64, 128, 192, 256, 320)
OUTPUTS = (64, 128)
NARROW_TOKENS = 512
"""From here on 64 outputs that share their columns go by the general rules."""
MULTIPLIED = 0.29
"""us that 128 tokens x 128 outputs x 64 take to multiply: 512 clocks."""
LOADED = 0.29
"""us that 256 lines of 128 bytes take to arrive where every multiprocessor loads."""
STORED = 0.38
"""us between the sums of 128 x 128 outputs and the next ones."""


def tiling_for(case: Case) -> Tiling | None:
    """The tiling of a case, None: that of the general rules."""
    if case.N <= FEWEST or case.B < 64:
        return None
    width = power_of_two_divisor(case.row_group * case.B)
    if width == 64 and case.N >= NARROW_TOKENS:
        return None
    cuts = [(tokens, outputs) for outputs in OUTPUTS if outputs <= width for tokens in TOKENS]
    tokens, outputs = min(cuts, key=lambda cut: product_us(case, *cut))
    return Tiling(path="gluon", BM=tokens, BN=outputs, BK=64)


def product_us(case: Case, tokens: int, outputs: int) -> float:
    """What the tiles of a product take, beyond what every cut of it takes."""
    sms, steps = num_sms(case.device), ceil_div(case.K * case.B, 64)
    tiles = ceil_div(case.N, tokens) * (case.R * case.B // outputs)
    share = tokens * outputs / 128**2
    loaded = LOADED * (tokens + outputs) / 256 * min(1, tiles / sms)
    return ceil_div(tiles, sms) * (steps * max(MULTIPLIED * share, loaded) + STORED * share)
