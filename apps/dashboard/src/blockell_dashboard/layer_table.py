"""All layers of a run at one step, a line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from blockell_format.snapshots import LayerInfo, LayerSnapshot

from .io import LoadedRun
from .layers import layer_order
from .series import summarise
from .tables import Table
from .tasks import TaskSpan, birth_tasks

__all__ = ["layer_table"]

_SUMMARY = ("column_entropy", "unused_columns", "median_age_steps", "p90_age_steps")
"""The first of what `summarise` gives."""


def layer_table(loaded: LoadedRun, step: int, infos: Iterable[LayerInfo] | None = None) -> Table:
    """What is known of every layer, or of those given, at one recorded step.

    Swap rates are of the whole run but for `swap_rate`, which is of this decision. Where the run
    states several tasks, a column for each counts the live blocks born in its training. A layer
    that cannot be read at this step has NaN where a number is missing.
    """
    history, spans = loaded.history(), loaded.spans
    at = int(np.searchsorted(history.steps, step))
    rows = []
    chosen = loaded.run.layers.values() if infos is None else infos
    for info in sorted(chosen, key=lambda info: layer_order(info.name)):
        number = history.names.index(info.name)
        blocks = int(history.blocks[at, number])
        rates = history.rates(info.name)
        known = rates[np.isfinite(rates) & ~history.still]
        try:
            layer = loaded.snapshot(info.name, step)
        except ValueError:  # the reader lists it among the problems
            layer = None
        summary = (np.nan,) * 4 if layer is None else summarise(layer, info.C)[:4]
        born = _born(layer, step, spans)
        rows.append(
            {
                "layer": info.name,
                "rows": info.R,
                "columns": info.C,
                "tile": info.B,
                "blocks": blocks,
                "density": blocks / (info.R * info.C),
                **{f"born_in_{i}_{span.name}": born[i - 1] for i, span in enumerate(spans, 1)},
                "swapped": int(history.swaps[at, number]),
                "swap_rate": float(rates[at]),
                "mean_swap_rate": float(known.mean()) if known.size else np.nan,
                "outside_band": int(history.outside(info.name).sum()),
                **dict(zip(_SUMMARY, summary, strict=True)),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _born(layer: LayerSnapshot | None, step: int, spans: Sequence[TaskSpan]) -> list[float]:
    """Live blocks per training in which they were born; NaN where the layer cannot be read."""
    if layer is None or not spans:
        return [np.nan] * len(spans)
    ages = layer.block_age_steps[layer.col_indices >= 0]
    return np.bincount(birth_tasks(ages, step, spans), minlength=len(spans)).tolist()
