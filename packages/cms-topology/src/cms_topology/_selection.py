"""Which blocks leave and which arrive.

Legend: R block rows, C block columns, K live blocks per row, G rows of a row group, P proposals
per row group.

Everything here is tensor arithmetic of static shape: no loop over rows, no host synchronisation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cms_topology._config import ScoringConfig


class Selection(NamedTuple):
    """What a decision changes."""

    swapped: Tensor
    """bool [R, K]: slots whose block is replaced."""
    columns: Tensor
    """int32 [R, K]: columns after the decision; a newcomer takes the slot of the block it
    replaces."""
    max_swaps: int
    """Upper bound of the number of True entries in `swapped`."""


def select_top_k(
    present: Tensor,
    candidates: Tensor,
    col_indices: Tensor,
    config: ScoringConfig,
    *,
    row_group: int = 1,
    protected: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Selection:
    """Pair the weakest present blocks of every row with its strongest absent columns.

    A pair is swapped when its candidate exceeds `swap_threshold` times the present score, strictly,
    within the caps per row and per layer (largest gains first). If these are fewer than
    `min_swap_frac` of the blocks, the largest gains below the threshold follow, the smallest losses
    after them. With probability `epsilon` the newcomer of a swap is a random absent column instead.
    Rows of a row group decide together: the group's score is the root of the sum of squares of its
    blocks', or their sum if they are nats. Scores that are not finite take no part: NaN and K = C
    swap nothing; nor do ties and zeros without a floor.

    Args:
        present: float [R, K], scores of the live blocks.
        candidates: float [R, C], scores of all positions on the same scale; entries of present
            positions are ignored.
        col_indices: int32 [R, K], distinct in every row, equal in the rows of a group.
        config: thresholds and caps.
        row_group: rows that share their columns; divides R.
        protected: bool [R, K], blocks that must stay.
        generator: source of the exploration; draws the same amount at every call.
    """
    R, K = present.shape
    C = candidates.shape[1]
    G = row_group
    groups = R // G
    unchanged = Selection(
        torch.zeros(R, K, dtype=torch.bool, device=present.device), col_indices.clone(), 0
    )
    proposals = min(max(1, int(config.max_row_swap_frac * K)), K, C - K)
    if config.max_row_swap_frac == 0 or config.max_swap_frac == 0 or proposals == 0:
        return unchanged
    max_group_swaps = min(max(1, int(config.max_swap_frac * K * groups)), groups * proposals)

    columns = col_indices.view(groups, G, K)[:, 0].long()
    additive = config.candidate_score == "loss"
    weak, weak_slot = _weakest(_group_scores(present, G, additive), protected, G, proposals)
    grouped = _group_scores(candidates, G, additive)
    strong, strong_column = _strongest(grouped, columns, proposals)

    # an infinite present score is a protected one, and an infinite candidate never won anything
    known = strong.isfinite() & weak.isfinite()
    accept = (strong > config.swap_threshold * weak) & known
    floor = math.ceil(config.min_swap_frac * K * groups)
    if floor > 0:
        # those over the threshold come first, whatever they gain
        order = torch.where(accept, torch.inf, strong - weak)
        accept |= known & _largest(order, known, floor)
    accept &= _largest(strong - weak, accept, max_group_swaps)

    arriving = _explore(accept, strong_column, columns, C, config.epsilon, generator)
    swapped = torch.zeros_like(columns, dtype=torch.bool).scatter(1, weak_slot, accept)
    leaving = columns.gather(1, weak_slot)
    new_columns = columns.scatter(1, weak_slot, torch.where(accept, arriving, leaving))
    return Selection(
        swapped.repeat_interleave(G, 0),
        new_columns.to(col_indices.dtype).repeat_interleave(G, 0),
        max_group_swaps * G,
    )


def _group_scores(scores: Tensor, G: int, additive: bool) -> Tensor:
    """[R, n] -> [R/G, n]: root of the sum of squares over the rows of a group; nats add up."""
    if G == 1:
        return scores
    if additive:
        return scores.view(-1, G, scores.shape[1]).sum(1)
    return scores.view(-1, G, scores.shape[1]).square().sum(1).sqrt()


def _weakest(
    scores: Tensor, protected: Tensor | None, G: int, proposals: int
) -> tuple[Tensor, Tensor]:
    """Scores and slots of the weakest blocks of every group, weakest first: [R/G, P] each."""
    blocked = ~scores.isfinite()
    if protected is not None:
        blocked = blocked | protected.view(-1, G, protected.shape[1]).any(1)
    # stable sorts, so that ties fall alike on every rank and device
    ordered, slots = scores.masked_fill(blocked, torch.inf).sort(dim=1, stable=True)
    return ordered[:, :proposals], slots[:, :proposals]


def _strongest(scores: Tensor, columns: Tensor, proposals: int) -> tuple[Tensor, Tensor]:
    """Scores and columns of the strongest absent blocks, strongest first: [R/G, P] each."""
    scores = scores.masked_fill(~scores.isfinite(), -torch.inf).scatter(1, columns, -torch.inf)
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    return ordered[:, :proposals], order[:, :proposals]


def _largest(gain: Tensor, accept: Tensor, limit: int) -> Tensor:
    """bool, shape of `gain`: True for the `limit` largest gains among the accepted."""
    if limit >= gain.numel():
        return torch.ones_like(accept)
    order = torch.where(accept, gain, -torch.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros_like(accept).flatten()
    chosen.index_fill_(0, order[:limit], True)  # assigning a number would wait for the device
    return chosen.view_as(accept)


def _explore(
    accept: Tensor,
    strong_column: Tensor,
    columns: Tensor,
    C: int,
    epsilon: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Columns that arrive, [R/G, P]: the strongest, or random absent ones for a share epsilon."""
    source = generator.device if generator is not None else accept.device
    draws = torch.rand(
        columns.shape[0], C + accept.shape[1], generator=generator, device=source
    ).to(accept.device, non_blocking=True)  # a blocking copy would wait for the device
    keys, coin = draws.split((C, accept.shape[1]), dim=1)
    exploring = accept & (coin < epsilon)
    greedy = accept & ~exploring
    # a random newcomer may be any absent column that no greedy newcomer of the row takes
    keys = keys.scatter(1, columns, -1.0)
    taken = torch.zeros_like(keys, dtype=torch.bool).scatter(1, strong_column, greedy)
    random_columns = keys.masked_fill(taken, -1.0).argsort(dim=1, descending=True, stable=True)
    rank = (exploring.cumsum(1) - 1).clamp_(min=0)
    return torch.where(exploring, random_columns.gather(1, rank), strong_column)
