"""How exact the guard's products are, whatever the program has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
