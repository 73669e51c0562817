"""What a decision leaves behind: digests, metrics, snapshots.

Legend: R block rows, K slots per row, k live ones, B tile side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

import blockell_format as fmt
from blockell_format.snapshots import LayerSnapshot
from cms_topology._result import TopologyDecisionResult, count_swaps
from cms_topology._scorer import compute_column_entropy

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear

Layers = Mapping[str, "CMSBlockLinear"]
Swaps = Mapping[str, TopologyDecisionResult]


def swap_rate(swaps: Swaps) -> float:
    """Share of all live blocks of these layers that were swapped."""
    blocks = sum(result.swapped.numel() for result in swaps.values())
    count_swaps(swaps.values())
    return sum(result.num_swaps for result in swaps.values()) / blocks


def digests(layers: Layers, swaps: Swaps) -> list[str]:
    """Digests of indices, ages and newborn weights, in the order of `swaps`."""
    found = []
    for name, result in swaps.items():
        layer = layers[name]
        newborn = layer.values.detach()[:, : layer.num_live][result.swapped]
        found.append(
            fmt.topology_checksum(
                layer.col_indices.cpu().numpy(),
                layer.scorer.block_age.cpu().numpy(),
                newborn.float().cpu().numpy(),
            )
        )
    return found


def decision_metrics(layers: Layers, swaps: Swaps) -> dict[str, float]:
    """Swap rate and column entropy, of every layer and of all."""
    metrics = {"topology/swap_rate": swap_rate(swaps)}
    for name, result in swaps.items():
        layer = layers[name]
        entropy = float(compute_column_entropy(layer.col_indices, layer.C))
        metrics[f"topology/{name}/swap_rate"] = result.swap_rate
        metrics[f"topology/{name}/column_entropy"] = entropy
    entropies = [v for k, v in metrics.items() if k.endswith("/column_entropy")]
    metrics["topology/column_entropy"] = sum(entropies) / len(entropies)
    return metrics


def layer_snapshot(layer: CMSBlockLinear, result: TopologyDecisionResult | None) -> LayerSnapshot:
    """Topology, ages and scores, with what `result` (if any) changed."""
    columns = layer.col_indices.cpu().numpy()
    score = layer.scorer.present_scores(layer.values.detach(), layer.col_indices).nan_to_num(0.0)
    swapped = torch.zeros(layer.R, layer.K, dtype=torch.bool, device="cpu")
    previous = layer.col_indices.cpu().clone()
    if result is not None:
        live = result.swapped.shape[1]
        swapped[:, :live] = result.swapped.cpu()
        previous[:, :live] = result.old_columns.cpu()
    return LayerSnapshot(
        col_indices=columns,
        block_age_steps=layer.scorer.block_age.cpu().numpy(),
        block_score=score.cpu().numpy(),
        swapped=swapped.numpy(),
        previous_columns=previous.numpy(),
    )
