"""What the optimizer tells its logger at the slow level of the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cms_topology import compute_column_entropy

from ._report import OptimizerReport

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


def topology_metrics(optimizer: DeepNestedOptimizer, report: OptimizerReport) -> dict[str, float]:
    """Metrics of one level-2 step, by name.

    Of the topology, in all and per layer: swap rate of this decision (and its rolling mean),
    column entropy, mean block age in steps. Of the losses: the largest ratio to the running mean
    after the last decision that has been watched, and the number of spikes. Of the nested parts:
    the controller's factor and the inner loss of deep momentum, per group.
    """
    metrics: dict[str, float] = {}
    if report.swaps:
        _add_topology(metrics, optimizer, report)
    if optimizer.spikes.running_mean is not None:
        metrics["optimizer/loss_mean"] = optimizer.spikes.running_mean
        metrics["topology/loss_spikes"] = float(len(optimizer.spikes.spikes))
    if optimizer.spikes.ratios:
        metrics["topology/loss_ratio"] = optimizer.spikes.ratios[-1][1]
    if report.lr_factors is not None:
        for index, factor in enumerate(report.lr_factors):
            metrics[f"optimizer/lr_factor/{index}"] = factor
    if optimizer.deep_momentum is not None:
        for index, loss in enumerate(optimizer.deep_momentum.inner_losses):
            if loss is not None:
                metrics[f"optimizer/inner_loss/{index}"] = float(loss)
    return metrics


def _add_topology(
    metrics: dict[str, float], optimizer: DeepNestedOptimizer, report: OptimizerReport
) -> None:
    assert optimizer.topology is not None
    layers = optimizer.topology.layers
    keys = ("swap_rate", "column_entropy", "block_age_steps")
    rows = []
    for name, result in report.swaps.items():
        layer = layers[name]
        entropy = compute_column_entropy(layer.col_indices, layer.C)
        age = layer.scorer.block_age[:, : layer.num_live].float().mean()
        swapped = result.swapped.float().mean()
        rows.append(torch.stack([t.to(swapped.device).float() for t in (swapped, entropy, age)]))
    # one transfer for all layers
    for name, values in zip(report.swaps, torch.stack(rows).tolist(), strict=True):
        for key, value in zip(keys, values, strict=True):
            metrics[f"topology/{name}/{key}"] = value
    for key in ("column_entropy", "block_age_steps"):
        found = [v for k, v in metrics.items() if k.endswith("/" + key)]
        metrics[f"topology/{key}"] = sum(found) / len(found)
    assert report.swap_rate is not None
    metrics["topology/swap_rate"] = report.swap_rate
    if report.rolling_swap_rate is not None:
        metrics["topology/rolling_swap_rate"] = report.rolling_swap_rate
