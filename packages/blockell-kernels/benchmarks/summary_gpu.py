"""Markdown tables from the grids that `grid_gpu.py` measured.

    python summary_gpu.py --redispatch results/h200-bfloat16-all-densities.csv

A cell is the speed-up over the dense product of the same run, and whether the goal beside it was
reached; `*` marks a product that the dispatcher computes densely. Several files are joined: the
shards of one grid.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTIONS = ("forward", "grad_input", "grad_values")
TOKENS = (31, 64, 128, 384, 1024, 4096, 65536)
"""The last of each range of tokens that layers are counted by."""


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The header's facts and the rows of one grid."""
    header, *lines = path.read_text().splitlines()
    return header.lstrip("# "), list(csv.DictReader(lines))


GOALS = {
    # (tile, row_group, density): forward, grad_input, grad_values, layer; then the largest shapes'
    (128, 1, 0.5): ((1.6, 1.5, 1.5, 1.5), (1.8, 1.8, 1.8, 1.5)),
    (128, 1, 0.25): ((2.2, 2.2, 2.2, 2.2), (3.2, 3.2, 3.2, 2.2)),
    (64, 2, 0.5): ((1.5, 1.4, 1.4, 0.95),) * 2,
    (64, 2, 0.25): ((2.0, 2.0, 2.0, 0.95),) * 2,
    (64, 1, 0.5): ((1.5, 1.4, 1.4, 0.95),) * 2,
    (64, 1, 0.25): ((2.0, 2.0, 2.0, 0.95),) * 2,
    (32, 4, 0.5): ((1.5, 1.2, 1.4, 0.95),) * 2,
    (32, 4, 0.25): ((2.0, 1.6, 2.0, 0.95),) * 2,
    (16, 8, 0.5): ((1.35, 1.1, 1.3, 0.95),) * 2,
    (16, 8, 0.25): ((1.9, 1.5, 1.8, 0.95),) * 2,
    (16, 1, 0.25): ((0.95,) * 4, (1.1, 0.95, 0.95, 0.95)),
}
NEVER_SLOWER = ((0.95,) * 4,) * 2
NAMED = {(8192, 640, 2560), (8192, 2560, 640), (65536, 640, 2560), (65536, 2560, 640)}
LARGEST = {(8192, 4096, 14336), (8192, 14336, 4096)}


def goal(key: tuple[int, int, float], shape: tuple[str, ...], column: int) -> float:
    """What a cell is to reach; for shapes and structures without a goal of their own 0.95."""
    sizes = tuple(map(int, shape))
    if sizes not in NAMED | LARGEST:
        return 0.95
    return GOALS.get(key, NEVER_SLOWER)[sizes in LARGEST][column]


def goals_table(rows: list[dict[str, str]], shapes: list[tuple[str, ...]]) -> tuple[str, int, int]:
    """One line per structure, density and direction: the goal, what was measured, whether reached.

    Also how many cells there are, and how many reached their goal.
    """
    cells = by_cell(rows)
    head = " | ".join(f"{n}, {i} -> {o}" for n, i, o in shapes)
    lines = [f"| structure, density, product | goal | {head} |", "|---|---|" + "---|" * len(shapes)]
    total = reached = 0
    for key in sorted(cells, key=lambda k: (-k[2], -k[0], -k[1])):
        for column, direction in enumerate((*DIRECTIONS, "layer")):
            texts, goals = [], []
            for shape in shapes:
                row = cells[key].get(shape, {}).get(direction)
                if row is None:
                    texts.append("")
                    continue
                wanted, measured = goal(key, shape, column), float(row["speedup"])
                goals.append(wanted)
                good = measured >= wanted - 0.005
                total, reached = total + 1, reached + good
                mark = "" if "triton" in row["chosen"] else "*"
                texts.append(f"{measured:.2f}{mark} {'reached' if good else 'no'}")
            if goals:
                wanted = " or ".join(f"{g:g}" for g in sorted(set(goals)))
                name = f"{key[0]}x{key[1]}, {key[2]:.0%}, {direction}"
                lines.append(f"| {name} | {wanted} | {' | '.join(texts)} |")
    return "\n".join(lines), total, reached


