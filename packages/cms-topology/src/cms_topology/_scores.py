"""Scores of present and absent blocks in layers of one shape, all of them in the same launches.

Legend: L layers of equal sizes and settings, R block rows, C block columns, K slots per row, k live
ones, B tile side. A layer's part of a result does not depend on the layers beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from cms_topology._blocks import block_norms
from cms_topology._ordered_sum import ordered_sum
from cms_topology._selection import Selection, select_in_layers

if TYPE_CHECKING:
    from cms_topology._scorer import TopologyScorer

HISTORY_DECISIONS = 64
"""Length of the swap-rate history a layer keeps."""


def select_swaps(
    scorers: Sequence[TopologyScorer],
    values: Sequence[Tensor],
    col_indices: Tensor,
    *,
    row_group: int,
    generators: Sequence[torch.Generator | None],
    locked: Tensor | None = None,
    cost: Tensor | None = None,
) -> tuple[Selection, Tensor]:
    """Swaps of one decision, [L, R, k], and the candidate scores float32 [L, R, C] behind them.

    Args:
        scorers: of the L layers; with scores in nats one layer only.
        values: [R, K, B, B] each, all slots.
        col_indices: int32 [L, R, k], the live slots.
        row_group: rows that share their columns.
        generators: source of each layer's exploration.
        locked: bool [L, R, k], blocks that must stay.
        cost: float32 [L, R, k], what dropping a block costs an old task, in nats.
    """
    one, k = scorers[0], col_indices.shape[2]
    if one.loss is None:
        present = _present(scorers, values)[:, :, :k]
        candidates = calibrated(_candidates(scorers), present, col_indices)
    else:
        assert len(scorers) == 1
        slots = pad(col_indices[0], (0, one.K - k), value=-1)
        present = one.present_scores(values[0], slots)[None, :, :k]
        candidates = one.compute_candidate_scores()[None]
        if cost is not None:
            present = present + cost
    protected = torch.stack([scorer.block_grace for scorer in scorers])[:, :, :k] > 0
    selection = select_in_layers(
        present,
        candidates,
        col_indices,
        one.config,
        row_group=row_group,
        protected=protected if locked is None else protected | locked,
        generators=generators,
    )
    return selection, candidates


def calibrated(candidates: Tensor, present: Tensor, col_indices: Tensor) -> Tensor:
    """`TopologyScorer.calibrate` of L layers: float32 [L, R, C], [L, R, k], int32 [L, R, k]."""
    known = candidates.gather(2, col_indices.long())
    both = torch.stack((present, known))
    usable = both.isfinite().all(0)
    sums = ordered_sum(torch.where(usable, both, 0.0).flatten(2), 2)
    return candidates * (sums[0] / sums[1])[:, None, None]


def record_swaps(
    scorers: Sequence[TopologyScorer], swapped: Tensor, newborn_scores: Tensor
) -> None:
    """`TopologyScorer.record_decision` of L layers: bool and float32 [L, R, k]."""
    one, k = scorers[0], swapped.shape[2]
    scores = newborn_scores.nan_to_num(0.0, 0.0, 0.0)
    if one.loss is not None:  # the average is one of slopes then, not of scores
        scores = torch.zeros_like(scores)
    born = pad(swapped, (0, one.K - k))
    grace = torch.stack([scorer.block_grace for scorer in scorers]).sub_(1).clamp_(min=0)
    grace.masked_fill_(born, one.config.grace_decisions)
    torch._foreach_copy_([scorer.block_grace for scorer in scorers], grace.unbind())
    age = torch.stack([scorer.block_age for scorer in scorers]).masked_fill_(born, 0)
    torch._foreach_copy_([scorer.block_age for scorer in scorers], age.unbind())
    ema = torch.stack([scorer.score_ema for scorer in scorers])
    ema = torch.where(born, pad(scores, (0, one.K - k)), ema)
    torch._foreach_copy_([scorer.score_ema for scorer in scorers], ema.unbind())
    weight = torch.stack([scorer.score_weight for scorer in scorers]).masked_fill_(born, 1.0)
    torch._foreach_copy_([scorer.score_weight for scorer in scorers], weight.unbind())
    count = torch.stack([scorer.num_decisions for scorer in scorers])
    history = torch.stack([scorer.swap_history for scorer in scorers])
    rate = swapped.flatten(1).sum(1, keepdim=True).float() / swapped[0].numel()
    history.scatter_(1, (count % HISTORY_DECISIONS)[:, None], rate)
    torch._foreach_copy_([scorer.swap_history for scorer in scorers], history.unbind())
    torch._foreach_add_([scorer.num_decisions for scorer in scorers], 1)


def swap_rates(scorers: Sequence[TopologyScorer]) -> list[list[float]]:
    """Swap rates of the last decisions (at most 64) of any layers, oldest first.

    Waits for the device twice, however many layers there are.
    """
    device = scorers[0].num_decisions.device
    counts = torch.stack([scorer.num_decisions.to(device) for scorer in scorers]).tolist()
    rings = torch.stack([scorer.swap_history.to(device) for scorer in scorers]).tolist()
    rates = []
    for n, ring in zip(counts, rings, strict=True):
        start = n % HISTORY_DECISIONS if n > HISTORY_DECISIONS else 0
        rates.append([*ring[start:], *ring[:start]] if n > HISTORY_DECISIONS else ring[:n])
    return rates


def _present(scorers: Sequence[TopologyScorer], values: Sequence[Tensor]) -> Tensor:
    """Keep scores of all slots, float32 [L, R, K]; see `TopologyScorer.present_scores`."""
    if scorers[0].config.keep_score == "magnitude":
        return torch.stack(block_norms(values))
    emas = torch.stack([scorer.score_ema for scorer in scorers])
    return emas / torch.stack([scorer.score_weight for scorer in scorers])


def _candidates(scorers: Sequence[TopologyScorer]) -> Tensor:
    """Scores of all positions, float32 [L, R, C]; see `compute_candidate_scores`."""
    one = scorers[0]
    means = torch.stack([scorer._means for scorer in scorers])
    errors, activations, norms, _ = means.split((one.R, one.C, one.R * one.C, 1), 1)
    if one.config.candidate_score == "outer":
        return errors[:, :, None] * activations[:, None, :]
    return norms.unflatten(1, (one.R, one.C))
