"""Writes the dispatcher's table from the grids that `grid_gpu.py` measured.

    python break_even.py results/*.csv ../src/blockell_kernels/_triton/break_even.json

Two lists of densities are written per shape: against the dense product with the weight scattered
first, and against the dense product alone, which counts where another product has scattered the
weight already. Each holds where the lines of both times cross between two measured densities, or
beyond them where none of them decides: mostly one, several where a sparse kernel for many blocks
takes over from one for few. Where several grids measured the same product, the last counts.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

ARITHMETIC = {"bfloat16": "half", "float32": "float32", "3xtf32": "3xtf32", "tf32": "tf32"}


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


def break_even(points: list[tuple[float, float, float]]) -> list[float]:
    """The rising densities at which the faster changes, from (density, sparse time, dense time).

    The sparse product is the faster below the first; [0] is never, [1] always.
    """
    points = sorted(points)
    wins = [sparse <= dense for _, sparse, dense in points]
    limits = []
    if not wins[0]:
        gains = len(points) == 1 or wins[1]  # the more blocks the better: never for few
        limits.append(0.0 if gains else min(points[0][0], crossing(*points[:2])))
    for low, high in pairwise(range(len(points))):
        if wins[low] != wins[high]:
            limits.append(meeting(points[low], points[high]))
    if wins[-1]:
        last = points[-1][0]
        always = last == 1 or len(points) == 1 or (len(wins) > 1 and not wins[-2])
        limits.append(1.0 if always else max(last, crossing(*points[-2:])))
    return limits


def meeting(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Where the lines through two measurements meet that different kernels win."""
    gap, gap_high = low[2] - low[1], high[2] - high[1]
    return low[0] + (high[0] - low[0]) * gap / (gap - gap_high)


def crossing(low: tuple[float, float, float], high: tuple[float, float, float]) -> float:
    """Where the lines through two measurements meet, from 0 to 1."""
    gap, gap_high = low[2] - low[1], high[2] - high[1]
    if gap <= gap_high:  # the sparse kernel does not lose ground
        return 1.0 if gap_high > 0 else 0.0
    return min(1.0, max(0.0, low[0] + (high[0] - low[0]) * gap / (gap - gap_high)))


def main(grids: list[str], target: str) -> None:
    points = defaultdict(lambda: defaultdict(dict))
    devices, sources = set(), []
    for grid in grids:
        header, rows = read(Path(grid))
        devices.add(header.split(",")[0])
        sources.append(header)
        for row in rows:
            if row["direction"] == "layer":
                continue
            B, kind = int(row["B"]), ARITHMETIC[row["dtype"]]
            key = f"{row['direction']} {kind} {B}x{B * int(row['row_group'])}"
            shape = (int(row["N"]), int(row["in"]), int(row["out"]))
            # Where the dense product alone was slower, the one with the copy was not measured.
            copied = row["fallback_us"] or row["dense_us"]
            times = [float(time) for time in (row["sparse_us"], copied, row["dense_us"])]
            points[key][shape][float(row["density"])] = times
    assert len(devices) == 1, f"grids of several devices: {devices}"
    rows = defaultdict(list)
    for key, shapes in sorted(points.items()):
        for shape, found in sorted(shapes.items()):
            row = [*shape]
            for dense in (1, 2):  # with the copy, and without
                limits = break_even([(d, times[0], times[dense]) for d, times in found.items()])
                row.append([round(limit, 2) for limit in limits])
            rows[key].append(row)
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    head = f'"device": {json.dumps(devices.pop())},\n"sources": {json.dumps(sources, indent=1)}'
    Path(target).write_text(f'{{{head},\n"rows": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
