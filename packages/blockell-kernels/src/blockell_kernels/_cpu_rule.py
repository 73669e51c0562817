"""When gathered block products beat the dense product on the CPU: a measured table.

What decides is the density and the height H = row_group * tile of a row group: the matrix products
are [N, K*B] x [K*B, H], and BLAS is slow at small H. The table holds, per height and direction, the
density up to which gathering wins. Measured on two-core AMD EPYC (AVX2), torch 2.13 with MKL,
float32, one and two threads, N = 1024 to 8192, 640 -> 2560, 2560 -> 640, 512 -> 512, 128 -> 512 and
512 -> 128, tiles 8 to 128. Times as a fraction of the dense product (lower is better), forward /
grad_input / grad_values, at one thread; two threads in brackets where measured. Placing the tiles
into a dense buffer first costs 1.02 to 1.1.

| H   | 10%            | 25%                            | 50%            | 75%         |
|-----|----------------|--------------------------------|----------------|-------------|
| 8   | 2.1/1.5/0.7    |                                |                |             |
| 16  | 0.30/0.50/0.27 | 0.70/1.10/0.68 (0.93/1.8/0.95) | 1.7/2.4/1.2    |             |
| 32  | 0.21/0.30/0.23 | 0.52/0.68/0.44                 | 1.1/1.2/0.9    |             |
| 64  | 0.19/0.22/0.20 | 0.43/0.46/0.45                 | 0.90/0.93/0.88 | 1.4/1.2/1.2 |
| 128 | 0.16/0.19/0.18 | 0.42/0.38/0.40                 | 0.75/0.74/0.78 | 1.1/1.1/1.1 |

(Height 8 at 15%.) With few tokens the dense path pays for the whole weight: at N = 1,
640 -> 2560, 50%, it took 5 to 15 times as long as `nn.Linear`'s product, gathering 1.4 to 2 times.

`python -m blockell_kernels.bench` repeats such measurements.
"""

from __future__ import annotations

from blockell_kernels._backends import Case, Direction, Verdict

# Break-even density by height of a row group; a height in between takes the row below it.
BREAK_EVEN: dict[Direction, dict[int, float]] = {
    "forward": {8: 0.05, 16: 0.25, 32: 0.42, 64: 0.53, 128: 0.62},
    "grad_input": {8: 0.05, 16: 0.12, 32: 0.38, 64: 0.53, 128: 0.62},
    "grad_values": {8: 0.10, 16: 0.28, 32: 0.45, 64: 0.55, 128: 0.70},
}
# Elements gathered for all groups at once, up to which there are "few tokens".
FEW_ELEMENTS = 2**18
FEW_TOKENS_BREAK_EVEN = 0.60
SHORT, SMALL_WEIGHT = 32, 2**17
"""Of row groups below this height and dense weights of fewer elements, one copy for both products
of a training step takes less: 16 to 256 tokens of 256 -> 256 at 50%, tile 16 with free rows, took
0.76 to 0.88 of the time of gathering. A forward product alone takes 1.1 to 1.3 times as long."""


def few_tokens(N: int, R: int, K: int, B: int, row_group: int) -> bool:
    """Whether the gathered operands of all row groups together fit into the second-level cache."""
    return N * (R // row_group) * K * B <= FEW_ELEMENTS


def verdict(case: Case) -> Verdict:
    """Whether gathered block products beat the dense product on this case."""
    height = case.row_group * case.B
    table = BREAK_EVEN[case.direction]
    limit = table.get(max((h for h in table if h <= height), default=0), 0.0)
    what = f"row groups {height} high"
    few = few_tokens(case.N, case.R, case.K, case.B, case.row_group)
    few = few and (height >= SHORT or case.R * case.C * case.B**2 >= SMALL_WEIGHT)
    if few and case.direction != "grad_values" and limit < FEW_TOKENS_BREAK_EVEN:
        limit, what = FEW_TOKENS_BREAK_EVEN, f"few tokens (N={case.N})"
    wins = case.density <= limit
    return Verdict(
        wins,
        f"density {case.density:.2f} {'<=' if wins else '>'} {limit:.2f}, the measured CPU "
        f"break-even of {case.direction} for {what}",
    )
