"""Draws what methods keep of the old task against what they learn of the new one, as SVG.

    python draw_retention.py RUN_DIR_OR_JSONL... --out curves.svg

One line per method, architecture and rate through the values of its dial; a point is the mean over
seeds, its cross the standard deviation both ways. With --tables the tables of `titanmac continual`
and, in Markdown, a line per seed are printed as well. Needs nothing beyond titanmac_integration.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from titanmac_integration._protocol._records import read_records
from titanmac_integration._protocol._summary import describe, summarise
from titanmac_integration._protocol._tables import retention_tables

WIDTH, HEIGHT = 920, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 310, 30, 60
COLOURS = {
    "ours": "#d62728",
    "ours-grown": "#ff7f0e",
    "ours-damped": "#7b0d1e",
    "ours-every-step": "#ffbb78",
    "ours-rehearsing": "#e6009e",
    "ours-recalling": "#7a0177",
    "ours-fixed-eps": "#c49c94",
    "dense-projection": "#8c564b",
    "kronecker-ewc": "#1f77b4",
    "ewc": "#17becf",
    "l2": "#9467bd",
    "low-rate": "#7f7f7f",
    "fine-tuning": "#000000",
    "self-rehearsal": "#2ca02c",
    "real-rehearsal": "#98df8a",
    "joint": "#bcbd22",
    "freeze-and-grow": "#a9a9a9",
    "rigl": "#c7c7c7",
}


def draw(group: dict[str, Any], lowest: float, highest: float) -> str:
    """The figure of one setting; the new task's loss is cut at `highest` nats."""
    x = _scale(lowest, highest, LEFT, WIDTH - RIGHT)
    y = _scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(11):
        value = tick / 10
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "#e6e6e6"))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:.0%}", "end"))
    step = next(s for s in (0.05, 0.1, 0.2, 1.0, math.inf) if (highest - lowest) / s < 13)
    value = math.ceil(lowest / step) * step
    while value <= highest + 1e-9:
        parts.append(_line(x(value), TOP, x(value), HEIGHT - BOTTOM, "#e6e6e6"))
        parts.append(_text(x(value), HEIGHT - BOTTOM + 18, f"{value:.2f}", "middle"))
        value += step
    first, *later = group["tasks"]
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = f"loss of {' and '.join(later)}, nats (lower is better)"
    parts.append(_text(middle, HEIGHT - 16, label, "middle"))
    parts.append(
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{first} kept</text>'
    )
    names = sorted({_line_of(row) for row in group["rows"]})
    row_y = TOP + 10.0
    for name in names:
        method, arch, rate = name
        rows = [r for r in group["rows"] if _line_of(r) == name]
        rows = [r for r in rows if r["new_nats"]["mean"] <= highest]
        if not rows:
            continue
        rows.sort(key=lambda row: (row["dial"] is None, row["dial"] or 0.0))
        colour = COLOURS.get(method, "#444444")
        dashes = ' stroke-dasharray="5 4"' if arch in ("dense", "narrow") else ""
        dialled = [r for r in rows if r["dial"] is not None]
        points = " ".join(f"{x(_nats(r)):.1f},{y(_kept(r)):.1f}" for r in dialled)
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.5"{dashes}'
        parts.append(f'<polyline points="{points}" {stroke}/>')
        for row in rows:
            parts += _cross(row, x, y, colour, large=row["dial"] is None)
        legend = WIDTH - RIGHT + 16
        parts.append(
            f'<line x1="{legend}" y1="{row_y}" x2="{legend + 24}" y2="{row_y}" stroke="{colour}" '
            f'stroke-width="3"{dashes}/>'
        )
        if rate:
            parts.append(_point(legend + 12, row_y, 5, colour, hollow=True))
        seeds = max(len(row["seeds"]) for row in rows)
        where = f"{arch}, rate {rate:g}" if rate else arch
        label = f"{method}, {where} ({seeds} seed{'s' if seeds > 1 else ''})"
        parts.append(_text(legend + 30, row_y + 4, label, "start"))
        row_y += 20
    return "\n".join((*parts, "</svg>", ""))


