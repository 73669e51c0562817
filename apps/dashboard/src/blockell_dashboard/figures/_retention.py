"""Charts of retention experiments: what is left of old tasks, and what the new one costs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .. import retention_stats as numbers
from ..retention import Cell
from ..retention_stats import Group, TaskLine
from ..tasks import TaskSpan
from ._retention_matrix import count_seeds
from ._theme import Theme, apply_layout, mark_tasks, palette, series_style, step_axis

__all__ = [
    "old_task_over_steps",
    "retention_tradeoff",
    "task_scores",
]

_HEIGHT = 400
_KEPT_VIEW = (-0.1, 1.25)
"""Of a task that was hardly learned, any share may be left; such points stay out of the view."""
_SCORE_AXIS = {"range": [-0.08, 1.08], "tickformat": ".0%"}


def task_scores(group: Group, *, theme: Theme = "light", height: int = _HEIGHT) -> go.Figure:
    """Draw every task over the steps of all trainings, for one method.

    Thick lines are means over seeds, thin lines single seeds. Scores below 0 (worse than chance)
    leave the chart at its lower edge. A task is measured at both ends of its own training, and all
    along the later ones.

    Args:
        group: at least one cell.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    cell = group.cells[0]
    fig = go.Figure()
    for task, name in enumerate(cell.tasks):
        lines = [numbers.task_lines(other)[task] for other in group.cells]
        _seeds_and_mean(fig, lines, escape(name), task, theme, metric=cell.metrics[task])
    mark_tasks(fig, _spans(cell), theme)
    return apply_layout(
        fig,
        theme,
        title="Every task over the steps",
        subtitle=f"{escape(group.label)}; {count_seeds(len(group.cells))}; "
        "0% is chance, 100% perfect",
        x_title="step, over all trainings",
        y_title="score",
        height=height,
        xaxis=step_axis([0, sum(cell.steps)]),
        yaxis=_SCORE_AXIS,
        top=78,
    )


