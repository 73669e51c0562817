"""How exact the guard's products are, whatever the program has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def products(*, full: bool) -> Iterator[None]:
    """Products of float32 matrices on a GPU: full precision inside, or TF32, several times faster.

    TF32 rounds operands to 2^-11. That leaks some 1e-7 of a displacement's energy into the
    directions that must not move: too much for "not at all" or a budget of 1e-6, and nothing beside
    one of 1e-3.
    """
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")
    setting = "fp32_precision" if new else "allow_tf32"
    before = getattr(matmul, setting)
    setattr(matmul, setting, ("ieee" if full else "tf32") if new else not full)
    try:
        yield
    finally:
        setattr(matmul, setting, before)


def cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest float32 tensor that TF32 holds, and the rest: added, `x` to the bit.

    a b is a_high b_high + a_high b_low + a_low b_high up to 2^-22, by three products in TF32.
    """
    high = ((x.view(torch.int32) + 4096) & -8192).view(torch.float32)
    return high, x - high
