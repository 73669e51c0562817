"""Several runs in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from .. import stats
from ..tasks import TaskSpan, task_starts
from ._theme import Theme, apply_layout, draw_band, series_style, step_axis

__all__ = ["compare_runs"]


def compare_runs(
    series: Sequence[tuple[str, NDArray[Any], NDArray[Any]]],
    *,
    title: str,
    y_title: str,
    window: int | None = None,
    share: bool = False,
    band: tuple[float, float] | None = None,
    spans: Mapping[str, Sequence[TaskSpan]] | None = None,
    order: Sequence[str] | None = None,
    theme: Theme = "light",
    height: int = 390,
) -> go.Figure:
    """Draw one quantity of several runs over steps, a line each.

    Args:
        series: name, steps [S] and values [S] of each run; NaN where unknown.
        title: what is drawn.
        y_title: of the vertical axis, with its unit.
        window: points in the rolling mean that is drawn of long series; by default a fiftieth of
            the series, and at least 5. Series of at most 20 points are drawn as they are.
        share: values are shares, shown in percent.
        band: healthy values, drawn as an area.
        spans: by name, the trainings of runs on several tasks: their means begin anew with each.
        order: names whose place says a run's colour, so that it has the same one in every chart;
            by default those of `series`.
        theme: "light" or "dark".
        height: of the figure without its legend, in pixels.
    """
    fig = go.Figure()
    if band is not None:
        draw_band(fig, band, theme)
    smoothed = False
    places = {name: number for number, name in enumerate(order or [name for name, *_ in series])}
    for name, steps, values in series:
        number = places[name]
        colour, symbol, dash = series_style(number, theme)
        clean = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
        options: dict[str, Any] = {"legendgroup": str(number), "name": escape(name)}
        drawn = clean
        if len(values) > 20:
            smoothed = True
            starts = task_starts(steps, (spans or {}).get(name, ()))
            drawn = stats.rolling_mean(clean, window or max(5, len(values) // 50), starts)
            keep = stats.bucket_indices(clean)
            fig.add_trace(
                go.Scatter(
                    x=steps[keep],
                    y=clean[keep],
                    mode="lines",
                    line={"color": colour, "width": 1},
                    opacity=0.4,
                    hoverinfo="skip",
                    showlegend=False,
                    **options,
                )
            )
        keep = stats.bucket_indices(drawn)
        fig.add_trace(
            go.Scatter(
                x=steps[keep],
                y=drawn[keep],
                mode="lines+markers" if len(keep) <= 20 else "lines",
                line={"color": colour, "width": 2.2, "dash": dash},
                marker={"symbol": symbol, "size": 6},
                hovertemplate="%{y:.2%}" if share else "%{y:.4g}",
                **options,
            )
        )
    points = [steps for _, steps, _ in series if len(steps)]
    return apply_layout(
        fig,
        theme,
        title=escape(title),
        subtitle="rolling means, single values thin" if smoothed else "a line per run",
        x_title="step",
        y_title=escape(y_title),
        height=height + 30 * _legend_lines([name for name, _, _ in series]),
        hovermode="x unified",
        xaxis=step_axis(np.concatenate(points)) if points else {},
        yaxis={"tickformat": ".0%", "rangemode": "tozero"} if share else {},
    )


def _legend_lines(names: Sequence[str]) -> int:
    """Lines that a legend of these names takes in a chart of half the page's width."""
    if not names:
        return 0
    in_a_line = max(1, 76 // (max(map(len, names)) + 7))
    return -(-len(names) // in_a_line)