def old_task_over_steps(
    groups: Sequence[Group], *, task: int = 0, theme: Theme = "light", height: int = _HEIGHT
) -> go.Figure:
    """Draw one task after it was learned, a line per method and dial.

    Args:
        groups: methods of one setting, each with at least one cell.
        task: number of the task.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    fig = go.Figure()
    cell = groups[0].cells[0]
    start = sum(cell.steps[: task + 1])
    for number, group in enumerate(groups):
        lines = []
        for other in group.cells:
            line = numbers.task_lines(other)[task]
            after = line.steps >= start
            lines.append(TaskLine(task, *(part[after] for part in line[1:])))
        _seeds_and_mean(fig, lines, escape(group.label), number, theme, metric=cell.metrics[task])
    mark_tasks(fig, _spans(cell)[task + 1 :], theme)
    return apply_layout(
        fig,
        theme,
        title=f"What is left of {escape(cell.tasks[task])}",
        subtitle="0% is chance, 100% perfect; means over seeds, single seeds thin",
        x_title="step, over all trainings",
        y_title="score",
        height=height,
        top=78,
        xaxis=step_axis([start, sum(cell.steps)]),
        yaxis=_SCORE_AXIS,
    )


def retention_tradeoff(
    groups: Sequence[Group], *, theme: Theme = "light", height: int = 480
) -> go.Figure:
    """Draw how much of the old task is kept against the new task's loss.

    Points are seeds; a line joins the means of one method's dials, in the order of the dial.
    Better is up and to the left. Strengths that stop all learning would squeeze the others
    together: points far beyond the best loss lie outside of the first view, and are counted.

    Args:
        groups: methods and dials of one setting, each with at least one cell.
        theme: "light" or "dark".
        height: of the figure, in pixels.
    """
    curves = list(dict.fromkeys(group.curve for group in groups))
    first = groups[0].cells[0].tasks[0]
    fig = go.Figure()
    for number, name in enumerate(curves):
        mine = [group for group in groups if group.curve == name]
        colour, symbol, dash = series_style(number, theme)
        cells = [(group, cell) for group in mine for cell in group.cells]
        means = [
            (
                np.mean([numbers.new_nats(cell) for cell in group.cells]),
                np.mean([numbers.kept(cell) for cell in group.cells]),
            )
            for group in mine
        ]
        if len(mine) > 1:
            fig.add_trace(
                go.Scatter(
                    x=[x for x, _ in means],
                    y=[y for _, y in means],
                    mode="lines",
                    line={"color": colour, "width": 1.8, "dash": dash},
                    legendgroup=escape(name),
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        fig.add_trace(
            go.Scatter(
                x=[numbers.new_nats(cell) for _, cell in cells],
                y=[numbers.kept(cell) for _, cell in cells],
                customdata=[[escape(group.label), cell.seed] for group, cell in cells],
                mode="markers",
                name=escape(name),
                legendgroup=escape(name),
                marker={
                    "color": colour,
                    "symbol": symbol,
                    "size": 10,
                    "opacity": 0.85,
                    "line": {"color": palette(theme).background, "width": 1},
                },
                hovertemplate="%{customdata[0]}, seed %{customdata[1]}<br>"
                "kept %{y:.1%}, new task %{x:.4f} nats<extra></extra>",
            )
        )
    losses = np.array([numbers.new_nats(cell) for group in groups for cell in group.cells])
    view, outside = _view(losses)
    shares = np.array([numbers.kept(cell) for group in groups for cell in group.cells])
    wild = int(((shares < _KEPT_VIEW[0]) | (shares > _KEPT_VIEW[1])).sum())
    outliers = f" ({wild} outside: zoom out)" if wild else ""
    pad = max(0.06 * float(np.ptp(shares)), 0.02)
    heights = list(_KEPT_VIEW) if wild else [float(shares.min()) - pad, float(shares.max()) + pad]
    beyond = f" ({outside} beyond {view[1]:.1f}: zoom out)" if outside else ""
    return apply_layout(
        fig,
        theme,
        title="Old task kept against new task's loss",
        subtitle=f"a point per seed; better is up and left; 100%: {escape(first)} as before",
        x_title=f"loss of the new tasks, each right after its training, nats{beyond}",
        y_title=f"old task kept{outliers}",
        height=height,
        xaxis={"range": view} if outside else {},
        yaxis={"tickformat": ".3~%", "range": heights},
    )


def _view(losses: numbers.Floats) -> tuple[list[float], int]:
    """Left and right edge of the first view, nats, and how many of `losses` [n] lie beyond it.

    The edge is twice the best loss, and at least one nat beyond it.
    """
    best = float(losses.min())
    right = best + max(best, 1.0)
    outside = int((losses > right).sum())
    widest = float(losses[losses <= right].max()) if outside else right
    pad = 0.06 * max(widest - best, 1e-3)
    return [best - pad, widest + pad], outside


def _seeds_and_mean(
    fig: go.Figure,
    lines: Sequence[TaskLine],
    name: str,
    number: int,
    theme: Theme,
    *,
    metric: str,
) -> None:
    """Thin lines of the seeds, and the mean where they were measured at the same steps."""
    colour, symbol, dash = series_style(number, theme)
    same = all(np.array_equal(line.steps, lines[0].steps) for line in lines)
    single = len(lines) == 1

    def draw(line: TaskLine, *, mean: bool, legend: bool) -> None:
        options: dict[str, Any] = {"hoverinfo": "skip"}
        if mean:
            options = {
                "customdata": line.values,
                "hovertemplate": f"{name}<br>step %{{x:,d}}: %{{y:.1%}} "
                f"({escape(metric)} %{{customdata:.4g}})<extra></extra>",
            }
        fig.add_trace(
            go.Scatter(
                x=line.steps,
                y=line.scores,
                name=name,
                legendgroup=f"{number}",
                showlegend=legend,
                mode="lines+markers" if mean else "lines",
                line={"color": colour, "width": 2.2 if mean else 1, "dash": dash},
                marker={"symbol": symbol, "size": 6},
                opacity=1.0 if mean else 0.35,
                **options,
            )
        )

    if not same or not single:
        for at, line in enumerate(lines):
            draw(line, mean=not same, legend=not same and at == 0)
    if same:
        values = np.mean([line.values for line in lines], axis=0)
        scores = np.mean([line.scores for line in lines], axis=0)
        draw(TaskLine(lines[0].task, lines[0].steps, values, scores), mean=True, legend=True)


def _spans(cell: Cell) -> list[TaskSpan]:
    stops = [sum(cell.steps[: number + 1]) for number in range(len(cell.tasks))]
    return list(map(TaskSpan, cell.tasks, [0, *stops[:-1]], stops))
