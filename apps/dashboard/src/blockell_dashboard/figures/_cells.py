"""Pieces of the topology heatmap: cells, their coordinates, their hover text.

R block rows, C block columns, B tile side. A drawn cell is one block position, or a tile of
positions when the grid is too large to draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from blockell_format.snapshots import LayerInfo

from .. import stats
from ._theme import Palette

__all__ = ["CellGrid", "legend_entry"]

LARGE = 40_000
"""Above this many cells, a figure carries less per cell, so that browsers stay quick."""


class CellGrid:
    """Where the drawn cells lie, in blocks and in weights, and how they are added to a figure."""

    def __init__(self, tiles: stats.Tiles, info: LayerInfo) -> None:
        self.rows, self.columns = tiles.values.shape
        self.row_step, self.column_step = tiles.row_step, tiles.column_step
        self.aggregated = tiles.aggregated
        self.large = self.rows * self.columns > LARGE
        self._info = info

    def axis_range(self, side: int, step: int) -> list[float]:
        """Ends of an axis that shows `side` blocks in cells of `step` blocks."""
        return [-0.5 * step, (-(-side // step) - 0.5) * step]

    def weight_slices(self) -> list[NDArray[np.float32]]:
        """Four grids: first and last + 1 weight row, first and last + 1 weight column."""
        B, R, C = self._info.B, self._info.R, self._info.C
        rows = np.arange(self.rows)[:, None] * self.row_step
        columns = np.arange(self.columns)[None, :] * self.column_step
        ends = (
            rows,
            np.minimum(rows + self.row_step, R),
            columns,
            np.minimum(columns + self.column_step, C),
        )
        shape = self.rows, self.columns
        return [np.broadcast_to((end * B).astype(np.float32), shape) for end in ends]

    def add_blocks(
        self,
        fig: go.Figure,
        z: NDArray[np.float32],
        age: NDArray[np.float32],
        score: NDArray[np.float32],
        *,
        kind: str = "",
        **heatmap: Any,
    ) -> None:
        """Add the cells that hold a block (z is NaN elsewhere), with age and score on hover.

        `kind` is the hover text's line that uses the short `text` of each cell as %{text}.
        """
        mean = "mean " if self.aggregated else ""
        hover = (
            f"{mean}age <b>%{{customdata[0]:,.0f}}</b> steps<br>"
            f"{mean}score <b>%{{customdata[1]:.4g}}</b>"
        )
        if kind:
            hover = f"{kind}<br>{hover}"
        self._add(fig, z, [age, score], hover, heatmap)

    def add_plain(self, fig: go.Figure, mask: NDArray[np.bool_], colour: str, label: str) -> None:
        """Add the cells of `mask` in one colour with one label, such as "no block"."""
        z = np.where(mask, np.float32(0), np.float32(np.nan))
        scale = {"colorscale": [[0, colour], [1, colour]], "zmin": 0, "zmax": 1}
        self._add(fig, z, [], label, {**scale, "showscale": False})

    def add_symbols(
        self, fig: go.Figure, mask: NDArray[np.bool_], symbol: str, colour: str, height: int
    ) -> None:
        """Put a symbol on each cell of `mask`, so that colour does not carry the meaning alone."""
        rows, columns = np.nonzero(mask)
        size = float(np.clip(0.5 * min(height / self.rows, 700 / self.columns), 4, 12))
        fig.add_trace(
            go.Scatter(
                x=columns * self.column_step,
                y=rows * self.row_step,
                mode="markers",
                marker={
                    "symbol": symbol,
                    "size": size,
                    "color": colour,
                    "line": {"color": colour, "width": 1.6},
                },
                hoverinfo="skip",
                showlegend=False,
            )
        )

    def _add(
        self,
        fig: go.Figure,
        z: NDArray[np.float32],
        details: list[NDArray[np.float32]],
        hover: str,
        heatmap: dict[str, Any],
    ) -> None:
        start = "row %{y:d}, column %{x:d}"
        if self.aggregated:
            start = "rows from %{y:d}, columns from %{x:d}"
        if self.large:  # let the reader multiply: four more numbers per cell would cost seconds
            B = self._info.B
            height, width = self.row_step * B, self.column_step * B
            weights = f"weight[{B}*%{{y:d}} + 0:{height}, {B}*%{{x:d}} + 0:{width}]"
        else:
            n = len(details)
            details = [*details, *self.weight_slices()]
            rows, columns = (
                f"%{{customdata[{at}]:d}}:%{{customdata[{at + 1}]:d}}" for at in (n, n + 2)
            )
            weights = f"weight[{rows}, {columns}]"
        gap = 1 if max(self.rows, self.columns) <= 100 else 0
        fig.add_trace(
            go.Heatmap(
                z=z,
                customdata=np.stack(details, axis=-1) if details else None,
                hovertemplate=f"{start}<br>{hover}<br>{weights}<extra></extra>",
                hoverongaps=False,
                x0=0,
                dx=self.column_step,
                y0=0,
                dy=self.row_step,
                xgap=gap,
                ygap=gap,
                **heatmap,
            )
        )


def legend_entry(fig: go.Figure, name: str, symbol: str, colour: str, border: Palette) -> None:
    """Add a legend line for a kind of cell."""
    fig.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=name,
            marker={
                "symbol": symbol,
                "size": 11,
                "color": colour,
                "line": {"color": border.muted, "width": 0.5},
            },
        )
    )
