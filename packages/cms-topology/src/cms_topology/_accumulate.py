"""Level 0 of the clock: what one optimizer step tells about the blocks.

Legend: R block rows, C block columns, K slots per row, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cms_topology._scorer import (
    all_finite,
    compute_gradient_frobenius_norms,
    update_gradient_emas,
)

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
        scores = [_block_scores_of_step(layer) for layer in active]
        stats = [layer._probe.grad for layer in active]
        traces = [_fisher_trace(layer) for layer in active]
        finite = all_finite([t for t in (*scores, *stats, *traces) if t is not None])
        update_gradient_emas([layer.scorer for layer in active], scores, finite)
        for layer, collected, trace in zip(active, stats, traces, strict=True):
            if collected is not None:
                here = finite.to(collected.device)
                layer.scorer.accumulate_statistics(collected, here)
                if trace is not None:
                    _accumulate_loss(layer, collected, trace, here)
                layer._probe.grad = None
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


def _block_scores_of_step(layer: CMSBlockLinear) -> Tensor:
    grad = layer.values.grad
    assert grad is not None
    if layer.scorer.config.keep_score in ("taylor", "loss"):
        slope = (layer.values.detach() * grad).sum((2, 3), dtype=torch.float32)
        return slope.abs() if layer.scorer.config.keep_score == "taylor" else slope
    return compute_gradient_frobenius_norms(grad)


def _fisher_trace(layer: CMSBlockLinear) -> Tensor | None:
    return None if layer._fisher_probe is None else layer._fisher_probe.grad


def _accumulate_loss(
    layer: CMSBlockLinear, collected: Tensor, trace: Tensor, finite: Tensor
) -> None:
    assert layer.scorer.loss is not None
    assert layer._fisher_probe is not None
    assert layer.values.grad is not None
    norms_sq = collected[layer.R + layer.C :]
    live = layer.col_indices[:, : layer.num_live].long()
    seen = norms_sq.view(layer.R, layer.C).gather(1, live).sum()
    given = layer.values.grad.float().square().sum()
    layer.scorer.loss.add(norms_sq, trace, torch.stack((given, seen)), finite)
    layer._fisher_probe.grad = None
