"""Colours and the common layout of every figure, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import plotly.graph_objects as go

from ..tasks import TaskSpan

__all__ = [
    "PALETTES",
    "_SERIES_COLOURS",
    "Palette",
    "Theme",
    "apply_layout",
    "draw_band",
    "mark_step",
    "mark_tasks",
    "palette",
    "series_style",
    "step_axis",
    "vertical_line",
]

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class Palette:
    """One page's colours. The series colours are the Okabe-Ito set, which people with any of the
    common colour deficiencies can tell apart, lightened for the dark page.
    """

    background: str
    text: str
    muted: str
    grid: str
    absent: str
    kept: str
    first: str
    second: str
    third: str
    alarm: str
    band: str


PALETTES: dict[str, Palette] = {
    "light": Palette(
        background="#ffffff",
        text="#1f2937",
        muted="#6b7280",
        grid="#e5e7eb",
        absent="#eef0f3",
        kept="#b8c0cc",
        first="#0072b2",
        second="#d55e00",
        third="#8a5a9e",
        alarm="#d55e00",
        band="rgba(0, 158, 115, 0.13)",
    ),
    "dark": Palette(
        background="#0e1117",
        text="#e5e7eb",
        muted="#9ca3af",
        grid="#262c36",
        absent="#1a1f29",
        kept="#566072",
        first="#56b4e9",
        second="#f0883e",
        third="#c9a0dc",
        alarm="#f0883e",
        band="rgba(0, 190, 140, 0.16)",
    ),
}


# Okabe-Ito without its yellow, lightened for the dark page; symbols tell apart what is left.
_SERIES_COLOURS: dict[str, tuple[str, ...]] = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#b07400", "#3a97cf", "#6b7280"),
    "dark": ("#56b4e9", "#f0883e", "#2ec99b", "#e29cc6", "#e6b422", "#9ad2f5", "#b0b6c0"),
}
_LABELS_WIDTH = 76
"""Letters that fit beside one another above a chart of half the page's width."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def palette(theme: Theme) -> Palette:
    """The colours of a theme; ValueError for an unknown one."""
    if theme not in PALETTES:
        raise ValueError(f"theme (={theme!r}) must be one of {', '.join(PALETTES)}.")
    return PALETTES[theme]


def apply_layout(
    fig: go.Figure,
    theme: Theme,
    *,
    title: str,
    subtitle: str = "",
    x_title: str,
    y_title: str,
    height: int,
    top: int = 60,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
    **layout: Any,
) -> go.Figure:
    """Give a figure the common look. It sets every colour itself, so that it looks the same in a
    notebook, in the app and in an exported file.

    The layout is put together as a dictionary and given to Plotly once: each of its own updates
    takes as long as all of this. Shapes and annotations that the figure has are kept.

    Args:
        fig: changed in place.
        title, subtitle: may hold markup.
        x_title, y_title: names of the axes, with units.
        height: of the figure, in pixels.
        top: margin above the chart, in pixels.
        xaxis, yaxis, layout: win over the common look.
    """
    colours = palette(theme)

    def axis(text: str, own: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "gridcolor": colours.grid,
            "linecolor": colours.grid,
            "zeroline": False,
            "tickfont": {"color": colours.muted, "size": 12},
            "title": {
                "text": text,
                "font": {"color": colours.muted, "size": 13},
                "standoff": 8,
            },
            "automargin": True,
            **(own or {}),
        }

    drawn = fig.layout.to_plotly_json()
    fig.layout = {
        **{key: drawn[key] for key in ("shapes", "annotations") if key in drawn},
        "title": {
            "text": f"<b>{title}</b><br>"
            f'<span style="font-size:12.5px;color:{colours.muted}">{subtitle}</span>',
            "font": {"size": 16, "color": colours.text},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1 - 20 / height,  # of the first line, from the upper edge
            "yref": "container",
            "yanchor": "middle",
            "pad": {"l": 14},
        },
        "font": {"family": "Source Sans, Inter, Segoe UI, Helvetica, Arial, sans-serif"},
        "paper_bgcolor": colours.background,
        "plot_bgcolor": colours.background,
        "height": height,
        "margin": {"l": 14, "r": 14, "t": top, "b": 8},
        "hoverlabel": {
            "bgcolor": colours.background,
            "bordercolor": colours.muted,
            "font": {"color": colours.text, "size": 13},
            "align": "left",
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "font": {"color": colours.muted, "size": 12},
            "bgcolor": "rgba(0,0,0,0)",
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": colours.muted,
            "activecolor": colours.first,
        },
        "xaxis": axis(x_title, xaxis),
        "yaxis": axis(y_title, yaxis),
        **layout,
    }
    return fig


def whole_ticks(most: int) -> dict[str, int]:
    """Keep an axis of few whole things from naming parts of them."""
    return {"tick0": 0, "dtick": 1} if most <= 8 else {}


def counted(number: int, what: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def vertical_line(fig: go.Figure, x: float, **line: Any) -> None:
    """Draw a line over the whole height at x, quicker than `add_vline` does."""
    fig.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, xref="x", yref="paper", line=line)


def draw_band(fig: go.Figure, band: tuple[float, float], theme: Theme) -> None:
    """Fill the healthy range of values over the whole width."""
    fig.add_shape(
        type="rect",
        x0=0,
        x1=1,
        y0=band[0],
        y1=band[1],
        xref="paper",
        yref="y",
        fillcolor=palette(theme).band,
        line={"width": 0},
        layer="below",
    )


def mark_step(fig: go.Figure, step: int | None, theme: Theme) -> None:
    """Draw the selected step as a dotted vertical line."""
    if step is not None:
        vertical_line(fig, step, color=palette(theme).muted, width=1.2, dash="dot")


def mark_tasks(fig: go.Figure, spans: Sequence[TaskSpan], theme: Theme) -> None:
    """Draw a vertical line where each training begins, with the task's name above the chart.

    Of many tasks the names are shortened, or left to the hover text of their numbers.
    """
    muted = palette(theme).muted
    for number, span in enumerate(spans, 1):
        vertical_line(fig, span.start, color=muted, width=1.2, dash="dot")
        fig.add_annotation(
            x=span.start,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            xanchor="left",
            text=escape(_task_label(span.name, number, _LABELS_WIDTH // len(spans))),
            hovertext=f"{escape(span.name)} begins at step {span.start:,}",
            showarrow=False,
            font={"color": muted, "size": 11},
        )


def _task_label(name: str, number: int, width: int) -> str:
    """What fits into so many letters. The end of a long name tells it from its like."""
    if len(name) + 7 <= width:
        return f"{name} begins"
    if len(name) <= width:
        return name
    return f"…{name[-(width - 1) :]}" if width >= 6 else str(number)


def step_axis(steps: Sequence[int] | Any) -> dict[str, Any]:
    """A range of steps with a small margin, the same for every chart over time of a run."""
    if len(steps) == 0:
        return {}
    first, last = float(min(steps)), float(max(steps))
    margin = (last - first) * 0.02 or max(1.0, abs(last) * 0.02)
    width = last - first + 2 * margin
    return {
        "range": [first - margin, last + margin],
        "tickformat": ",d",
        **whole_ticks(math.ceil(width)),
    }


def series_style(number: int, theme: Theme) -> tuple[str, str, str]:
    """Colour, marker symbol and dash of the line of this number (from 0)."""
    colours = _SERIES_COLOURS[theme]
    return (
        colours[number % len(colours)],
        _SYMBOLS[number % len(_SYMBOLS)],
        _DASHES[number // len(colours) % len(_DASHES)],
    )
