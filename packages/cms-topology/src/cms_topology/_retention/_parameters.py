"""What becomes of each parameter of a model under retention."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._names import parameter_names, sparse_by_values
from cms_topology._retention._still import StillParameters
from cms_topology._retention._units import ProtectedWeight


def sort_parameters(
    model: nn.Module, memory: Consolidation
) -> tuple[list[ProtectedWeight], list[ProtectedWeight], StillParameters]:
    """Which parameters are projected, which would be if they were not frozen, and which stay.

    Raises:
        ValueError: the memory is that of another model, or a parameter is sharded.
    """
    names = parameter_names(model)
    missing = sorted((set(memory.layers) | set(memory.rows)) - set(names.values()))
    if missing:
        raise ValueError(
            f"memory (of tasks {memory.tasks}) must fit the model: it has no parameter "
            f"{missing[0]!r}; pass the model that was consolidated, or one built like it."
        )
    sparse = sparse_by_values(model)
    weights: list[ProtectedWeight] = []
    frozen: list[ProtectedWeight] = []
    still = StillParameters()
    for parameter, name in names.items():
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{name} (={type(parameter).__name__}) must not be sharded: retention under FSDP "
                "or tensor parallelism is not supported; use DistributedDataParallel."
            )
        if name in memory.unseen:
            still.add(name, parameter)
            continue
        used = memory.rows.get(name)
        indices = None if used is None else used.nonzero()[:, 0].to(parameter.device)
        if indices is not None:
            still.add(name, parameter, indices)
        if name in memory.layers:
            weight = ProtectedWeight(
                name, parameter, memory.layers[name], sparse.get(parameter), indices
            )
            if not _fits(weight):
                raise ValueError(
                    f"memory of {name} (={weight.memory.covariance.n} inputs) must fit the layer "
                    f"(={_inputs(weight)} inputs); pass the model that was consolidated."
                )
            # blocks may come and go although none is trained
            idle = not parameter.requires_grad and weight.layer is None
            (frozen if idle else weights).append(weight)
        elif indices is None and (memory.touched is None or name in memory.touched):
            still.add(name, parameter)
    return weights, frozen, still


def _fits(weight: ProtectedWeight) -> bool:
    whole = weight.layer is not None or math.prod(weight.shape) == weight.parameter.numel()
    if weight.memory.stacked:
        whole = whole and len(weight.parameter) == weight.memory.covariance.groups
    return whole and weight.memory.covariance.n == _inputs(weight)


def _inputs(weight: ProtectedWeight) -> int:
    layer = weight.layer
    return weight.shape[2] if layer is None else layer.in_features


def by_shape(weights: list[ProtectedWeight]) -> list[list[ProtectedWeight]]:
    """Weight matrices that can be stacked."""
    groups: dict[Any, list[ProtectedWeight]] = {}
    for weight in weights:
        key = (weight.shape, weight.parameter.dtype, weight.parameter.device)
        groups.setdefault(key, []).append(weight)
    return list(groups.values())
