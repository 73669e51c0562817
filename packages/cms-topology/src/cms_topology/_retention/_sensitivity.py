"""How much drift a task's own loss bears, measured while its data are still there.

Legend: n inputs, m outputs of a layer; K covariance of its inputs; D relative drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import blockell_format as fmt
from cms_topology import _distributed as dist_sync
from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._names import parameter_names, sparse_by_values

LEVELS = tuple(10.0 ** (e / 2) for e in range(-10, 1))
"""Relative drifts that are tried, 1e-5 to 1."""
DRAWS = 2
ENOUGH_NATS = 1.0
"""Levels beyond a rise of this much are not measured: their rise counts as infinite."""


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    batches: list[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    memory: Consolidation,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Drift levels [levels] and the mean rise of the loss at each [1, levels], float64.

    All weight matrices are moved together by random displacements of relative drift
    D = tr(dW K dW^T) / tr(W K W^T), to either side, then put back to the bit.
    """
    base = _mean_loss(model, batches, loss_of)
    rises = torch.full((DRAWS, len(LEVELS)), torch.inf, dtype=torch.float64, device="cpu")
    for draw in range(DRAWS):
        steps = _unit_displacements(model, memory, generator)
        for i, level in enumerate(LEVELS):
            # both ways, so that the slope cancels: only the curvature is a matter of retention
            rise = -base
            for size in (level**0.5, -(level**0.5)):
                with _displaced(steps, size):
                    rise += 0.5 * _mean_loss(model, batches, loss_of)
            rises[draw, i] = rise
            if not rise < ENOUGH_NATS:
                break
    mean = rises.mean(0).nan_to_num(nan=torch.inf, posinf=1e6)
    return torch.tensor(LEVELS, dtype=torch.float64, device="cpu"), mean[None]


def _mean_loss(
    model: nn.Module, batches: list[Any], loss_of: Callable[[nn.Module, Any], Tensor]
) -> float:
    losses = [loss_of(model, batch).detach().double().reshape(()) for batch in batches]
    total = torch.stack(losses).mean()
    if dist_sync.world_size() > 1:
        dist.all_reduce(total)
        total /= dist_sync.world_size()
    return float(total)


def _unit_displacements(
    model: nn.Module, memory: Consolidation, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Per weight matrix a random displacement with D = 1, on the present blocks."""
    names = parameter_names(model)
    sparse = sparse_by_values(model)
    steps = []
    for parameter, name in names.items():
        if name not in memory.layers:
            continue
        weight = parameter.detach()
        step = torch.randn(weight.shape, generator=generator, device=generator.device).to(weight)
        layer = sparse.get(parameter)
        if layer is not None:
            step[:, layer.num_live :] = 0
        K = memory.layers[name].covariance.dense()
        there, moved = (
            _energy(
                memory.layers[name].layout.matrices(t) if layer is None else _dense(t, layer), K
            )
            for t in (weight, step)
        )
        if there > 0 and moved > 0:
            steps.append((weight, step * (there / moved).sqrt().to(step)))
    return steps


def _dense(values: Tensor, layer: CMSBlockLinear) -> Tensor:
    live = layer.num_live
    columns = layer.col_indices[:, :live]
    return fmt.to_dense(values[:, :live], columns, layer.R, layer.C, live, layer.B)


def _energy(W: Tensor, K: Tensor) -> Tensor:
    wide = W.double()
    return (wide @ K * wide).sum()


@contextmanager
def _displaced(steps: list[tuple[Tensor, Tensor]], size: float) -> Iterator[None]:
    originals = [weight.clone() for weight, _ in steps]
    try:
        for weight, step in steps:
            weight.add_(step, alpha=size)
        yield
    finally:
        for (weight, _), original in zip(steps, originals, strict=True):
            weight.copy_(original)
