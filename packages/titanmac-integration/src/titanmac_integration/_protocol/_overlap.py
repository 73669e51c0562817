"""How far two tasks use, and change, the same blocks.

Legend: R block rows, C block columns, K live blocks per row.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology import consolidate, sparse_layers

from ._method import Sampling, device_of, task_batches
from ._score import RetentionTask

SHARE = 0.5
"""Share of a layer's live blocks that counts as the used (or changed) ones: the top half."""
BATCHES = 8


def usage_of(model: nn.Module, task: RetentionTask, sampling: Sampling) -> dict[str, Tensor]:
    """Per block-sparse layer how much the task's loss depends on each block, [R, C].

    The sum over tokens of the squared norm of the block's gradient, whether it is live or not.
    """
    batches = task_batches(task, sampling, BATCHES, device_of(model))
    memory = consolidate(model, batches, task=task.name, sensitivity_batches=0)
    usage = {}
    for name in sparse_layers(model):
        kept = memory.layers[f"{name}.values"].usage
        assert kept is not None
        usage[name] = kept.detach().float()
    return usage


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Dense copies of the block-sparse weights."""
    return {name: layer.to_dense().detach() for name, layer in sparse_layers(model).items()}


def block_overlap(
    model: nn.Module,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    before: dict[str, Tensor],
) -> dict[str, Any]:
    """Overlap |A and B| / |A or B| of the first task's top half of blocks with the second's.

    Means over layers. By chance two random halves overlap by d / (2 - d) = 1/3; in the control the
    second task's blocks are shuffled within every row.

    Args:
        model: after the second task.
        first, second: from :func:`usage_of`, after the first and after the second task.
        before: from :func:`weights_of`, after the first task.

    Returns:
        "used" (by both), "changed" (used by the first, changed most by the second), each with its
        "_shuffled" control, and "chance".
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for name, layer in sparse_layers(model).items():
        columns = layer.col_indices[:, : layer.num_live].long()
        moved = (layer.to_dense().detach() - before[name]).view(layer.R, layer.B, layer.C, layer.B)
        changed = moved.square().sum((1, 3))
        old = _top(first[name].to(columns.device).gather(1, columns))
        for what, values in (("used", second[name].to(columns.device)), ("changed", changed)):
            new = _top(values.gather(1, columns))
            found.setdefault(what, []).append(_jaccard(old, new))
            order = torch.rand(new.shape, generator=generator).argsort(1).to(new.device)
            shuffled = new.gather(1, order)
            found.setdefault(f"{what}_shuffled", []).append(_jaccard(old, shuffled))
    return {
        **{what: fmean(values) for what, values in found.items()},
        "chance": SHARE / (2 - SHARE),
    }


def _top(values: Tensor) -> Tensor:
    """bool [R, K]: the largest share of a layer's values."""
    flat = values.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(SHARE * len(flat)))).indices] = True
    return mask.view_as(values)


def _jaccard(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())
