"""Whether all processes of a training had the same topology, from the recorded checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Divergence", "describe", "find_divergence", "layers_apart"]


@dataclass(frozen=True)
class Divergence:
    """Where processes began to disagree."""

    step: int
    """The first one."""
    layer: str
    """The first one of that step, in the order of the layer table."""
    groups: tuple[tuple[int, ...], ...]
    """Ranks that agree with one another; the group of rank 0 comes first."""
    steps: int
    """Recorded decisions with any disagreement."""
    layers: int
    """Layers that disagree at the first step."""


def layers_apart(checksums: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Layers whose checksums, one per rank, are not all the same."""
    return [name for name, sums in checksums.items() if sums.count(sums[0]) < len(sums)]


def find_divergence(
    checksums: Mapping[int, Mapping[str, tuple[str, ...]]],
) -> Divergence | None:
    """The first disagreement, or None.

    Args:
        checksums: per step and layer one per rank, as `Run.checksums` gives them.
    """
    first: tuple[int, list[str]] | None = None
    count = 0
    for step in sorted(checksums):
        apart = layers_apart(checksums[step])
        if apart:
            count += 1
            first = first or (step, apart)
    if first is None:
        return None
    step, layers = first
    groups: dict[str, list[int]] = {}
    for rank, checksum in enumerate(checksums[step][layers[0]]):
        groups.setdefault(checksum, []).append(rank)
    return Divergence(step, layers[0], tuple(map(tuple, groups.values())), count, len(layers))


def describe(apart: Divergence) -> str:
    """One sentence for people."""
    groups = " and ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:16]))}"
        + (" and more" if len(ranks) > 16 else "")
        for ranks in apart.groups[:4]
    )
    layers = "1 layer differs" if apart.layers == 1 else f"{apart.layers:,} layers differ"
    decisions = "1 snapshot" if apart.steps == 1 else f"{apart.steps:,} snapshots"
    return (
        f"The processes do not hold the same topology: at step {apart.step:,}, {layers}; in "
        f"{apart.layer}, {groups} disagree. {decisions} with a difference. What is shown is "
        "rank 0's."
    )