def families(rows: list[dict[str, str]]) -> str:
    """How many cells of each structure and product reach their goals, at 25% and 50%."""
    counts: dict[tuple[int, int], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key, found in by_cell(rows).items():
        for shape, by_direction in found.items():
            if key[2] not in (0.25, 0.5) or tuple(map(int, shape)) not in NAMED | LARGEST:
                continue
            for column, direction in enumerate((*DIRECTIONS, "layer")):
                if direction in by_direction:
                    speedup = float(by_direction[direction]["speedup"])
                    good = speedup >= goal(key, shape, column) - 0.005
                    counts[key[:2]][direction].append(good)
    lines = ["| tile x row_group | " + " | ".join((*DIRECTIONS, "layer")) + " |", "|---" * 5 + "|"]
    for B, G in sorted(counts, reverse=True):
        found = counts[B, G]
        cells = [f"{sum(found[d])} of {len(found[d])}" for d in (*DIRECTIONS, "layer")]
        lines.append(f"| {B}x{G} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_cell(rows: list[dict[str, str]]) -> dict[tuple, dict]:
    """Rows by (tile, row_group, density), then shape, then direction."""
    cells: dict[tuple, dict] = defaultdict(dict)
    for row in rows:
        shape = (row["N"], row["in"], row["out"])
        key = (int(row["B"]), int(row["row_group"]), round(asked(row), 2))
        cells[key].setdefault(shape, {})[row["direction"]] = row
    return cells


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
    cells = by_cell(rows)
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


def shares(rows: list[dict[str, str]], name: str, group: Callable[[dict[str, str]], Any]) -> str:
    """Layers by group, in the order of the groups: how many are within 5% and 10% of dense."""
    lines = [
        f"| {name} | layers | within 5% of dense or faster | within 10% | slowest |",
        "|---" * 5 + "|",
    ]
    groups = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    for key in [*sorted(groups), None]:
        found = rows if key is None else groups[key]
        speedups = [float(row["speedup"]) for row in found]
        within = [sum(s >= limit for s in speedups) / len(speedups) for limit in (0.95, 0.9)]
        slowest = min(found, key=lambda row: float(row["speedup"]))
        words = "all" if key is None else key if isinstance(key, str) else key[-1]
        lines.append(
            f"| {words} | {len(found)} | {within[0]:.0%} | {within[1]:.0%} | "
            f"{float(slowest['speedup']):.2f}: {slowest['N']}, {slowest['in']} -> "
            f"{slowest['out']}, {slowest['B']}x{slowest['row_group']}, {asked(slowest):.0%} |"
        )
    return "\n".join(lines)


def by_tokens(row: dict[str, str]) -> tuple[int, str]:
    """The range of its tokens."""
    last = next(limit for limit in TOKENS if limit >= int(row["N"]))
    at = TOKENS.index(last)
    return last, f"{TOKENS[at - 1] + 1 if at else 1} to {last}"


def by_shape(row: dict[str, str]) -> tuple[int, int, int, str]:
    n, i, o = (int(row[name]) for name in ("N", "in", "out"))
    return n, i, o, f"{n}, {i} -> {o}"


def measured_shapes() -> set[tuple[int, int, int]]:
    """Those of the dispatcher's table, in 16-bit floats."""
    from blockell_kernels._triton._rule import table as measured

    rows = measured()["rows"]
    return {tuple(row[:3]) for key in rows if " half " in key for row in rows[key]}


def dispatcher(rows: list[dict[str, str]]) -> str:
    """The tables about layers against dense."""
    layers = [row for row in rows if row["direction"] == "layer"]
    held = measured_shapes()
    wide = [row for row in layers if row["B"] != "8"]
    others = [row for row in layers if by_shape(row)[:3] not in held]
    medium = [row for row in layers if 32 <= int(row["N"]) <= 2048]
    tables = [
        shares(layers, "tokens", by_tokens),
        "Without tile 8:\n\n" + shares(wide, "tokens", by_tokens),
        shares(layers, "density", lambda row: (asked(row), f"{asked(row):.0%}")),
        shares(
            layers,
            "tile x row_group",
            lambda row: (-int(row["B"]), -int(row["row_group"]), f"{row['B']}x{row['row_group']}"),
        ),
    ]
    if medium:
        found = shares(medium, "density", lambda row: (asked(row), f"{asked(row):.0%}"))
        tables.append(f"32 to 2048 tokens:\n\n{found}")
    if others:
        tables.append("Not in the table:\n\n" + shares(others, "shape", by_shape))
    return "\n\n".join(tables)


def redispatch(rows: list[dict[str, str]]) -> None:
    """Let today's table decide about the products of a run; layers stay as they were measured."""
    import torch

    from blockell_kernels._backends import Case
    from blockell_kernels._triton._rule import takes_whole, verdict

    for row in rows:
        if row["direction"] == "layer":
            continue
        n, i, o, B, G, K = (int(row[name]) for name in ("N", "in", "out", "B", "row_group", "K"))
        dtype, meta = getattr(torch, row["dtype"]), torch.device("meta")
        case = Case(row["direction"], meta, dtype, n, o // B, i // B, K, B, G)
        row["chosen"] = "triton" if verdict(case).wins else "dense"
        sparse = "whole_us" if row.get("whole_us") and takes_whole(case) else "sparse_us"
        row["auto_us"] = row[sparse if row["chosen"] == "triton" else "fallback_us"]
        row["speedup"] = str(float(row["dense_us"]) / float(row["auto_us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--compact", action="store_true", help="all four in one cell, no goals")
    parser.add_argument("--redispatch", action="store_true", help="by today's table")
    arguments = parser.parse_args()
    read_all = [read(path) for path in arguments.grids]
    by_facts = {}  # where several grids measured the same, the last counts
    for _, some in read_all:
        for row in some:
            facts = ("direction", "N", "in", "out", "B", "row_group", "K", "dtype")
            by_facts[tuple(row[name] for name in facts)] = row
    rows = list(by_facts.values())
    if arguments.redispatch:
        redispatch(rows)
    shapes = list(dict.fromkeys((row["N"], row["in"], row["out"]) for row in rows))
    shapes.sort(key=lambda shape: [int(size) for size in shape])
    shown = [row for row in rows if round(asked(row), 2) in arguments.densities]
    print("; ".join(dict.fromkeys(facts for facts, _ in read_all)) + "\n")
    if arguments.compact:
        print(table(shown, shapes))
        return
    named = [s for s in shapes if tuple(map(int, s)) in NAMED | LARGEST]
    text, total, reached = goals_table(shown, named)
    print(f"{families(shown)}\n\n{text}\n\n{reached} of {total} cells reach their goal.\n")
    print(dispatcher(rows))


if __name__ == "__main__":
    main()
