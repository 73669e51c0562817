"""Spare slots come to life, at zero.

Legend: R block rows, C block columns, K slots per row, k live ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockell_format import num_blocks_for_density
from cms_topology import _distributed as dist_sync
from cms_topology._seeding import decision_generator

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


def grow(
    layer: CMSBlockLinear,
    density: float,
    generator: torch.Generator | None,
    scores: Tensor | None,
) -> int:
    """See `CMSBlockLinear.grow`; scores [R, C]."""
    target = num_blocks_for_density(layer.C, density)
    if not layer.num_live <= target <= layer.K:
        raise ValueError(
            f"density (={density}, {target} of {layer.C} blocks per row) must be between the "
            f"present one ({layer.num_live} blocks) and max_density ({layer.K} blocks); build "
            "the layer with a larger max_density to grow further."
        )
    if scores is not None and scores.shape != (layer.R, layer.C):
        raise ValueError(
            f"scores (shape {tuple(scores.shape)}) must be [R, C] = [{layer.R}, {layer.C}], one "
            "for every position."
        )
    added = target - layer.num_live
    if added == 0:
        return 0
    columns = _columns(layer, added, generator, scores)
    new, scorer = slice(layer.num_live, target), layer.scorer
    layer.values[:, new] = 0.0
    layer.col_indices[:, new] = columns
    scorer.block_age[:, new] = 0
    scorer.block_grace[:, new] = scorer.config.grace_decisions
    # never measured: no score yet, and the bias correction of the average starts afresh
    scorer.score_ema[:, new] = 0.0
    scorer.score_weight[:, new] = 0.0
    layer.num_live = target
    layer._refresh_derived()
    return added


def _columns(
    layer: CMSBlockLinear, added: int, generator: torch.Generator | None, scores: Tensor | None
) -> Tensor:
    """int32 [R, added], the absent columns of the largest scores."""
    if scores is None:
        # what a rank collected from its own tokens would let the ranks grow apart
        dist_sync.sync_topology_scores([layer])
        scores = layer.scorer.compute_candidate_scores()
    if generator is None and dist_sync.world_size() > 1:
        generator = decision_generator(layer.seed, layer.num_live, "grow")
    live = layer.col_indices[:, : layer.num_live].long()
    grouped = scores.view(-1, layer.row_group, layer.C).square().sum(1)
    source = generator.device if generator is not None else grouped.device
    noise = torch.rand(
        grouped.shape, generator=generator, dtype=torch.float32, device=source
    ).to(grouped.device)  # fmt: skip
    if not bool((grouped > 0).any() and grouped.isfinite().all()):
        grouped = noise
    present = live.view(-1, layer.row_group, live.shape[1])[:, 0]
    order = grouped.scatter(1, present, -1.0).argsort(dim=1, descending=True, stable=True)
    return order[:, :added].repeat_interleave(layer.row_group, 0).to(torch.int32)
