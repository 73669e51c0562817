"""Several runs side by side: what they reached, and in which settings they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .io import LoadedRun
from .tables import Table

__all__ = ["common_metrics", "config_differences", "run_table", "series_table"]

MAX_DEPTH = 8
"""Levels of a configuration that are told apart; what lies deeper is compared as text."""
MAX_TEXT = 60
"""Characters shown of a setting."""

Series = tuple[str, NDArray[Any], NDArray[Any]]
"""Name of a run, its steps [S], its values [S]."""


def run_table(runs: Mapping[str, LoadedRun], metric: str | None) -> Table:
    """One line per run: how far it is, its density and swap rates, and a metric.

    Args:
        runs: by name.
        metric: its last and lowest finite value are listed; None for no metric.
    """
    rows = []
    for name, loaded in runs.items():
        history, layers = loaded.history(), loaded.run.layers.values()
        rates = history.pooled_rates()
        known = rates[np.isfinite(rates) & ~history.still]
        positions = sum(info.R * info.C for info in layers)
        blocks = int(history.blocks[-1].sum()) if len(history.steps) else 0
        row: dict[str, Any] = {
            "run": name,
            "newest_step": loaded.newest_step,
            "snapshots": len(history.steps),
            "layers": len(layers),
            "blocks": blocks,
            "density": blocks / positions if positions and blocks else np.nan,
            "mean_swap_rate": float(known.mean()) if known.size else np.nan,
            "decisions": int((~history.still).sum()),
            "outside_band": int(history.pooled_outside().sum()),
            "problems": len(loaded.run.problems),
        }
        if metric is not None:
            _, values = loaded.metrics().get(metric)
            finite = values[np.isfinite(values)]
            row[f"last {metric}"] = float(values[-1]) if len(values) else np.nan
            row[f"lowest {metric}"] = float(finite.min()) if finite.size else np.nan
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}


def common_metrics(runs: Sequence[LoadedRun]) -> list[str]:
    """Names of the metrics of any of the runs; those that more runs have come first."""
    counts: dict[str, int] = {}
    for loaded in runs:
        for name in loaded.metrics().names:
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: -counts[name])


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """The settings in which runs differ: a line per setting, a column per run.

    Nested settings have dotted names; a run without a setting has an empty field.
    """
    flat = {name: dict(_leaves("", config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    different = [key for key in keys if len({leaves.get(key, "") for leaves in flat.values()}) > 1]
    return {
        "setting": different,
        **{
            name: [_shortened(leaves.get(key, "")) for key in different]
            for name, leaves in flat.items()
        },
    }


def _leaves(prefix: str, value: Any, depth: int = 0) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and (depth == 0 or (value and depth < MAX_DEPTH)):
        return [
            leaf
            for key, inner in value.items()
            for leaf in _leaves(f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        ]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, default=str))]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def series_table(series: Sequence[Series], value: str) -> Table:
    """The points of several runs' lines, one line each."""
    return {
        "run": [name for name, steps, _ in series for _ in range(len(steps))],
        "step": np.concatenate([steps for _, steps, _ in series] or [np.empty(0)]).astype(np.int64),
        value: np.concatenate([values for _, _, values in series] or [np.empty(0)]),
    }
