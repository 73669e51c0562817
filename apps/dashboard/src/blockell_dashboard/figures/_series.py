"""Charts over training steps: swap rate, column entropy, density, loss. S points in a series."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from .. import stats
from ..tasks import TaskSpan, task_starts
from ._theme import (
    Theme,
    apply_layout,
    counted,
    draw_band,
    mark_step,
    mark_tasks,
    palette,
    step_axis,
)

__all__ = ["column_entropy", "density", "loss", "swap_rate"]

_HEIGHT = 370
_NONE = np.empty(0)
_MOST_TICKS = 150


def swap_rate(
    steps: NDArray[Any],
    rates: NDArray[Any],
    *,
    name: str = "this layer",
    all_steps: NDArray[Any] = _NONE,
    all_rates: NDArray[Any] = _NONE,
    band: tuple[float, float] = stats.HEALTHY_SWAP_RATE,
    window: int = 10,
    still: NDArray[np.bool_] | None = None,
    spans: Sequence[TaskSpan] = (),
    selected_step: int | None = None,
    theme: Theme = "light",
    height: int = _HEIGHT,
) -> go.Figure:
    """Draw the share of blocks replaced at each decision, with the healthy band.

    Args:
        steps, rates: [S] one layer; rates as shares, NaN where unknown.
        name: of that layer.
        all_steps, all_rates: the same over all layers together, drawn if given.
        band: healthy rates, drawn as an area; decisions outside are marked.
        window: decisions in the rolling mean.
        still: [S] snapshots at which nothing was swapped anywhere: these are not marked.
        spans: trainings on several tasks; their boundaries are drawn.
        selected_step: marked by a vertical line.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    colours, name = palette(theme), escape(name)
    outside = stats.outside_band(rates, band)
    quiet = np.zeros(len(rates), dtype=bool) if still is None else still & np.isfinite(rates)
    outside &= ~quiet
    keep = np.union1d(stats.bucket_indices(rates), np.flatnonzero(outside)[:2000]).astype(int)
    fig = go.Figure()
    draw_band(fig, band, theme)
    fig.add_annotation(
        text=f"healthy: {band[0]:.0%} to {band[1]:.0%}",
        x=0.01,
        xref="paper",
        y=band[0],
        yanchor="bottom",
        showarrow=False,
        font={"color": colours.muted, "size": 11},
    )
    if len(all_steps):
        kept = stats.bucket_indices(all_rates)
        _line(fig, "all layers", all_steps[kept], all_rates[kept], colours.third, dash="dot")
    few = len(keep) <= 60
    _line(fig, name, steps[keep], rates[keep], colours.first, mode="lines+markers" if few else "")
    if np.isfinite(rates).sum() > window:
        mean = stats.rolling_mean(rates, window, task_starts(steps, spans))[keep]
        _line(fig, f"mean of {window}", steps[keep], mean, colours.text, width=2.4)
    marked = keep[outside[keep]]
    fig.add_trace(
        go.Scatter(
            x=steps[marked],
            y=rates[marked],
            name="outside the band",
            mode="markers",
            marker={
                "symbol": "triangle-up",
                "size": 9,
                "color": colours.alarm,
                "line": {"color": colours.background, "width": 1},
            },
            hoverinfo="skip",
            showlegend=bool(len(marked)),
        )
    )
    mark_step(fig, selected_step, theme)
    mark_tasks(fig, spans, theme)
    top = float(np.nanmax(np.concatenate([rates, all_rates, [band[1]]])))
    subtitle = "share of blocks replaced per decision"
    decisions = int((np.isfinite(rates) & ~quiet).sum())
    if decisions:
        subtitle += f"; {int(outside.sum()):,} of {decisions:,} outside the band"
    if quiet.any():
        subtitle += f"; none at {int(quiet.sum()):,}"
    return apply_layout(
        fig,
        theme,
        title="Swap rate",
        subtitle=subtitle,
        top=78 if spans else 60,
        x_title="step",
        y_title="blocks replaced",
        height=height,
        hovermode="x unified",
        xaxis=step_axis(steps),
        yaxis={"tickformat": ".0%", "hoverformat": ".2%", "range": [0, top * 1.15]},
    )