def _line_of(row: dict[str, Any]) -> tuple[str, str, float]:
    """Method, architecture and a rate of its own (0: none): what is drawn as one line."""
    return row["method"], row["arch"], row.get("rate") or 0.0


def _nats(row: dict[str, Any]) -> float:
    return float(row["new_nats"]["mean"])


def _kept(row: dict[str, Any]) -> float:
    return min(1.0, max(0.0, row["kept"]["mean"]))


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _cross(row: dict[str, Any], x: Any, y: Any, colour: str, *, large: bool) -> list[str]:
    centre_x, centre_y = x(_nats(row)), y(_kept(row))
    parts = []
    if row["new_nats"]["sd"] is not None:
        reach = row["new_nats"]["sd"]
        ends = [x(_nats(row) + side) for side in (-reach, reach)]
        ends = [min(max(end, LEFT), WIDTH - RIGHT) for end in ends]
        parts.append(_line(ends[0], centre_y, ends[1], centre_y, colour))
        low = max(0.0, _kept(row) - row["kept"]["sd"])
        high = min(1.0, _kept(row) + row["kept"]["sd"])
        parts.append(_line(centre_x, y(low), centre_x, y(high), colour))
    radius = 6 if large else 3
    return [*parts, _point(centre_x, centre_y, radius, colour, hollow=bool(row.get("rate")))]


def _point(x: float, y: float, radius: int, colour: str, *, hollow: bool) -> str:
    """A point; hollow where a method had a learning rate of its own."""
    look = f'fill="white" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {look}/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="run directories or .jsonl files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="print the tables, too")
    parser.add_argument("--lowest", type=float, help="left edge, nats (default: what there is)")
    parser.add_argument("--highest", type=float, help="right edge, nats (default: what there is)")
    arguments = parser.parse_args()
    records = read_records(arguments.paths)
    summary = summarise(records)
    settings = list(summary["settings"].values())
    if len(settings) != 1:
        parser.error(f"the records must be of one setting, not of {len(settings)}")
    nats = [row["new_nats"] for row in settings[0]["rows"]]
    ends = [each["mean"] + side * (each["sd"] or 0.0) for each in nats for side in (-1, 1)]
    lowest = min(ends) - 0.02 if arguments.lowest is None else arguments.lowest
    highest = max(ends) + 0.02 if arguments.highest is None else arguments.highest
    arguments.out.write_text(draw(settings[0], lowest, highest), encoding="utf-8")
    print(arguments.out)
    if arguments.tables:
        print(retention_tables(summary), "", seed_table(records), sep="\n")


def seed_table(records: list[dict[str, Any]]) -> str:
    """One line of Markdown per cell: what is kept of the first task, what the others cost."""
    lines = [
        "| method | dial | seed | learned | lowest | at the end | forgotten | change of its NLL | "
        "new task, nats: test / validation | where validation is best: step, test / validation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(
        records,
        key=lambda r: (r["method"], r["arch"], r["dial"] or 0, r.get("rate") or 0, r["seed"]),
    ):
        cell = describe(record)
        dial = "auto" if record["dial"] is None else f"{record['dial']:g}"
        dial += f", lr {record['rate']:g}" if record.get("rate") else ""
        lines.append(
            f"| {record['method']}@{record['arch']} | {dial} | {record['seed']} | "
            f"{cell['first_learned']:.1%} | {cell['first_lowest']:.1%} | "
            f"{cell['first_at_end']:.1%} | {cell['relative_forgetting']:.1%} | "
            f"{cell['first_nats_change']:+.3f} | "
            f"{cell['new_nats']:.4f} / {cell['validation_new_nats']:.4f} | {_stopped(record)} |"
        )
    return "\n".join(lines)


def _stopped(record: dict[str, Any]) -> str:
    """The last task at the best moment of its training; records before 2026-11-28 cannot say."""
    if not record.get("curve"):
        return ""
    best = min(record["curve"][-1], key=lambda at: at["validation_nats"])
    return f"{best['step']}, {best['nats']:.4f} / {best['validation_nats']:.4f}"


if __name__ == "__main__":
    main()
