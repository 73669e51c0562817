"""Charts over training steps: swap rate, column entropy, loss."""

from __future__ import annotations

import numpy as np
import streamlit as st

from blockell_format.snapshots import LayerInfo

from .. import figures
from ..io import LoadedRun, RunChoice
from ..layers import layer_label
from ..series import is_loss
from ._chart import chart_card, page_theme
from ._state import choose

__all__ = ["show_history"]


def show_history(
    choice: RunChoice, loaded: LoadedRun, info: LayerInfo | None, step: int | None
) -> None:
    """Show the run over time, with the selected step marked."""
    has_metrics = bool(loaded.metrics().names)
    if len(loaded.history().steps) == 0 and not has_metrics:
        return
    st.subheader("Over time", anchor=False)
    if info is not None and len(loaded.history().steps):
        left, right = st.columns(2)
        with left:
            _swap_rate_card(choice, loaded, info, step)
        with right:
            _entropy_card(choice, loaded, info, step)
        if (np.diff(loaded.history().blocks, axis=0) != 0).any():
            _density_card(choice, loaded, info, step)
    if has_metrics:
        _metric_card(choice, loaded, step)
    else:
        st.caption("No metrics were logged, so there is no loss to show.")


def _swap_rate_card(
    choice: RunChoice, loaded: LoadedRun, info: LayerInfo, step: int | None
) -> None:
    history = loaded.history()
    rates, pooled = history.rates(info.name), history.pooled_rates()
    several = len(history.names) > 1
    outside = int(history.outside(info.name).sum())
    column = history.names.index(info.name)
    chart_card(
        figures.swap_rate(
            history.steps,
            rates,
            name=layer_label(info.name),
            all_steps=history.steps if several else np.empty(0),
            all_rates=pooled if several else np.empty(0),
            still=history.still,
            spans=loaded.spans,
            selected_step=step,
            theme=page_theme(),
        ),
        lambda: {
            "step": history.steps,
            "swapped_blocks": history.swaps[:, column],
            "blocks": history.blocks[:, column],
            "swap_rate": rates,
            "swap_rate_all_layers": pooled,
        },
        key="swaps",
        name=(choice.label, info.name),
        alt=(
            f"Swap rate of layer {info.name} over {len(rates)} decisions; {outside} of them "
            "outside the band of 1 to 10 percent."
        ),
    )


def _entropy_card(choice: RunChoice, loaded: LoadedRun, info: LayerInfo, step: int | None) -> None:
    series = loaded.series(info.name)
    now = f"{series.entropy[-1]:.3f}" if len(series.entropy) else "unknown"
    chart_card(
        figures.column_entropy(
            series.steps,
            series.entropy,
            series.dead_columns,
            C=info.C,
            name=layer_label(info.name),
            spans=loaded.spans,
            selected_step=step,
            theme=page_theme(),
        ),
        lambda: {
            "step": series.steps,
            "column_entropy": series.entropy,
            "unused_columns": series.dead_columns,
            "median_age_steps": series.median_age,
            "p90_age_steps": series.p90_age,
        },
        key="entropy",
        name=(choice.label, info.name),
        alt=f"Normalised column entropy of layer {info.name} over time, now {now}.",
    )
    if series.sampled:
        st.caption(f"Read at {len(series.steps):,} evenly spread steps of this long run.")


def _density_card(choice: RunChoice, loaded: LoadedRun, info: LayerInfo, step: int | None) -> None:
    """Only runs that grow have it: in others the tile at the top says all."""
    history, layers = loaded.history(), loaded.run.layers
    blocks = history.blocks[:, history.names.index(info.name)]
    shares = history.density(info)
    pooled = history.blocks.sum(axis=1) / sum(other.R * other.C for other in layers.values())
    chart_card(
        figures.density(
            history.steps,
            shares,
            name=layer_label(info.name),
            all_shares=pooled if len(layers) > 1 else np.empty(0),
            spans=loaded.spans,
            selected_step=step,
            theme=page_theme(),
        ),
        lambda: {
            "step": history.steps,
            "blocks": blocks,
            "density": shares,
            "density_all_layers": pooled,
        },
        key="density",
        name=(choice.label, info.name),
        alt=f"Density of layer {info.name} over time, from {shares[0]:.1%} to {shares[-1]:.1%}.",
    )


def _metric_card(choice: RunChoice, loaded: LoadedRun, step: int | None) -> None:
    metrics, history = loaded.metrics(), loaded.history()
    names = metrics.names
    choose("metric", names, names[0])
    name = st.selectbox("Training metric", names, key="metric", width=320)
    steps, values = metrics.get(name)
    swapped = history.steps[history.swaps.sum(axis=1) > 0]
    chart_card(
        figures.loss(
            steps,
            values,
            name=name,
            decision_steps=swapped,
            alarms=is_loss(name),
            spans=loaded.spans,
            selected_step=step,
            theme=page_theme(),
        ),
        lambda: {"step": steps, name: values, "topology_decision": np.isin(steps, swapped)},
        key="metric",
        name=(choice.label, name),
        alt=f"Training metric {name} over steps, with {len(swapped)} topology decisions marked.",
    )