def column_entropy(
    steps: NDArray[Any],
    entropy: NDArray[Any],
    dead_columns: NDArray[Any],
    *,
    C: int,
    name: str = "this layer",
    spans: Sequence[TaskSpan] = (),
    selected_step: int | None = None,
    theme: Theme = "light",
    height: int = _HEIGHT,
) -> go.Figure:
    """Draw how evenly the blocks use the input columns.

    Args:
        steps, entropy: [S] entropy of the column usage divided by log C: 1 is perfectly even.
        dead_columns: [S] columns that no block reads.
        C: block columns.
        name: of the layer.
        spans: trainings on several tasks; their boundaries are drawn.
        selected_step: marked by a vertical line.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    colours, name = palette(theme), escape(name)
    keep = stats.bucket_indices(entropy)
    fig = go.Figure()
    few = len(keep) <= 60
    _line(
        fig,
        name,
        steps[keep],
        entropy[keep],
        colours.first,
        mode="lines+markers" if few else "",
        customdata=dead_columns[keep],
        hovertemplate="%{y:.4f}, %{customdata:,d} unused columns",
        showlegend=False,
    )
    mark_step(fig, selected_step, theme)
    mark_tasks(fig, spans, theme)
    subtitle = "1 is even use of all columns"
    if len(dead_columns):
        subtitle += f"; unused now: {int(dead_columns[-1]):,} of {C:,}"
    finite = entropy[np.isfinite(entropy)]
    lowest = float(finite.min()) if finite.size else 0.9
    # At least a tenth of the scale, so that noise in the third digit does not look like a fall.
    bottom = max(0.0, min(0.9, np.floor((lowest - 0.02) * 20) / 20))
    return apply_layout(
        fig,
        theme,
        title="Column entropy",
        subtitle=subtitle,
        top=78 if spans else 60,
        x_title="step",
        y_title="normalised entropy",
        height=height,
        hovermode="x unified",
        xaxis=step_axis(steps),
        yaxis={"range": [bottom, 1.005], "tickformat": ".2f"},
    )


def density(
    steps: NDArray[Any],
    shares: NDArray[Any],
    *,
    name: str = "this layer",
    all_shares: NDArray[Any] = _NONE,
    spans: Sequence[TaskSpan] = (),
    selected_step: int | None = None,
    theme: Theme = "light",
    height: int = _HEIGHT,
) -> go.Figure:
    """Draw the share of block positions that hold a block, of a model that grows.

    Args:
        steps, shares: [S] one layer.
        name: of that layer.
        all_shares: [S] the same over all layers together, drawn if given.
        spans: trainings on several tasks; their boundaries are drawn.
        selected_step: marked by a vertical line.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    colours, name = palette(theme), escape(name)
    fig = go.Figure()
    if len(all_shares):
        keep = stats.bucket_indices(all_shares)
        _line(
            fig, "all layers", steps[keep], all_shares[keep], colours.third, dash="dot", shape="hv"
        )
    keep = stats.bucket_indices(shares)
    few = "lines+markers" if len(keep) <= 60 else ""
    _line(fig, name, steps[keep], shares[keep], colours.first, mode=few, shape="hv")
    mark_step(fig, selected_step, theme)
    mark_tasks(fig, spans, theme)
    subtitle = "share of block positions that hold a block"
    if len(shares):
        subtitle += f"; {shares[0]:.1%} at first, {shares[-1]:.1%} now"
    return apply_layout(
        fig,
        theme,
        title="Density",
        subtitle=subtitle,
        top=78 if spans else 60,
        x_title="step",
        y_title="density",
        height=height,
        hovermode="x unified",
        xaxis=step_axis(steps),
        yaxis={"tickformat": ".0%", "hoverformat": ".1%", "range": [0, 1.02]},
    )


