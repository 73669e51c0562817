"""Markdown tables from the grids that `grid_gpu.py` measured.

    python summary_gpu.py results/h200-bfloat16.csv

A cell reads forward / grad_input / grad_values / layer, each as speed-up over the dense product of
the same run; `*` marks a product that the dispatcher computes densely.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

DIRECTIONS = ("forward", "grad_input", "grad_values")


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


def cell(rows: dict[str, dict[str, str]]) -> str:
    """One cell: the three products and the layer."""
    parts = []
    for direction in DIRECTIONS:
        row = rows[direction]
        mark = "" if row["chosen"] == "triton" else "*"
        parts.append(f"{float(row['speedup']):.2f}{mark}")
    return " / ".join([*parts, f"{float(rows['layer']['speedup']):.2f}"])


def table(rows: list[dict[str, str]], shapes: list[tuple[str, ...]]) -> str:
    """One table: structures and densities down, shapes across."""
    cells: dict[tuple, dict] = defaultdict(dict)
    for row in rows:
        shape = (row["N"], row["in"], row["out"])
        key = (int(row["B"]), int(row["row_group"]), round(asked(row), 2))
        cells[key].setdefault(shape, {})[row["direction"]] = row
    head = " | ".join(f"{n}, {i} -> {o}" for n, i, o in shapes)
    lines = [f"| tile x row_group, density | {head} |", "|---|" + "---|" * len(shapes)]
    for B, G, density in sorted(cells, key=lambda k: (k[2], -k[0], -k[1])):
        found = cells[B, G, density]
        texts = [cell(found[s]) if len(found.get(s, ())) == 4 else "" for s in shapes]
        if any(texts):
            lines.append(f"| {B}x{G}, {density:.0%} | {' | '.join(texts)} |")
    return "\n".join(lines)


def asked(row: dict[str, str]) -> float:
    """The density asked for: the measured one is K/C, rounded to whole blocks."""
    density = float(row["density"])
    return min((0.05, 0.1, 0.25, 0.5, 0.75, 1.0), key=lambda d: abs(d - density))


def worst(rows: list[dict[str, str]]) -> str:
    """The dispatcher's slowest cells against dense, by number of tokens."""
    lines = [
        "| tokens | cells | within 5% of dense or faster | slowest cell |",
        "|---|---|---|---|",
    ]
    groups = defaultdict(list)
    for row in rows:
        if row["direction"] != "layer":
            groups[int(row["N"])].append(row)
    for N, group in sorted(groups.items()):
        good = sum(float(row["speedup"]) >= 0.95 for row in group)
        row = min(group, key=lambda row: float(row["speedup"]))
        lines.append(
            f"| {N} | {len(group)} | {good / len(group):.0%} | {float(row['speedup']):.2f}: "
            f"{row['direction']}, {row['in']} -> {row['out']}, {row['B']}x{row['row_group']}, "
            f"{float(row['density']):.0%}, {row['chosen']} {float(row['auto_us']):.1f} us, dense "
            f"{float(row['dense_us']):.1f} us |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--min-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    facts, rows = read(arguments.grid)
    shapes = dict.fromkeys((row["N"], row["in"], row["out"]) for row in rows)
    shown = [s for s in shapes if int(s[0]) >= arguments.min_tokens]
    print(f"{facts}\n\n{table(rows, shown)}\n\n{worst(rows)}")


if __name__ == "__main__":
    main()
