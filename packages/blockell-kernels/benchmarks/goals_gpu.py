"""Every cell of a grid as CSV: its goal, what was measured, whether it is reached, and its bound.

    python goals_gpu.py results/h200-recount.csv --out results/h200-goals.csv

The bound is what the way that the cell took allows at best. A sparse product: the dense one's time
times the density, or its operands read and written once at `BYTES_PER_US`, whichever is longer. A
dense one: the dense product's time, the copy's traffic (values read, the weight written; for the
weight gradient the other way round) and `LAUNCH_US` for one more kernel. A step: its products,
one copy of the weight. A reason is given where the goal lies beyond the bound or nearly there.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from summary_gpu import DIRECTIONS, asked, goal, read, redispatch

BYTES_PER_US = 4.3e6
"""Of a large copy on an H200, bytes read and written."""
LAUNCH_US = 1.1
"""What a kernel of one store in front of a dense product adds in a CUDA graph: 1.1 us where 640
features come out, 2.0 to 2.3 where 2560 do (8192 tokens, one H200)."""
FIELDS = [
    "N", "in", "out", "B", "row_group", "density", "direction", "goal", "speedup", "reached",
    "bound", "chosen", "auto_us", "dense_us", "allowed_us", "reason",
]  # fmt: skip


def times(row: dict[str, str]) -> tuple[float, float]:
    """(least time of a sparse product, of a dense one with its copy), in microseconds."""
    n, i, o, share = int(row["N"]), int(row["in"]), int(row["out"]), float(row["density"])
    dense, size = float(row["dense_us"]), 4 if row["dtype"] == "float32" else 2
    traffic = size * (n * i + n * o + share * i * o) / BYTES_PER_US
    copy = size * (1 + share) * i * o / BYTES_PER_US + LAUNCH_US
    return max(dense * share, traffic), dense + copy


def bounds(rows: dict[str, dict[str, str]]) -> dict[str, float]:
    """The best speed-up of each product, and of the step, by the way it went."""
    found = {}
    least = 0.0
    names = rows["layer"]["chosen"].split("/")
    for direction, name in zip(DIRECTIONS, names, strict=True):
        sparse, copied = times(rows[direction])
        dense = float(rows[direction]["dense_us"])
        way = sparse if rows[direction]["chosen"] == "triton" else copied
        found[direction] = dense / way
        shared = name == "dense" and direction == "grad_input" and names[0] == "dense"
        least += sparse if name == "triton" else dense if shared else copied
    found["layer"] = float(rows["layer"]["dense_us"]) / least
    return found


def reason(row: dict[str, str], wanted: float, bound: float) -> str:
    """Why a cell misses its goal."""
    auto, allowed = float(row["auto_us"]), float(row["dense_us"]) / wanted
    spare = allowed - float(row["dense_us"])
    if row["chosen"] == "dense" and spare < 0:
        return f"no sparse kernel wins: {float(row['sparse_us']):.1f} us"
    if row["chosen"] == "dense":
        over = auto - float(row["dense_us"])
        return f"the copy and its launch take {over:.1f} us, allowed {spare:.1f}"
    if bound < wanted:
        return "beyond the bound"
    return f"at {float(row['speedup']) / bound:.0%} of the bound"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--redispatch", action="store_true", help="by today's table")
    arguments = parser.parse_args()
    heads, cells = [], defaultdict(dict)
    for grid in arguments.grids:
        head, rows = read(grid)
        heads.append(head)
        if arguments.redispatch:
            redispatch(rows)
        for row in rows:
            names = ("N", "in", "out", "B", "row_group", "density", "dtype")
            cells[tuple(row[name] for name in names)][row["direction"]] = row
    with arguments.out.open("w", newline="") as out:
        out.write("# " + "; ".join(dict.fromkeys(heads)) + "\n")
        writer = csv.DictWriter(out, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for rows in cells.values():
            if len(rows) != len(DIRECTIONS) + 1:
                continue
            limit = bounds(rows)
            for column, (direction, row) in enumerate(sorted(rows.items(), key=order)):
                structure = int(row["B"]), int(row["row_group"]), round(asked(row), 2)
                wanted = goal(structure, (row["N"], row["in"], row["out"]), column)
                reached = float(row["speedup"]) >= wanted - 0.005
                allowed = float(row["dense_us"]) / wanted
                why = "" if reached else reason(row, wanted, limit[direction])
                facts = {"goal": wanted, "reached": "yes" if reached else "no", "reason": why}
                facts |= {"bound": f"{limit[direction]:.2f}", "allowed_us": f"{allowed:.1f}"}
                facts |= {"speedup": f"{float(row['speedup']):.3f}"}
                writer.writerow(row | facts)


def order(item: tuple[str, dict[str, str]]) -> int:
    """Products first, in the order of a step."""
    return [*DIRECTIONS, "layer"].index(item[0])


if __name__ == "__main__":
    main()
