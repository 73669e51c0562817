"""The topology heatmap: which blocks of a weight exist, and what is known about each.

R block rows (output side), C block columns (input side), K slots per row, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from blockell_format import block_overlap
from blockell_format.snapshots import LayerInfo, LayerSnapshot

from .. import stats
from ..tasks import TaskSpan, birth_tasks
from ._cells import CellGrid
from ._kinds import draw_changes, draw_tasks
from ._theme import Palette, Theme, apply_layout, counted, palette, whole_ticks

__all__ = ["COLOURS", "Colour", "topology_heatmap"]

Colour = Literal["age", "score", "change", "since", "task"]
COLOURS: tuple[Colour, ...] = ("age", "score", "change", "since", "task")

# Both scales are perceptually uniform and readable with any colour deficiency; two different ones,
# so that an age map is never taken for a score map.
_SCALES = {"age": "Viridis", "score": "Cividis"}
_COLOUR_TITLES = {"age": "age<br>(steps)", "score": "score"}
_TITLES = {
    "age": "Block age",
    "score": "Block score",
    "change": "Born, died and kept",
    "since": "Born, died and kept",
    "task": "Task of birth",
}
_NOT_FINITE = "#cc79a7"


def topology_heatmap(
    layer: LayerSnapshot,
    info: LayerInfo,
    *,
    colour: Colour = "age",
    value_range: tuple[float, float] | None = None,
    step: int | None = None,
    since: tuple[int, LayerSnapshot] | None = None,
    spans: Sequence[TaskSpan] = (),
    theme: Theme = "light",
    max_cells_per_side: int = 500,
    height: int = 540,
) -> go.Figure:
    """Draw the [R, C] grid of block positions of one layer at one step.

    Args:
        layer: arrays of the layer, [R, K] each.
        info: name and sizes of the layer.
        colour: "age" (steps since the block was born), "score" (what keeps it alive),
            "change" (born, died or kept at this decision), "since" (the same since an earlier
            snapshot) or "task" (in whose training the block was born).
        value_range: ends of the colour scale; give the same ones at every step to compare steps.
            By default the range of this snapshot.
        step: shown in the title; "task" needs it.
        since: step and arrays of the earlier snapshot, for "since".
        spans: the trainings of the run, for "task".
        theme: "light" or "dark".
        max_cells_per_side: larger grids are aggregated (`stats.tile_grid`).
        height: of the figure, in pixels.

    Returns:
        A figure whose absent blocks are neutral, and whose hover names row, column, age, score
        and the slice of the weight that the block covers.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour (={colour!r}) must be one of {', '.join(COLOURS)}.")
    colours = palette(theme)
    age_grid = stats.block_grid(layer.col_indices, layer.block_age_steps, info.C)
    score_grid = stats.block_grid(layer.col_indices, layer.block_score, info.C)
    kinds_grid = _kinds_grid(layer, info, colour, step, since, spans)
    kinds = stats.tile_grid(kinds_grid, max_cells_per_side)
    age = stats.tile_grid(age_grid, max_cells_per_side).values
    score = stats.tile_grid(score_grid, max_cells_per_side).values
    cells = CellGrid(kinds, info)

    fig = go.Figure()
    counts = np.bincount(kinds_grid.ravel(), minlength=max(4, len(spans) + 1))
    title, subtitle = _TITLES[colour], _subtitle(layer, info, cells)
    title += "" if step is None else f" at step {step:,}"
    if colour in ("change", "since"):
        when = "at this decision"
        if since is not None and colour == "since":
            when = f"since step {since[0]:,}"
            title = f"{_TITLES[colour]} {when}" + ("" if step is None else f", at step {step:,}")
            same = block_overlap(since[1].col_indices, layer.col_indices, info.C)
            subtitle += f"; overlap {same.fraction:.1%}, by chance {same.chance:.1%}"
        draw_changes(
            fig, cells, kinds.values, counts, age, score, when=when, theme=theme, height=height
        )
    elif colour == "task":
        draw_tasks(
            fig, cells, kinds.values, counts, age, score, spans=spans, theme=theme, height=height
        )
    else:
        values, grid = (age, age_grid) if colour == "age" else (score, score_grid)
        ends = value_range or _own_range(colour, grid)
        odd = int((~np.isfinite(grid)).sum() - (kinds_grid == stats.ABSENT).sum())
        odd -= int((kinds_grid == stats.DIED).sum())
        if odd:
            subtitle += f"; {counted(odd, colour)} not finite, in pink"
        older = int((grid > ends[1]).sum()) if colour == "age" else 0
        if older:
            subtitle += f"; {counted(older, 'block')} older than the scale"
        _draw_values(fig, cells, colour, values, kinds.values, age, score, ends, colours)
    return apply_layout(
        fig,
        theme,
        title=title,
        subtitle=subtitle,
        x_title="block column (input side)",
        y_title="block row (output side)",
        height=height,
        plot_bgcolor=colours.absent,
        xaxis={
            "showgrid": False,
            "range": cells.axis_range(info.C, cells.column_step),
            **whole_ticks(info.C),
        },
        yaxis={
            "showgrid": False,
            "range": cells.axis_range(info.R, cells.row_step)[::-1],
            **whole_ticks(info.R),
        },
    )


