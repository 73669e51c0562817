"""Speed-ups as bars in an SVG file, without a plotting library."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from blockell_kernels._bench._cases import BenchCase
from blockell_kernels._bench._report import Facts, Row

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
LABEL, BARS, BAR, GAP, TOP = 300, 560, 13, 12, 76


def write_plot(path: Path, rows: list[Row], facts: Facts) -> None:
    """One group of bars per case, one bar per contender but dense, whose speed is the line at 1."""
    groups: dict[BenchCase, list[Row]] = {}
    for row in rows:
        if row.contender != "nn.Linear":
            groups.setdefault(row.case, []).append(row)
    names = list(dict.fromkeys(row.contender for of in groups.values() for row in of))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    longest = max([1.25, *(row.speedup for of in groups.values() for row in of)])
    height = TOP + sum(len(of) * BAR + GAP for of in groups.values()) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + BARS + 70}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(10, 20, "Speed-up over nn.Linear (higher is faster; the line at 1 is dense)", 14),
        _text(10, 38, f"{facts.device}, torch {facts.torch}, {facts.date}, commit {facts.commit}"),
    ]
    x = 10.0
    for name in names:
        parts.append(f'<rect x="{x}" y="50" width="10" height="10" fill="{colour[name]}"/>')
        parts.append(_text(x + 14, 59, name))
        x += 30 + 6.5 * len(name)
    one = LABEL + BARS / longest
    bottom = height - 30 - GAP
    parts.append(
        f'<line x1="{one:.1f}" y1="{TOP - 6}" x2="{one:.1f}" y2="{bottom}" stroke="black" '
        'stroke-dasharray="4 3"/>'
    )
    y = float(TOP)
    for case, of in groups.items():
        parts.append(_text(10, y + len(of) * BAR / 2 + 4, _label(case)))
        for row in of:
            width = BARS * row.speedup / longest
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR - 2}" '
                f'fill="{colour[row.contender]}"/>'
            )
            parts.append(_text(LABEL + width + 4, y + BAR - 4, f"{row.speedup:.2f}"))
            y += BAR
        y += GAP
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _text(x: float, y: float, text: str, size: int = 11) -> str:
    halo = 'stroke="white" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {halo}>{escape(text)}</text>'


def _label(case: BenchCase) -> str:
    run = "" if case.run == "eager" else f", {case.run}"
    return (
        f"{case.tokens} x {case.in_features} -> {case.out_features}, {case.tile}x{case.row_group}, "
        f"{case.density:.0%}, {case.mode}{run}"
    )
