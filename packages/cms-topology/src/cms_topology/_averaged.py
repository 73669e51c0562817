"""Models that average another one's weights, when that one replaces blocks.

Legend: R block rows, K slots per row, k live ones, B tile side.

An average goes slot by slot (`torch.optim.swa_utils.AveragedModel` averages parameters and copies
buffers), so after a swap it would go on with the weights of the block that left, at the place of
the one that came. The average of a replaced block starts afresh with the newcomer instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cms_topology._convert import sparse_layers
from cms_topology._linear import CMSBlockLinear
from cms_topology._result import TopologyDecisionResult


def averaged_layers(
    averaged: nn.Module, layers: Mapping[str, CMSBlockLinear]
) -> dict[str, CMSBlockLinear]:
    """The layers of a model that averages the one with `layers`, by the same names.

    Raises:
        ValueError: it has other ones, or averages columns.
    """
    if getattr(averaged, "use_buffers", False):
        raise ValueError(
            f"averages (={type(averaged).__name__}) must be made with use_buffers=False: the mean "
            "of two columns is none, and even of equal ones it may be rounded to another."
        )
    found = sparse_layers(averaged)
    shapes = {name: tuple(layer.values.shape) for name, layer in layers.items()}
    theirs = {name: tuple(layer.values.shape) for name, layer in found.items()}
    if shapes != theirs:
        raise ValueError(
            f"averages (={type(averaged).__name__}) must have the CMSBlockLinear layers of model, "
            f"by name and shape {shapes}; it has {theirs}. Pass "
            "torch.optim.swa_utils.AveragedModel(model), or a copy of model that is averaged."
        )
    return found


@torch.no_grad()
def restart_averages(
    averaged: Mapping[str, CMSBlockLinear],
    layers: Mapping[str, CMSBlockLinear],
    swaps: Mapping[str, TopologyDecisionResult],
) -> None:
    """Give the replaced blocks of `averaged` the newcomers' columns and weights; in place."""
    for name, result in swaps.items():
        mine, theirs, k = layers[name], averaged[name], result.swapped.shape[1]
        swapped = result.swapped.to(theirs.values.device)[:, :, None, None]
        newborn = mine.values[:, :k].to(theirs.values)
        theirs.values[:, :k] = torch.where(swapped, newborn, theirs.values[:, :k])
        theirs.col_indices.copy_(mine.col_indices)
