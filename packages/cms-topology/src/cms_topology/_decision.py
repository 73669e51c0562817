"""A decision about layers of one shape, all of them in the same launches.

Legend: L layers, R block rows, C block columns, K slots per row, k live ones, B tile side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cms_topology._birth import write_newborn_values
from cms_topology._result import TopologyDecisionResult
from cms_topology._scores import record_swaps, select_swaps

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear
    from cms_topology._swap_retention import SwapRetention


def decide_all(
    layers: Mapping[str, CMSBlockLinear],
    generators: Mapping[str, torch.Generator],
    global_step: int,
    retention: Mapping[str, SwapRetention],
) -> dict[str, TopologyDecisionResult]:
    """`decide` for layers of any shapes, by name; those under retention one by one."""
    results = {
        name: layers[name]._decide(generators[name], global_step, rule)
        for name, rule in retention.items()
    }
    free = [name for name in layers if name not in retention]
    for members in alike(layers[name] for name in free):
        names = [free[i] for i in members]
        decided = decide([layers[n] for n in names], [generators[n] for n in names], global_step)
        results.update(zip(names, decided, strict=True))
    return {name: results[name] for name in layers}


def unchanged(layer: CMSBlockLinear, global_step: int | None) -> TopologyDecisionResult:
    """The result of a decision that a layer takes no part in."""
    columns = layer.col_indices[:, : layer.num_live].clone()
    nothing = torch.zeros_like(columns, dtype=torch.bool)
    return TopologyDecisionResult(nothing, columns, columns, global_step)


def alike(layers: Iterable[CMSBlockLinear]) -> list[list[int]]:
    """Positions of the layers that `decide` takes together."""
    found: dict[object, list[int]] = {}
    for position, layer in enumerate(layers):
        key: object = (
            *(layer.R, layer.C, layer.K, layer.B, layer.num_live, layer.row_group),
            *(layer.scorer.config, layer.values.device, layer.values.dtype),
        )
        # scores in nats are made layer by layer
        found.setdefault(key if layer.scorer.loss is None else position, []).append(position)
    return list(found.values())


@torch.no_grad()
def decide(
    layers: Sequence[CMSBlockLinear],
    generators: Sequence[torch.Generator],
    global_step: int | None,
    *,
    locked: Tensor | None = None,
    cost: Tensor | None = None,
    zero_birth: bool = False,
) -> list[TopologyDecisionResult]:
    """Replace weak blocks by promising absent ones, in place; see `CMSBlockLinear.topology_step`.

    Args:
        layers: such as `alike` puts together, statistics folded.
        generators: source of exploration and new weights, one for each layer.
        global_step: recorded in the results.
        locked, cost: as in `select_swaps`.
        zero_birth: newborn blocks start at zero, whatever the settings.
    """
    one = layers[0]
    config, k = one.scorer.config, one.num_live
    scorers, values = [layer.scorer for layer in layers], [layer.values for layer in layers]
    before = torch.stack([layer.col_indices[:, :k] for layer in layers])
    selection, candidates = select_swaps(
        scorers,
        values,
        before,
        row_group=one.row_group,
        generators=generators,
        locked=locked,
        cost=cost,
    )
    write_newborn_values(
        values,
        selection.swapped,
        max_swaps=selection.max_swaps,
        scale=0.0 if zero_birth or config.birth == "zeros" else config.birth_scale,
        fan_in=k * one.B,
        generators=generators,
    )
    after = selection.columns
    torch._foreach_copy_([layer.col_indices[:, :k] for layer in layers], after.unbind())
    record_swaps(scorers, selection.swapped, candidates.gather(2, after.long()))
    refresh_derived(layers)
    return [
        TopologyDecisionResult(*of_layer, global_step)
        for of_layer in zip(selection.swapped, before, after, strict=True)
    ]


def refresh_derived(layers: Sequence[CMSBlockLinear]) -> None:
    """Rebuild the transposed indices in place, so that compiled graphs see it.

    Shapes as in `decide`; `blockell_format.transposed_index` is the same for one layer.
    """
    C = layers[0].C
    columns = torch.stack([layer.col_indices for layer in layers]).flatten(1)
    ordered, order = columns.masked_fill(columns < 0, C).sort(dim=1, stable=True)
    edges = torch.arange(C + 1, dtype=ordered.dtype, device=ordered.device)
    starts = torch.searchsorted(ordered, edges.expand(len(layers), -1).contiguous(), out_int32=True)
    torch._foreach_copy_([layer._index.order for layer in layers], order.int().unbind())
    torch._foreach_copy_([layer._index.col_start for layer in layers], starts.unbind())
    for layer in layers:
        layer._mark_derived()
