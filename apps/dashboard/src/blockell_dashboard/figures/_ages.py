"""The histogram of block ages at one step."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from numpy.typing import NDArray

from .. import stats
from ._theme import Theme, apply_layout, counted, palette, vertical_line, whole_ticks

__all__ = ["age_histogram"]


def age_histogram(
    ages: NDArray[Any],
    *,
    upper: float | None = None,
    step: int | None = None,
    theme: Theme = "light",
    height: int = 540,
) -> go.Figure:
    """Draw how old the blocks of a layer are.

    Args:
        ages: ages of the live blocks in steps (any shape).
        upper: end of the age axis; give the same one at every step to compare steps.
        step: shown in the title.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    colours = palette(theme)
    ages = ages.ravel()
    summary = stats.age_summary(ages)
    end = upper if upper is not None else stats.nice_ceiling(summary.maximum)
    left, right, counts = stats.age_histogram(ages, end)
    fig = go.Figure(
        go.Bar(
            x=(left + right) / 2,
            y=counts,
            width=right - left,
            marker={"color": colours.first, "line": {"color": colours.background, "width": 1}},
            customdata=[
                (int(a), int(b) - 1, n / max(1, summary.blocks))
                for a, b, n in zip(left, right, counts, strict=True)
            ],
            hovertemplate=(
                "%{customdata[0]:,d} to %{customdata[1]:,d} steps old<br>"
                "<b>%{y:,d}</b> blocks (%{customdata[2]:.1%})<extra></extra>"
            ),
            showlegend=False,
        )
    )
    subtitle = "no blocks"
    if summary.blocks:
        subtitle = (
            f"{counted(summary.blocks, 'block')}; median {summary.median:,.0f}, "
            f"p90 {summary.p90:,.0f} steps"
        )
        for value, name, dash in ((summary.median, "median", "dash"), (summary.p90, "p90", "dot")):
            vertical_line(fig, value, color=colours.second, width=1.6, dash=dash)
            near_end = value > 0.6 * float(right[-1])
            fig.add_annotation(  # above the chart, where no bar is
                text=name,
                x=value,
                y=1,
                yref="paper",
                xanchor="right" if near_end else "left",
                yanchor="bottom",
                showarrow=False,
                font={"color": colours.second, "size": 12},
                yshift=0 if name == "median" else 14,
            )
    return apply_layout(
        fig,
        theme,
        title="Block ages" + ("" if step is None else f" at step {step:,}"),
        subtitle=subtitle,
        x_title="age (steps)",
        y_title="blocks",
        height=height,
        top=86,
        bargap=0,
        xaxis={"range": [0, float(right[-1])], "tickformat": "~s" if end >= 1e5 else ",d"},
        yaxis={
            "rangemode": "tozero",
            "tickformat": ",d",
            **whole_ticks(int(counts.max(initial=0))),
        },
    )
