"""Level 0 of the clock: what one optimizer step tells about the blocks.

Legend: R block rows, C block columns, K slots per row, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cms_topology._blocks import block_norms
from cms_topology._sampled import add_sampled_step
from cms_topology._scorer import all_finite, update_gradient_emas

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


def accumulate_scores(layers: Sequence[CMSBlockLinear]) -> Tensor | None:
    """Level 0 for many layers in few launches; returns a 0-d bool, False if the step was skipped.

    Takes the gradients of `values` and the statistics of absent blocks collected since the last
    call. A step in which any of them is not finite contributes nothing to any layer. Layers without
    a gradient (frozen, or not used in this step) are left out; None if that is all of them.

    Raises:
        ValueError: the parameters are sharded (FSDP, tensor parallelism).
    """
    for layer in layers:
        _refuse_shards(layer)
    with torch.no_grad():
        active = [layer for layer in layers if layer.values.grad is not None]
        if not active:
            return None
        scores = _block_scores_of_step(active)
        stats = [layer._probe.grad for layer in active]
        traces = [_fisher_trace(layer) for layer in active]
        finite = all_finite([t for t in (*scores, *stats, *traces) if t is not None])
        update_gradient_emas([layer.scorer for layer in active], scores, finite)
        sampled = [i for i, collected in enumerate(stats) if collected is not None]
        collected = [t for t in stats if t is not None]
        add_sampled_step([active[i].scorer for i in sampled], collected, finite)
        for i, norms_sq in zip(sampled, collected, strict=True):
            trace = traces[i]
            if trace is not None:
                _accumulate_loss(active[i], norms_sq, trace, finite.to(norms_sq.device))
            active[i]._probe.grad = None
        return finite


def _refuse_shards(layer: CMSBlockLinear) -> None:
    """Scores of a shard would be wrong without a word, so say the word."""
    values = layer.values
    # a DTensor has placements; importing its class to ask would cost half a second
    if hasattr(values, "placements") or values.shape != (layer.R, layer.K, layer.B, layer.B):
        raise ValueError(
            f"values (={type(values).__name__}, shape {tuple(values.shape)}) must be the layer's "
            f"whole [R, K, B, B] = [{layer.R}, {layer.K}, {layer.B}, {layer.B}] tensor; topology "
            "under FSDP or tensor parallelism is not supported: use DistributedDataParallel, or "
            "leave the CMSBlockLinear layers out of the sharding."
        )


def _block_scores_of_step(layers: Sequence[CMSBlockLinear]) -> list[Tensor]:
    """float32 [R, K] of each layer."""
    by_norm = [x for x in layers if x.scorer.config.keep_score not in ("taylor", "loss")]
    norms = dict(zip(by_norm, block_norms([_grad(layer) for layer in by_norm]), strict=True))
    return [norms[layer] if layer in norms else _slope(layer) for layer in layers]


def _grad(layer: CMSBlockLinear) -> Tensor:
    assert layer.values.grad is not None
    return layer.values.grad


def _slope(layer: CMSBlockLinear) -> Tensor:
    """<W, G> of every block, without its sign for the "taylor" score: float32 [R, K]."""
    slope = (layer.values.detach() * _grad(layer)).sum((2, 3), dtype=torch.float32)
    return slope.abs() if layer.scorer.config.keep_score == "taylor" else slope


def _fisher_trace(layer: CMSBlockLinear) -> Tensor | None:
    return None if layer._fisher_probe is None else layer._fisher_probe.grad


def _accumulate_loss(
    layer: CMSBlockLinear, collected: Tensor, trace: Tensor, finite: Tensor
) -> None:
    assert layer.scorer.loss is not None
    assert layer._fisher_probe is not None
    norms_sq = collected[layer.R + layer.C :]
    live = layer.col_indices[:, : layer.num_live].long()
    seen = norms_sq.view(layer.R, layer.C).gather(1, live).sum()
    given = _grad(layer).float().square().sum()
    layer.scorer.loss.add(norms_sq, trace, torch.stack((given, seen)), finite)
    layer._fisher_probe.grad = None
