"""Draw docs/images/stability.svg from the results of the stability benchmark; no dependencies.

python docs/images/stability.py packages/titanmac-integration/benchmarks/results/stability-*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 270, 130, 52, 44, 62
Point = Sequence[float]


def panel(
    x: float,
    y: float,
    title: str,
    points: Sequence[Point],
    *,
    steps: int,
    top: float,
    limits: Sequence[float] = (),
    percent: bool = False,
    line: bool = False,
) -> list[str]:
    """One diagram: points (step, value) over the steps, with dashed limits."""

    def at(point: Point) -> tuple[float, float]:
        value = min(point[1], top)
        return x + PANEL_WIDTH * point[0] / steps, y + PANEL_HEIGHT * (1 - value / top)

    def label(value: float) -> str:
        return f"{value:.0%}" if percent else f"{value:g}"

    parts = [
        f'<text x="{x}" y="{y - 8}" class="title">{escape(title)}</text>',
        f'<rect x="{x}" y="{y}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" class="frame"/>',
    ]
    for value in (0.0, top / 2, top):
        height = at((0, value))[1]
        parts.append(f'<text x="{x - 6}" y="{height + 4:.1f}" class="y">{label(value)}</text>')
    for step in (0, steps // 2, steps):
        left = at((step, 0))[0]
        parts.append(f'<text x="{left:.1f}" y="{y + PANEL_HEIGHT + 15}" class="x">{step:,}</text>')
    for limit in limits:
        height = at((0, limit))[1]
        parts.append(
            f'<line x1="{x}" x2="{x + PANEL_WIDTH}" y1="{height:.1f}" y2="{height:.1f}" '
            'class="limit"/>'
        )
    placed = [at(point) for point in points]
    if line:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        parts.append(f'<polyline points="{path}" class="line"/>')
    else:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.6"/>' for a, b in placed]
    return parts


def row(run: dict[str, Any], name: str, y: float) -> list[str]:
    steps = run["steps"]
    ratios = run["loss_ratios"]
    worst = max((ratio for _, ratio in ratios), default=0.0)
    shift = PANEL_WIDTH + GAP
    resumed = f"resumed {len(run['resumed_at'])} times"
    head = f"{name}: {steps:,} steps, {resumed}, largest ratio {worst:.2f}"
    return [
        f'<text x="{LEFT}" y="{y - 26}" class="head">{escape(head)}</text>',
        *panel(LEFT, y, "loss, nats", run["loss"], steps=steps, top=4.0, line=True),
        *panel(
            LEFT + shift,
            y,
            "swap rate per decision",
            run["swap_rates"],
            steps=steps,
            top=0.12,
            limits=(0.01, 0.10),
            percent=True,
        ),
        *panel(
            LEFT + 2 * shift,
            y,
            "largest loss after a decision / running mean",
            ratios,
            steps=steps,
            top=2.5,
            limits=(1.0, 2.0),
        ),
    ]


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    height = TOP + len(paths) * (PANEL_HEIGHT + 90)
    width = LEFT + 3 * PANEL_WIDTH + 2 * GAP + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        "<style>text{font:11px sans-serif;fill:#333}.head{font-weight:bold;font-size:13px}"
        ".title{fill:#555}.y{text-anchor:end}.x{text-anchor:middle}"
        ".frame{fill:none;stroke:#ccc}.limit{stroke:#c33;stroke-dasharray:4 3}"
        ".line{fill:none;stroke:#27a}circle{fill:#27a;fill-opacity:.6}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, path in enumerate(paths):
        run = json.loads(path.read_text(encoding="utf-8"))
        name = path.stem.removeprefix("stability-").replace("_", " ")
        parts += row(run, name, TOP + 20 + index * (PANEL_HEIGHT + 90))
    target = Path(__file__).with_suffix(".svg")
    target.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
    print(f"wrote {target.name} from {len(paths)} run(s)")


if __name__ == "__main__":
    main()