def _kinds_grid(
    layer: LayerSnapshot,
    info: LayerInfo,
    colour: Colour,
    step: int | None,
    since: tuple[int, LayerSnapshot] | None,
    spans: Sequence[TaskSpan],
) -> NDArray[np.uint8]:
    """[R, C] codes that say what is at a position: 0 for a position without a block."""
    if colour == "task":
        if step is None or not spans:
            raise ValueError('colour (="task") needs step and spans, the trainings of the run.')
        tasks = birth_tasks(layer.block_age_steps, step, spans) + 1
        grid = stats.block_grid(layer.col_indices, tasks, info.C)
        return np.nan_to_num(grid, nan=0.0).astype(np.uint8)
    if colour == "since":
        if since is None:
            raise ValueError('colour (="since") needs since, an earlier snapshot.')
        old = since[1]
        return stats.change_since(
            old.col_indices, old.block_age_steps, layer.col_indices, layer.block_age_steps, info.C
        )
    return stats.change_grid(layer.col_indices, layer.swapped, layer.previous_columns, info.C)


def _draw_values(
    fig: go.Figure,
    cells: CellGrid,
    colour: Colour,
    values: NDArray[np.float32],
    changes: NDArray[np.uint8],
    age: NDArray[np.float32],
    score: NDArray[np.float32],
    ends: tuple[float, float],
    colours: Palette,
) -> None:
    present = (changes == stats.KEPT) | (changes == stats.BORN)
    finite = np.isfinite(values)
    if not cells.large:  # there, absent blocks are the background only, without hover
        cells.add_plain(fig, ~present & ~finite, colours.absent, "no block")
    if (present & ~finite).any():
        cells.add_plain(fig, present & ~finite, _NOT_FINITE, f"{colour} is not a finite number")
    cells.add_blocks(
        fig,
        np.where(finite, values, np.float32(np.nan)),
        age,
        score,
        zmin=ends[0],
        zmax=ends[1],
        colorscale=_SCALES[colour],
        colorbar={
            "title": {
                "text": _COLOUR_TITLES[colour],
                "font": {"color": colours.muted, "size": 12},
            },
            "tickfont": {"color": colours.muted, "size": 12},
            "tickformat": ",d" if colour == "age" else ".3~g",
            "thickness": 12,
            "outlinewidth": 0,
            "len": 1,
            "x": 1.01,
        },
    )


def _own_range(colour: Colour, grid: NDArray[np.float32]) -> tuple[float, float]:
    if colour == "score":
        return stats.robust_range(grid)
    finite = grid[np.isfinite(grid)]
    return 0.0, stats.nice_ceiling(float(finite.max()) if finite.size else 1.0)


def _subtitle(layer: Any, info: LayerInfo, cells: CellGrid) -> str:
    live = int((layer.col_indices[0] >= 0).sum()) if info.R else 0
    text = f"{info.R} × {info.C} blocks of {info.B} × {info.B}, {live} per row"  # noqa: RUF001
    if info.C:
        text += f" ({live / info.C:.0%} dense)"
    if cells.aggregated:
        text += f"; one cell sums up {cells.row_step} × {cells.column_step} blocks"  # noqa: RUF001
    return text
