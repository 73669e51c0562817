"""Statistics of absent blocks: sums over the sampled steps, and what becomes of them.

Legend: L layers, R block rows, C block columns; n = R + C + R*C + 1 entries of a layer: error norms
[R], activation norms [C], candidate norms [R, C], number of sampled steps.

The functions take any layers and treat those of equal size in the same launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cms_topology._scorer import TopologyScorer


def add_sampled_step(
    scorers: Sequence[TopologyScorer], stats: Sequence[Tensor], finite: Tensor
) -> None:
    """Add one step's squared norms to the sums of every scorer.

    Args:
        scorers: layers.
        stats: float32 [n - 1] of each: squared norms of rows, columns, all blocks.
        finite: 0-d bool; False skips the step.
    """
    collected = dict(zip(scorers, stats, strict=True))
    for alike in _by_size(scorers):
        norms = torch.stack([collected[scorer] for scorer in alike]).sqrt()
        steps = torch.cat((norms, norms.new_ones(len(alike), 1)), 1)
        steps = torch.where(finite.to(steps.device), steps, 0.0)
        torch._foreach_add_([scorer._sums for scorer in alike], steps.unbind())
        for scorer in alike:
            scorer._unfolded = True


def fold_sampled_steps(scorers: Sequence[TopologyScorer]) -> None:
    """Turn the sums since the last fold into means; with no sample since, keep the old ones."""
    # most of the time nothing was sampled, and the host knows
    for alike in _by_size([scorer for scorer in scorers if scorer._unfolded]):
        sums = torch.stack([scorer._sums for scorer in alike])
        kept = torch.stack([scorer._means for scorer in alike])
        count = sums[:, -1:]
        means = torch.cat((sums[:, :-1] / count.clamp(min=1), count), 1)
        means = torch.where(count > 0, means, kept)
        torch._foreach_copy_([scorer._means for scorer in alike], means.unbind())
        torch._foreach_zero_([scorer._sums for scorer in alike])
        for scorer in alike:
            scorer._unfolded = False
            if scorer.loss is not None:
                scorer.loss.fold()


def _by_size(scorers: Iterable[TopologyScorer]) -> list[list[TopologyScorer]]:
    found: dict[object, list[TopologyScorer]] = {}
    for scorer in scorers:
        found.setdefault((scorer._sums.numel(), scorer._sums.device), []).append(scorer)
    return list(found.values())
