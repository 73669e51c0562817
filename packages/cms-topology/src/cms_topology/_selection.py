"""Which blocks leave and which arrive.

Legend: L layers of one shape, R block rows, C block columns, K live blocks per row, G rows of a row
group, P proposals per row group.

Everything here is tensor arithmetic of static shape: no loop over rows or layers, no host
synchronisation. A layer's part of a result does not depend on the layers beside it, not by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cms_topology._config import ScoringConfig
from cms_topology._ordered_sum import ordered_sum


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

    Raises:
        ValueError: shapes that do not fit, or a row group that does not divide R.
    """
    (R, K), C = present.shape, candidates.shape[-1]
    for name, tensor, shape in (
        ("candidates", candidates, (R, C)),
        ("col_indices", col_indices, (R, K)),
        ("protected", protected, (R, K)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} (shape {tuple(tensor.shape)}) must have shape {shape}, as present "
                f"(shape {(R, K)}) has {R} rows of {K} blocks."
            )
    if K > C:
        raise ValueError(f"present (shape {(R, K)}) must have at most C (={C}) blocks in a row.")
    if row_group < 1 or R % row_group:
        raise ValueError(f"row_group (={row_group}) must be a divisor of the block rows (={R}).")
    selection = select_in_layers(
        present[None],
        candidates[None],
        col_indices[None],
        config,
        row_group=row_group,
        protected=None if protected is None else protected[None],
        generators=[generator],
    )
    return Selection(selection.swapped[0], selection.columns[0], selection.max_swaps)


def select_in_layers(
    present: Tensor,
    candidates: Tensor,
    col_indices: Tensor,
    config: ScoringConfig,
    *,
    row_group: int,
    protected: Tensor | None,
    generators: Sequence[torch.Generator | None],
) -> Selection:
    """`select_top_k` of L layers at once: every tensor has their number as its first dimension.

    `generators` has one for each. `max_swaps` of the result bounds the swaps of one layer.
    """
    L, R, K = present.shape
    C = candidates.shape[2]
    G = row_group
    groups = R // G
    unchanged = Selection(
        torch.zeros(L, R, K, dtype=torch.bool, device=present.device), col_indices.clone(), 0
    )
    proposals = min(max(1, int(config.max_row_swap_frac * K)), K, C - K)
    if config.max_row_swap_frac == 0 or config.max_swap_frac == 0 or proposals == 0:
        return unchanged
    max_group_swaps = min(max(1, int(config.max_swap_frac * K * groups)), groups * proposals)

    columns = col_indices.view(L, groups, G, K)[:, :, 0].long()
    additive = config.candidate_score == "loss"
    scores = _group_scores(present, G, additive)
    blocked = ~scores.isfinite()
    if protected is not None:
        blocked |= protected.view(L, groups, G, K).any(2)
    weak, weak_slot = _weakest(scores, blocked, proposals)
    grouped = _group_scores(candidates, G, additive)
    strong, strong_column = _strongest(grouped, columns, proposals)

    # an infinite present score is a protected one, and an infinite candidate never won anything
    known = strong.isfinite() & weak.isfinite()
    accept = (strong > config.swap_threshold * weak) & known
    floor = math.ceil(config.min_swap_frac * K * groups)
    gain = strong - weak
    if floor > 0:
        # those over the threshold come first, whatever they gain
        accept |= known & _largest(gain.masked_fill(accept, torch.inf), known, floor)
    accept &= _largest(gain, accept, max_group_swaps)

    arriving = _explore(accept, strong_column, columns, C, config.epsilon, generators)
    swapped = torch.zeros_like(columns, dtype=torch.bool).scatter(2, weak_slot, accept)
    leaving = columns.gather(2, weak_slot)
    new_columns = columns.scatter(2, weak_slot, torch.where(accept, arriving, leaving))
    return Selection(
        swapped.repeat_interleave(G, 1),
        new_columns.to(col_indices.dtype).repeat_interleave(G, 1),
        max_group_swaps * G,
    )


def _group_scores(scores: Tensor, G: int, additive: bool) -> Tensor:
    """[L, R, n] -> [L, R/G, n]: root of the sum of squares over a group's rows; nats add up."""
    if G == 1:
        return scores
    rows = scores.unflatten(1, (-1, G))
    return ordered_sum(rows, 2) if additive else ordered_sum(rows.square(), 2).sqrt()


def _weakest(scores: Tensor, blocked: Tensor, proposals: int) -> tuple[Tensor, Tensor]:
    """Scores and slots of the weakest blocks of every group, weakest first: [L, R/G, P] each."""
    # stable sorts, so that ties fall alike on every rank and device
    ordered, slots = scores.masked_fill(blocked, torch.inf).sort(dim=2, stable=True)
    return ordered[:, :, :proposals], slots[:, :, :proposals]


def _strongest(scores: Tensor, columns: Tensor, proposals: int) -> tuple[Tensor, Tensor]:
    """Scores and columns of the strongest absent blocks, strongest first: [L, R/G, P] each."""
    scores = scores.masked_fill(~scores.isfinite(), -torch.inf).scatter(2, columns, -torch.inf)
    ordered, order = scores.sort(dim=2, descending=True, stable=True)
    return ordered[:, :, :proposals], order[:, :, :proposals]


def _largest(gain: Tensor, accept: Tensor, limit: int) -> Tensor:
    """bool, shape of `gain`: True for the `limit` largest gains among a layer's accepted."""
    if limit >= gain[0].numel():
        return torch.ones_like(accept)
    gain = gain.masked_fill(~accept, -torch.inf).flatten(1)
    order = gain.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(gain, dtype=torch.bool).scatter_(1, order[:, :limit], True)
    return chosen.view_as(accept)


def _explore(
    accept: Tensor,
    strong_column: Tensor,
    columns: Tensor,
    C: int,
    epsilon: float,
    generators: Sequence[torch.Generator | None],
) -> Tensor:
    """Columns that arrive, [L, R/G, P]: the strongest, or, for a share epsilon, random ones."""
    proposals = accept.shape[2]
    draws = torch.stack(
        [
            torch.rand(
                columns.shape[1],
                C + proposals,
                generator=generator,
                dtype=torch.float32,
                device=generator.device if generator is not None else accept.device,
            )
            for generator in generators
        ]
    ).to(accept.device, non_blocking=True)  # a blocking copy would wait for the device
    keys, coin = draws.split((C, proposals), dim=2)
    exploring = accept & (coin < epsilon)
    greedy = accept & ~exploring
    # a random newcomer may be any absent column that no greedy newcomer of the row takes
    keys = keys.scatter(2, columns, -1.0)
    taken = torch.zeros_like(keys, dtype=torch.bool).scatter(2, strong_column, greedy)
    random_columns = keys.masked_fill(taken, -1.0).argsort(dim=2, descending=True, stable=True)
    rank = (exploring.cumsum(2) - 1).clamp_(min=0)
    return torch.where(exploring, random_columns.gather(2, rank), strong_column)
