"""Writes the dispatcher's table from the grids that `grid_gpu.py` measured.

    python break_even.py results/*.csv ../src/blockell_kernels/_triton/break_even.json

The break-even density is where the line between two measured densities crosses equality of the
sparse kernel and the scattered dense product; where the sparse kernel won at every density, the
highest that was measured.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

ARITHMETIC = {"bfloat16": "half", "float32": "float32", "tf32": "tf32"}


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


def break_even(points: list[tuple[float, float]]) -> float:
    """From (density, dense time over sparse time) the density at which that ratio is 1."""
    before = (0.0, float("inf"))
    for density, ratio in sorted(points):
        if ratio < 1:
            if before[0] == 0.0:
                return 0.0
            return before[0] + (density - before[0]) * (before[1] - 1) / (before[1] - ratio)
        before = (density, ratio)
    return before[0]


def main(grids: list[str], target: str) -> None:
    points = defaultdict(lambda: defaultdict(list))
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
            ratio = float(row["fallback_us"]) / float(row["sparse_us"])
            points[key][shape].append((float(row["density"]), ratio))
    assert len(devices) == 1, f"grids of several devices: {devices}"
    rows = {
        key: [[*shape, round(break_even(p), 2)] for shape, p in sorted(shapes.items())]
        for key, shapes in sorted(points.items())
    }
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    head = f'"device": {json.dumps(devices.pop())},\n"sources": {json.dumps(sources, indent=1)}'
    Path(target).write_text(f'{{{head},\n"rows": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
