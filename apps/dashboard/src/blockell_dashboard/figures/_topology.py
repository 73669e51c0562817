"""The topology heatmap: which blocks of a weight exist, and what is known about each.

R block rows (output side), C block columns (input side), K slots per row, B tile side.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from blockell_format.snapshots import LayerInfo, LayerSnapshot

from .. import stats
from ._cells import CellGrid, legend_entry
from ._theme import Palette, Theme, apply_layout, palette

__all__ = ["COLOURS", "Colour", "topology_heatmap"]

Colour = Literal["age", "score", "change"]
COLOURS: tuple[Colour, ...] = ("age", "score", "change")

# Both scales are perceptually uniform and readable with any colour deficiency; two different ones,
# so that an age map is never taken for a score map.
_SCALES = {"age": "Viridis", "score": "Cividis"}
_COLOUR_TITLES = {"age": "age<br>(steps)", "score": "score"}
_TITLES = {"age": "Block age", "score": "Block score", "change": "Born, died and kept"}
_NOT_FINITE = "#cc79a7"
_MAX_SYMBOLS = 4000
_MAX_SYMBOL_SIDE = 200


def topology_heatmap(
    layer: LayerSnapshot,
    info: LayerInfo,
    *,
    colour: Colour = "age",
    value_range: tuple[float, float] | None = None,
    step: int | None = None,
    theme: Theme = "light",
    max_cells_per_side: int = 500,
    height: int = 540,
) -> go.Figure:
    """Draw the [R, C] grid of block positions of one layer at one step.

    Args:
        layer: arrays of the layer, [R, K] each.
        info: name and sizes of the layer.
        colour: "age" (steps since the block was born), "score" (what keeps it alive) or
            "change" (born, died or kept at this decision).
        value_range: ends of the colour scale; give the same ones at every step to compare steps.
            By default the range of this snapshot.
        step: shown in the title.
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
    change_grid = stats.change_grid(
        layer.col_indices, layer.swapped, layer.previous_columns, info.C
    )
    changes = stats.tile_grid(change_grid, max_cells_per_side)
    age = stats.tile_grid(age_grid, max_cells_per_side).values
    score = stats.tile_grid(score_grid, max_cells_per_side).values
    cells = CellGrid(changes, info)

    fig = go.Figure()
    if colour == "change":
        counts = np.bincount(change_grid.ravel(), minlength=len(stats.CHANGE_NAMES))
        _draw_changes(fig, cells, changes.values, counts, age, score, colours, height)
    else:
        values, grid = (age, age_grid) if colour == "age" else (score, score_grid)
        ends = value_range or _own_range(colour, grid)
        _draw_values(fig, cells, colour, values, changes.values, age, score, ends, colours)
    return apply_layout(
        fig,
        theme,
        title=_TITLES[colour] + ("" if step is None else f" at step {step:,}"),
        subtitle=_subtitle(layer, info, cells),
        x_title="block column (input side)",
        y_title="block row (output side)",
        height=height,
        plot_bgcolor=colours.absent,
        xaxis={"showgrid": False, "range": cells.axis_range(info.C, cells.column_step)},
        yaxis={"showgrid": False, "range": cells.axis_range(info.R, cells.row_step)[::-1]},
    )


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


def _draw_changes(
    fig: go.Figure,
    cells: CellGrid,
    changes: NDArray[np.uint8],
    counts: NDArray[np.int64],
    age: NDArray[np.float32],
    score: NDArray[np.float32],
    colours: Palette,
    height: int,
) -> None:
    kept, born = changes == stats.KEPT, changes == stats.BORN
    died, absent = changes == stats.DIED, changes == stats.ABSENT
    if not cells.large:
        cells.add_plain(fig, absent, colours.absent, stats.CHANGE_NAMES[stats.ABSENT])
    cells.add_plain(fig, died, colours.second, "<b>died</b> at this decision")
    z = np.full(changes.shape, np.nan, dtype=np.float32)
    z[kept], z[born] = 0, 1
    text = np.where(born, "<b>born</b> at this decision", "kept")
    scale = [[0, colours.kept], [0.5, colours.kept], [0.5, colours.first], [1, colours.first]]
    cells.add_blocks(
        fig, z, age, score, text=text, colorscale=scale, zmin=0, zmax=1, showscale=False
    )
    drawable = max(changes.shape, default=0) <= _MAX_SYMBOL_SIDE
    if drawable and int((born | died).sum()) <= _MAX_SYMBOLS:
        cells.add_symbols(fig, born, "cross-thin", colours.background, height)
        cells.add_symbols(fig, died, "x-thin", colours.background, height)
    legend_entry(fig, f"born ({counts[stats.BORN]:,})", "square-cross", colours.first, colours)
    legend_entry(fig, f"died ({counts[stats.DIED]:,})", "square-x", colours.second, colours)
    legend_entry(fig, "kept", "square", colours.kept, colours)
    legend_entry(fig, "no block", "square", colours.absent, colours)


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