def loss(
    steps: NDArray[Any],
    losses: NDArray[Any],
    *,
    name: str = "loss",
    decision_steps: NDArray[Any] = _NONE,
    alarms: bool = True,
    spans: Sequence[TaskSpan] = (),
    selected_step: int | None = None,
    theme: Theme = "light",
    height: int = _HEIGHT,
) -> go.Figure:
    """Draw a loss over steps, with the topology decisions as ticks below it.

    Losses above twice the mean of the 50 before them (of the same task) are marked: a decision
    must not cause them.

    Args:
        steps, losses: [S] one metric; not finite values are marked at the upper edge.
        name: of the metric.
        decision_steps: steps at which blocks were swapped.
        alarms: mark high values; switch it off for metrics that may rise.
        spans: trainings on several tasks; their boundaries are drawn.
        selected_step: marked by a vertical line.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    colours, name = palette(theme), escape(name)
    spikes: NDArray[np.bool_] = np.zeros(len(losses), dtype=bool)
    starts = task_starts(steps, spans)
    if alarms:
        spikes = stats.loss_spikes(losses, starts=starts)
    keep = np.union1d(stats.bucket_indices(losses), np.flatnonzero(spikes)[:2000]).astype(int)
    finite = losses[np.isfinite(losses)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(0.0, low)
    span = (high - low) or 1.0
    fig = go.Figure()
    clean = np.where(np.isfinite(losses), losses, np.nan)
    window, smoothed = max(5, len(losses) // 50), len(losses) > 20
    few = "lines+markers" if len(losses) <= 20 else ""
    _line(
        fig,
        name,
        steps[keep],
        clean[keep],
        colours.first,
        opacity=0.45 if smoothed else 1,
        mode=few,
    )
    if smoothed:
        mean = stats.rolling_mean(losses, window, starts)[keep]
        _line(fig, f"mean of {window}", steps[keep], mean, colours.first, width=2.4)
    broken = spikes & ~np.isfinite(losses)
    for mask, what, symbol in (
        (spikes & ~broken, "above 2× the running mean", "triangle-up"),  # noqa: RUF001
        (broken, "not finite", "x"),
    ):
        marked = np.flatnonzero(mask)[:2000]
        fig.add_trace(
            go.Scatter(
                x=steps[marked],
                y=np.where(broken, high, losses)[marked],
                name=what,
                mode="markers",
                marker={"symbol": symbol, "size": 10, "color": colours.alarm},
                hoverinfo="skip",
                showlegend=bool(len(marked)),
            )
        )
    # more of them would run into a bar
    every = -(-len(decision_steps) // _MOST_TICKS) or 1
    ticks = decision_steps[::every]
    fig.add_trace(
        go.Scatter(
            x=ticks,
            y=np.full(len(ticks), low - 0.06 * span),
            name="topology decision" + (f" (1 of {every} drawn)" if every > 1 else ""),
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 8, "color": colours.second},
            hoverinfo="skip",
            showlegend=bool(len(ticks)),
        )
    )
    mark_step(fig, selected_step, theme)
    mark_tasks(fig, spans, theme)
    subtitle = counted(len(losses), "value")
    if alarms:
        subtitle += f"; {int((spikes & ~broken).sum()):,} above 2× the mean before them"  # noqa: RUF001
        if broken.any():
            subtitle += f"; {int(broken.sum()):,} not finite"
    return apply_layout(
        fig,
        theme,
        title=f"Training metric: {name}",
        subtitle=subtitle,
        top=78 if spans else 60,
        x_title="step",
        y_title=name,
        height=height,
        hovermode="x unified",
        xaxis=step_axis(np.concatenate([steps, decision_steps])),
        yaxis={"range": [low - 0.12 * span, high + 0.08 * span], "hoverformat": ".4g"},
    )


def _line(
    fig: go.Figure,
    name: str,
    x: NDArray[Any],
    y: NDArray[Any],
    colour: str,
    *,
    width: float = 1.6,
    dash: str = "solid",
    shape: str = "linear",
    mode: str = "",
    **options: Any,
) -> None:
    fig.add_trace(
        go.Scatter(
            x=x,
            y=y,
            name=name,
            mode=mode or "lines",
            line={"color": colour, "width": width, "dash": dash, "shape": shape},
            marker={"size": 6},
            **options,
        )
    )
