"""Measures of what a model has learned and what it has lost."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def exact_match(predicted: Tensor, expected: Tensor) -> float:
    """Share of rows that agree in every position: both integer [rows, positions]; never substring.

    Raises:
        ValueError: the shapes differ or there is no row.
    """
    if predicted.shape != expected.shape or predicted.ndim != 2 or not len(predicted):
        raise ValueError(
            f"predicted (shape {tuple(predicted.shape)}) must be [rows, positions] like expected "
            f"(shape {tuple(expected.shape)}), with at least one row."
        )
    return (predicted == expected).all(dim=1).double().mean().item()


def bits_per_byte(logits: Tensor, targets: Tensor) -> float:
    """Mean of -log2 p(target): ``logits`` [..., V], ``targets`` [...]; one token is one byte."""
    nats = functional.cross_entropy(logits.flatten(0, -2).double(), targets.flatten())
    return nats.item() / math.log(2.0)


def relative_forgetting(before: float, after: float, chance: float) -> float | None:
    """(before - after) / (before - chance): 0 is nothing lost, 1 is everything down to chance.

    Negative when the task got better. Works for accuracies and for losses, whose chance level is
    above. None when nothing had been learned (before equals chance), so nothing can be lost.
    """
    learned = before - chance
    if learned == 0.0 or not all(map(math.isfinite, (before, after, chance))):
        return None
    return (before - after) / learned


@torch.no_grad()
def sample_greedily(model: torch.nn.Module, prompts: Tensor, n_tokens: int) -> Tensor:
    """Continue ``prompts`` [rows, length] by the most probable token, ``n_tokens`` times."""
    tokens = prompts
    for _ in range(n_tokens):
        following = model(tokens)["logits"][:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, following.to(tokens.dtype)), dim=1)
    return tokens[:, prompts.shape[1] :]
