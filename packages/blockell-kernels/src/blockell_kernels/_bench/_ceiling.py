"""What the machine at hand can do at best: measured, not read off a data sheet.

The ceiling of a case is the larger of two times: its products at the speed of a large square
product, and its operands, read or written once, at the speed of a large copy.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from blockell_kernels._bench._cases import BenchCase
from blockell_kernels._bench._timing import clock_for

SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
ROUNDS = 7


class Ceiling(NamedTuple):
    """Best of several rounds."""

    tflops: float
    gb_per_s: float


@cache
def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """The speed of a square product and of a copy on this device, in this dtype."""
    kind = torch.device(device).type
    side = SIDE.get(kind, SIDE["cpu"])
    clock = clock_for(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(COPY_BYTES.get(kind, COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(step: object) -> float:
        assert callable(step)
        step()
        return min(clock.time_ms(step) for _ in range(ROUNDS))

    product_ms, copy_ms = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Ceiling(2 * side**3 / product_ms / 1e9, 2 * source.numel() / copy_ms / 1e6)


class Work(NamedTuple):
    """What a step has to do at least."""

    flops: float
    bytes: float


def work(case: BenchCase, dense: bool) -> Work:
    """Products and traffic of a step: every operand and result once; `dense`: the whole weight."""
    share = 1.0 if dense else case.live_density
    weight = case.in_features * case.out_features * share
    x, y = case.tokens * case.in_features, case.tokens * case.out_features
    size = torch.empty((), dtype=case.dtype).element_size()
    products, traffic = 1, x + weight + y
    if case.mode == "training":  # dy and x and W are read again, dx and dW are written
        products, traffic = 3, 2 * (x + weight + y) + x + weight
    return Work(2.0 * case.tokens * weight * products, traffic * size)
