"""Writes the dispatcher's table from the grids that `grid_gpu.py` measured.

    python table_gpu.py results/*.csv ../src/blockell_kernels/_triton/measured.json

Of every shape, density by density, log2 of the sparse kernel's time over that of the dense product
with the weight scattered first, and over that of the dense product alone, which counts where
another product has scattered the weight already. Where several grids measured the same product, the
last counts.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

ARITHMETIC = {"bfloat16": "half", "float32": "float32", "3xtf32": "3xtf32", "tf32": "tf32"}
LIMIT = 3.0
"""Octaves beyond which it does not matter by how much one wins."""


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


def share(sparse_us: float, dense_us: float) -> float:
    """log2 of the sparse time over the dense one, bounded."""
    return round(min(LIMIT, max(-LIMIT, math.log2(sparse_us / dense_us))), 2)


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
            copied = float(row["fallback_us"] or row["dense_us"])
            sparse, dense = float(row["sparse_us"]), float(row["dense_us"])
            density = round(float(row["density"]), 3)
            points[key][shape][density] = [share(sparse, copied), share(sparse, dense)]
    assert len(devices) == 1, f"grids of several devices: {devices}"
    lines = []
    for key, shapes in sorted(points.items()):
        rows = [
            [*shape, [[density, *found] for density, found in sorted(by_density.items())]]
            for shape, by_density in sorted(shapes.items())
        ]
        lines.append(f"{json.dumps(key)}: {json.dumps(rows, separators=(',', ':'))}")
    head = f'"device": {json.dumps(devices.pop())},\n"sources": {json.dumps(sources, indent=1)}'
    body = ",\n".join(lines)
    Path(target).write_text(f'{{{head},\n"rows": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
