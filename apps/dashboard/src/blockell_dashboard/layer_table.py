"""All layers of a run at one step, a line each."""

from __future__ import annotations

from typing import Any

import numpy as np

from .io import LoadedRun
from .layers import layer_order
from .series import summarise
from .tables import Table
from .tasks import birth_tasks

__all__ = ["layer_table"]


def layer_table(loaded: LoadedRun, step: int) -> Table:
    """What is known of every layer at one recorded step.

    Swap rates are of the whole run but for `swap_rate`, which is of this decision. Where the run
    states several tasks, a column for each counts the live blocks born in its training. A layer
    that cannot be read at this step has NaN where a number is missing.
    """
    history, spans = loaded.history(), loaded.spans
    at = int(np.searchsorted(history.steps, step))
    rows = []
    for info in sorted(loaded.run.layers.values(), key=lambda info: layer_order(info.name)):
        number = history.names.index(info.name)
        rates = history.rates(info.name)
        known = rates[np.isfinite(rates)]
        row: dict[str, Any] = {
            "layer": info.name,
            "rows": info.R,
            "columns": info.C,
            "tile": info.B,
            "blocks": int(history.blocks[at, number]),
            "density": float(history.blocks[at, number]) / (info.R * info.C),
            "swapped": int(history.swaps[at, number]),
            "swap_rate": float(rates[at]),
            "mean_swap_rate": float(known.mean()) if known.size else np.nan,
            "outside_band": int(history.outside(info.name).sum()),
        }
        row |= _at_step(loaded, info.name, info.C, step)
        rows.append(row)
    names = [*rows[0]] if rows else []
    if spans and rows:
        names = max(([*row] for row in rows), key=len)
    return {name: [row.get(name, np.nan) for row in rows] for name in names}


def _at_step(loaded: LoadedRun, name: str, C: int, step: int) -> dict[str, Any]:
    """What has to be read from the layer's arrays."""
    fields = ("column_entropy", "unused_columns", "median_age_steps", "p90_age_steps")
    try:
        layer = loaded.snapshot(name, step)
    except ValueError:  # the reader lists it among the problems
        return dict.fromkeys(fields, np.nan)
    found: dict[str, Any] = dict(zip(fields, summarise(layer, C)[:4], strict=True))
    if loaded.spans:
        live = layer.block_age_steps[layer.col_indices >= 0]
        counts = np.bincount(
            birth_tasks(live, step, loaded.spans), minlength=len(loaded.spans)
        ).tolist()
        for number, (span, count) in enumerate(zip(loaded.spans, counts, strict=True), 1):
            found[f"born_in_{number}_{span.name}"] = count
    return found
