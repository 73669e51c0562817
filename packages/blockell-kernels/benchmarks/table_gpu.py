"""Writes the dispatcher's table from the grids that `grid_gpu.py` measured.

    python table_gpu.py results/*.csv ../src/blockell_kernels/_triton/measured.json

Of every shape, density by density, log2 of the sparse kernel's time over that of the dense product
with the weight scattered first, and over that of the dense product alone, which counts where
another product has scattered the weight already. Where several grids measured the same product, the
last counts. Files of `whole_gpu.py` give one ratio per shape, tile and direction: the time of the
product by the whole weight, cut as the package cuts it, to that of the dense product alone, at half
density; grids that hold `whole_us` one per density, and their `sparse_us` is that of other kernels.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from blockell_kernels._gluon import _whole

ARITHMETIC = {"bfloat16": "half", "float32": "float32", "3xtf32": "3xtf32", "tf32": "tf32"}
SMS = 132
"""Multiprocessors of the GPU that was measured."""
DISTURBED = 0.9
"""Of a dense product's time alone: one with a copy that took less shows that the former was
disturbed, and the row is left out."""
LIMIT = 3.0
"""Octaves beyond which it does not matter by how much one wins."""


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


def share(sparse_us: float, dense_us: float) -> float:
    """log2 of the sparse time over the dense one, bounded."""
    return round(min(LIMIT, max(-LIMIT, math.log2(sparse_us / dense_us))), 2)


def by_whole_weight(rows: list[dict[str, str]]) -> dict[str, dict[tuple[int, ...], float]]:
    """Octaves at half density, by direction, arithmetic and tile, and by shape (N, in, out)."""
    times: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        case = tuple(row[name] for name in ("direction", "B", "N", "in", "out"))
        times[case][row["way"]] = float(row["us"])
    found: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for (direction, tile, *sizes), us in times.items():
        B, N, inp, out = int(tile), *map(int, sizes)
        outputs, depth = (out, inp) if direction == "forward" else (inp, out)
        ways = ["values"]
        if direction != "grad_values":
            ways = [f"{c.pieces}x{c.parts}" for c in _whole.cuts(N, outputs, depth, B, SMS)]
        way = next(way for way in ways if way in us)
        found[f"{direction} half {B}"][N, inp, out] = share(us[way], us["dense"])
    return found


def main(grids: list[str], target: str) -> None:
    points = defaultdict(lambda: defaultdict(dict))
    several: dict[str, dict[tuple[int, ...], dict[float, list[float]]]]
    several = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    at_half: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    devices, sources = set(), []
    for grid in grids:
        header, rows = read(Path(grid))
        devices.add(header.split(",")[0])
        sources.append(header)
        if "way" in rows[0]:
            for key, by_shape in by_whole_weight(rows).items():
                at_half[key] |= by_shape
            continue
        for row in rows:
            if row["direction"] == "layer":
                continue
            B, kind = int(row["B"]), ARITHMETIC[row["dtype"]]
            key = f"{row['direction']} {kind} {B}x{B * int(row['row_group'])}"
            shape = (int(row["N"]), int(row["in"]), int(row["out"]))
            # Where the dense product alone was slower, the one with the copy was not measured.
            copied = float(row["fallback_us"] or row["dense_us"])
            sparse, dense = float(row["sparse_us"]), float(row["dense_us"])
            if copied < DISTURBED * dense:
                continue
            density = round(float(row["density"]), 3)
            points[key][shape][density] = [share(sparse, copied), share(sparse, dense)]
            if row.get("whole_us"):
                found = several[f"{row['direction']} {kind} {B}"][shape]
                found[density].append(math.log2(float(row["whole_us"]) / dense))
    whole = {
        key: {shape: [[0.5, octaves]] for shape, octaves in by_shape.items()}
        | {
            shape: [[d, round(statistics.median(o), 2)] for d, o in sorted(by_density.items())]
            for shape, by_density in several[key].items()  # of all structures
        }
        for key, by_shape in at_half.items()
    }
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
    by_whole = ",\n".join(
        f"{json.dumps(key)}: "
        + json.dumps([[*s, points] for s, points in sorted(found.items())], separators=(",", ":"))
        for key, found in sorted(whole.items())
    )
    text = f'{{{head},\n"whole": {{\n{by_whole}\n}},\n"rows": {{\n{body}\n}}}}\n'
    Path(target).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
