"""Level 0 of the clock: what one optimizer step tells about the blocks.

Legend: R block rows, C block columns, K slots per row, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cms_topology._averages import update_averages
from cms_topology._blocks import all_finite, all_of, finite_block_norms
from cms_topology._sampled import add_sampled_step

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


def accumulate_scores(layers: Sequence[CMSBlockLinear]) -> Tensor | None:
    """Level 0 for many layers in few launches; returns a 0-d bool, False if the step was skipped.

    Takes the gradients of `values` and the statistics of absent blocks collected since the last
    call. A step in which any of them is not finite contributes nothing to any layer. Layers without
    a gradient (frozen, or not used in this step) are left out; None if that is all of them. Layers
    that no manager has collect statistics from the first call on.

    Raises:
        ValueError: the parameters are sharded (FSDP, tensor parallelism), pruned or parametrised.
    """
    active = []
    for layer in layers:
        refuse_foreign_values(layer)
        if layer._clock is None:  # no manager decides when to collect
            layer._clock = "by hand"
            layer.collect_candidates = True
        if layer.values.grad is not None:
            active.append(layer)
    if not active:
        return None
    with torch.no_grad():
        scores, finite = _block_scores_of_step(active)
        sampled = [layer for layer in active if layer._probe.grad is not None]
        if sampled:
            finite = all_of((finite, all_finite(_collected(sampled))))
        update_averages([layer.scorer for layer in active], scores, finite)
        if sampled:
            _accumulate_sampled(sampled, finite)
        return finite


def _collected(layers: Sequence[CMSBlockLinear]) -> list[Tensor]:
    """Everything that the layers' backward passes left about absent blocks."""
    found = [
        p.grad for layer in layers for p in (layer._probe, layer._fisher_probe) if p is not None
    ]
    return [gradient for gradient in found if gradient is not None]


def _accumulate_sampled(layers: Sequence[CMSBlockLinear], finite: Tensor) -> None:
    stats = [layer._probe.grad for layer in layers]
    found = [norms_sq for norms_sq in stats if norms_sq is not None]
    add_sampled_step([layer.scorer for layer in layers], found, finite)
    for layer, norms_sq in zip(layers, found, strict=True):
        if layer._fisher_probe is not None and layer._fisher_probe.grad is not None:
            trace = layer._fisher_probe.grad
            _accumulate_loss(layer, norms_sq, trace, finite.to(norms_sq.device))
        layer._probe.grad = None


def refuse_foreign_values(layer: CMSBlockLinear) -> None:
    """Scores of a shard, or of a product with a mask, would be wrong without a word: say the word.

    Raises:
        ValueError: `values` is not the layer's own whole parameter.
    """
    if "values" not in layer._parameters:
        raise ValueError(
            f"values (={type(layer.values).__name__}, made of other parameters) must be the "
            "layer's own parameter while a TopologyManager moves its blocks: make what prunes or "
            "reparametrises it permanent first, for example by torch.nn.utils.prune.remove(layer, "
            '"values"), and use DistributedDataParallel in place of FSDP.'
        )
    values = layer.values
    # a DTensor has placements; importing its class to ask would cost half a second
    whole = type(values) is nn.Parameter or not hasattr(values, "placements")
    if not whole or values.shape != (layer.R, layer.K, layer.B, layer.B):
        raise ValueError(
            f"values (={type(values).__name__}, shape {tuple(values.shape)}) must be the layer's "
            f"whole [R, K, B, B] = [{layer.R}, {layer.K}, {layer.B}, {layer.B}] tensor; topology "
            "under FSDP or tensor parallelism is not supported: use DistributedDataParallel, or "
            "leave these layers out of the sharding (fully_shard(..., ignored_params=...)) and "
            "average their gradients over the ranks."
        )


def refuse_replica(layer: CMSBlockLinear) -> None:
    """What replicas of `nn.DataParallel` collect would be lost, and each looks up columns anew.

    Raises:
        ValueError: `layer` is such a replica and is being trained.
    """
    if getattr(layer, "_is_replica", False) and torch.is_grad_enabled():
        raise ValueError(
            "a CMSBlockLinear cannot be trained under nn.DataParallel (only evaluated, without "
            "gradients): use DistributedDataParallel, one process per device."
        )


def refuse_shards(layer: CMSBlockLinear) -> None:
    """A part of the weight would become a wrong dense one, or end in an error of torch's.

    Raises:
        ValueError: `values` is not whole.
    """
    values, whole = layer.values, (layer.R, layer.K, layer.B, layer.B)
    if hasattr(values, "placements") or values.shape != whole:
        raise ValueError(
            f"values (={type(values).__name__}, shape {tuple(values.shape)}) must be the layer's "
            f"whole [R, K, B, B] = {list(whole)} tensor to become dense: load what "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict returns with "
            "full_state_dict=True into a model that is not sharded, and make that dense."
        )


def _block_scores_of_step(layers: Sequence[CMSBlockLinear]) -> tuple[list[Tensor], Tensor]:
    """float32 [R, K] of each layer, and whether all of them are finite, a 0-d bool."""
    sloped = {x: _slope(x) for x in layers if x.scorer.config.keep_score in ("taylor", "loss")}
    rest = [layer for layer in layers if layer not in sloped]
    verdicts = [all_finite(list(sloped.values()))] if sloped else []
    scores = sloped
    if rest:
        norms, finite = finite_block_norms([_grad(layer) for layer in rest])
        scores |= dict(zip(rest, norms, strict=True))
        verdicts.append(finite)
    return [scores[layer] for layer in layers], all_of(verdicts)


def _grad(layer: CMSBlockLinear) -> Tensor:
    assert layer.values.grad is not None
    return layer.values.grad


def _slope(layer: CMSBlockLinear) -> Tensor:
    """<W, G> of every block, without its sign for the "taylor" score: float32 [R, K]."""
    slope = (layer.values.detach() * _grad(layer)).sum((2, 3), dtype=torch.float32)
    return slope.abs() if layer.scorer.config.keep_score == "taylor" else slope


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
