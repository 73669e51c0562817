"""Full float32 products, whatever the program has chosen for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside: its rounding (1e-3) would leak into the directions that must not move."""
    matmul = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, setting)
    setattr(matmul, setting, "ieee" if setting == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(matmul, setting, before)
