"""The matrix of retention experiments: every task after every training."""

from __future__ import annotations

from html import escape
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from .. import retention_stats as numbers
from ..retention_stats import Group
from ._theme import Theme, apply_layout, palette

__all__ = ["MATRIX_KINDS", "MatrixKind", "count_seeds", "retention_matrix"]

MatrixKind = Literal["score", "change"]
MATRIX_KINDS: tuple[MatrixKind, ...] = ("score", "change")

_HEIGHT = 400


def retention_matrix(
    group: Group,
    *,
    kind: MatrixKind = "score",
    theme: Theme = "light",
    height: int = _HEIGHT,
) -> go.Figure:
    """Draw every task's score (or its change since it was learned) after every training.

    Args:
        group: means over its cells.
        kind: "score", or "change" (below 0 is forgotten; empty before the task was learned).
        theme: "light" or "dark".
        height: of the figure, in pixels.

    Raises:
        ValueError: no such kind.
    """
    if kind not in MATRIX_KINDS:
        raise ValueError(f"kind (={kind!r}) must be one of {', '.join(MATRIX_KINDS)}.")
    colours, cell = palette(theme), group.cells[0]
    make = numbers.score_matrix if kind == "score" else numbers.change_matrix
    values = np.mean([make(other) for other in group.cells], axis=0)
    raw = np.mean([other.matrix for other in group.cells], axis=0)
    # On the strongest colours: white on the light page's, dark on the dark page's.
    contrast = "#ffffff" if theme == "light" or kind == "score" else colours.background
    tasks = [escape(name) for name in cell.tasks]
    rows = ["untrained", *(f"after {name}" for name in tasks)]
    light = theme == "light"
    scale = (
        [[0, "#f4f6f8" if light else "#1f2631"], [1, colours.first if light else "#2b7fb0"]]
        if kind == "score"
        else [[0, colours.second], [0.5, colours.absent], [1, colours.first]]
    )
    texts = [[_percent(v, signed=kind == "change") for v in row] for row in values]
    fig = go.Figure(
        go.Heatmap(
            z=values,
            customdata=np.stack([raw, np.tile(np.arange(len(tasks)), (len(rows), 1))], axis=-1),
            colorscale=scale,
            zmin=0.0 if kind == "score" else -1.0,
            zmax=1.0,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="%{x}, %{y}<br>"
            + ("score" if kind == "score" else "change")
            + " %{z:.2%}<br>measured %{customdata[0]:.4g}<extra></extra>",
            colorbar={"tickformat": ".0%", "tickfont": {"color": colours.muted}, "thickness": 12},
        )
    )
    fig.update_traces(x=list(range(len(tasks))), y=list(range(len(rows))))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            strong = value > 0.55 or (kind == "change" and value < -0.55)
            fig.add_annotation(
                x=column,
                y=row,
                text=texts[row][column],
                showarrow=False,
                font={"size": 14, "color": contrast if strong else colours.text},
            )
    titles = {"score": "Score matrix", "change": "Forgetting matrix"}
    notes = {
        "score": "0% is chance, 100% perfect",
        "change": "change since it was learned",
    }
    return apply_layout(
        fig,
        theme,
        title=titles[kind],
        subtitle=f"{escape(group.label)}; {notes[kind]}; {count_seeds(len(group.cells))}",
        x_title="measured on",
        y_title="",
        height=height,
        xaxis={"tickvals": list(range(len(tasks))), "ticktext": tasks, "showgrid": False},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": rows,
            "autorange": "reversed",
            "showgrid": False,
        },
    )


def _percent(value: float, *, signed: bool) -> str:
    """Empty for NaN; never "-0.0%"."""
    if not np.isfinite(value):
        return ""
    rounded = round(float(value), 3) + 0.0
    return f"{rounded:+.1%}" if signed and rounded else f"{rounded:.1%}"


def count_seeds(count: int) -> str:
    """The number in words of a subtitle."""
    return f"{count} seed{'' if count == 1 else 's'}"
