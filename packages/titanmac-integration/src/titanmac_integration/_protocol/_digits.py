"""scikit-learn's handwritten digits (8 x 8 pixels) as problems: 64 pixels, then the digit."""

import torch
from torch import Tensor

from ._problems import ProblemTask

PIXEL = ord("A")
"""Byte of a black pixel; the brightest is 16 further."""


def permuted_digits(seed: int) -> ProblemTask:
    """All ten digits, the pixels in an order drawn from ``seed`` (0 keeps it).

    Goodfellow et al. 2013, "An empirical investigation of catastrophic forgetting", section 4.
    """
    pixels, digits = _load()
    if seed:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        pixels = pixels[:, order]
    return _task(f"permuted-digits-{seed}", pixels, digits)


def split_digits(classes: str) -> ProblemTask:
    """The digits LOW to HIGH, for example "0-4".

    Raises:
        ValueError: ``classes`` is no such range.
    """
    low, _, high = classes.partition("-")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) <= 9):
        raise ValueError(f"split-digits (={classes!r}) must be a range of digits such as 0-4.")
    pixels, digits = _load()
    chosen = (digits >= int(low)) & (digits <= int(high))
    return _task(f"split-digits-{classes}", pixels[chosen], digits[chosen])


def _load() -> tuple[Tensor, Tensor]:
    """Pixels int64 [n, 64] from 0 to 16, digits int64 [n]."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(
            "the tasks of handwritten digits need scikit-learn: pip install scikit-learn."
        ) from error
    data = load_digits()
    return torch.as_tensor(data.data).long(), torch.as_tensor(data.target).long()


def _task(name: str, pixels: Tensor, digits: Tensor) -> ProblemTask:
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    end = torch.full((len(digits), 1), ord("\n"))
    tokens = torch.cat((pixels + PIXEL, digits[:, None] + ord("0"), end), 1)[order]
    is_answer = torch.zeros_like(tokens, dtype=torch.bool)
    is_answer[:, 64] = True
    tenth = len(tokens) // 10
    cuts = (slice(2 * tenth, None), slice(0, tenth), slice(tenth, 2 * tenth))
    train, validation, test = ((tokens[cut], is_answer[cut]) for cut in cuts)
    chance = float(torch.bincount(digits).max()) / len(digits)
    return ProblemTask(name, train, validation, test, chance=chance, seq_len=66)
