"""Moving averages of the present blocks' scores, and their ages.

Legend: R block rows, K slots per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cms_topology._blocks import kernels

if TYPE_CHECKING:
    from cms_topology._scorer import TopologyScorer


class Averages(NamedTuple):
    """A layer's state that one step changes; all [R, K]."""

    ema: Tensor
    """float32."""
    weight: Tensor
    """float32, the bias correction 1 - decay^t."""
    age: Tensor
    """int32, optimizer steps since birth."""


def update_averages(
    scorers: Sequence[TopologyScorer], scores: Sequence[Tensor], finite: Tensor
) -> None:
    """Fold one step's block scores into the moving averages and age the blocks, of many layers.

    Args:
        scorers: layers to update; those with equal `ema_decay` share launches.
        scores: float32 [R, K] of each.
        finite: 0-d bool; False skips the step for all.
    """
    alike: dict[tuple[float, torch.device], list[tuple[Averages, Tensor]]] = {}
    for scorer, score in zip(scorers, scores, strict=True):
        held = scorer._buffers  # a module's attributes take several times as long
        ema, weight, age = held["score_ema"], held["score_weight"], held["block_age"]
        assert ema is not None and weight is not None and age is not None  # noqa: PT018
        members = alike.setdefault((scorer.config.ema_decay, score.device), [])
        members.append((Averages(ema, weight, age), score))
    for (decay, device), members in alike.items():
        state, given = [m[0] for m in members], [m[1] for m in members]
        here = finite.to(device)
        by_kernel = kernels() if device.type == "cuda" and _contiguous(state, given) else None
        if by_kernel is not None:
            by_kernel.advance(state, given, here, decay)
        else:
            _advance(state, given, here, decay)


def _contiguous(state: Sequence[Averages], given: Sequence[Tensor]) -> bool:
    return all(t.is_contiguous() for t in given) and all(
        t.is_contiguous() for averages in state for t in averages
    )


def _advance(
    state: Sequence[Averages], given: Sequence[Tensor], finite: Tensor, decay: float
) -> None:
    """What the kernel does, in a handful of launches."""
    emas, weights, ages = ([averages[i] for averages in state] for i in range(3))
    if _asking_is_free(finite):
        if finite:
            one = torch.ones((), dtype=torch.float32, device=finite.device)
            torch._foreach_lerp_(emas, list(given), 1.0 - decay)
            torch._foreach_lerp_(weights, [one.expand_as(w) for w in weights], 1.0 - decay)
            torch._foreach_add_(ages, 1)
        return
    # a skipped step lerps every entry to itself, which changes no bit
    torch._foreach_lerp_(emas, _where(finite, given, emas), 1.0 - decay)
    # where a product with a 0-d tensor would need one launch per layer, reuse the same trick
    torch._foreach_lerp_(weights, _where(finite, 1.0, weights), 1.0 - decay)
    # given one 0-d tensor for all, torch reads it as a number and waits for the device
    steps = finite.to(torch.int32).repeat(sum(age.numel() for age in ages))
    torch._foreach_add_(ages, _split(steps, ages))


def _asking_is_free(finite: Tensor) -> bool:
    return finite.is_cpu


def _where(
    condition: Tensor, given: Sequence[Tensor] | float, otherwise: Sequence[Tensor]
) -> list[Tensor]:
    """`torch.where` of a 0-d condition for tensors of many shapes, in one launch and its copies."""
    held = _flat(otherwise)
    if isinstance(given, float):
        chosen = torch.where(condition, given, held)
    else:
        chosen = torch.where(condition, _flat(given), held)
    return _split(chosen, otherwise)


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of a flat tensor in the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
