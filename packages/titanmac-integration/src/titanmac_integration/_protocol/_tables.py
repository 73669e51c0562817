"""The protocol's results as tables for the terminal, most of them within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from titanmac_integration._report import format_table

from ._advice import advice
from ._summary import GAPS, KEPT

Statistic = Mapping[str, Any]
WIDTH = 80


def retention_tables(summary: Mapping[str, Any]) -> str:
    """For every setting of a summary: each task, cost, the curves of the dials, and advice."""
    parts = []
    for group in summary["settings"].values():
        first, *later = group["tasks"]
        parts.append(
            _paragraph(
                f"{group['setting']}: {first}, then {', then '.join(later)} "
                f"({' + '.join(map(str, group['steps']))} steps), {', '.join(group['device'])}"
            )
        )
        parts += [task_table(group, number) for number in range(len(group["tasks"]))]
        parts.append(cost_table(group))
        if any(len(_dials(group, row)) > 1 for row in group["rows"]):
            parts.append(curve_table(group))
        parts += map(_paragraph, advice(group))
    return "\n\n".join(parts)


def task_table(group: Mapping[str, Any], number: int) -> str:
    """One line per method and dial: a task as it was learned and what became of it.

    Mean and standard deviation over the seeds; the worst value on the way is that of all seeds.
    """
    exact = group["metrics"][number] == "exact_match"
    is_last = number == len(group["tasks"]) - 1
    title = f"{group['tasks'][number]}, {'right answers' if exact else 'nats per byte'}"
    header = ["method", "learned"]
    if not is_last:
        header += ["at the end", "lowest" if exact else "highest", "forgotten"]
    rows = []
    for row in group["rows"]:
        task = row["tasks"][number]
        cells = [label(row), _value(task, "learned", exact)]
        if not is_last:
            lost = task.get("relative_forgetting")
            cells += [
                _value(task, "at_end", exact),
                f"{task['worst']['min']:.1%}" if exact else f"{task['worst_nats']['max']:.3f}",
                "not learned" if lost is None else _share(lost),
            ]
        rows.append(cells)
    return f"{title}\n{format_table(header, rows)}"


def cost_table(group: Mapping[str, Any]) -> str:
    """One line per method and dial: average accuracy over all tasks, and what it took."""
    header = ("method", "seeds", "average", "seconds", "kept, MB", "weights")
    rows = [
        (
            label(row),
            ",".join(map(str, row["seeds"])),
            _number(row["average_accuracy"]),
            f"{row['seconds']['mean']:.0f}",
            f"{row['kept_bytes']['mean'] / 1e6:.2f}",
            f"{row['parameters']['mean']:,.0f}",
        )
        for row in group["rows"]
    ]
    return f"all tasks\n{format_table(header, rows)}"


def curve_table(group: Mapping[str, Any]) -> str:
    """One line per method: what the dial trades."""
    header = (
        "method",
        *(f"+{gap:g} nats" for gap in GAPS),
        f"nats at {KEPT:.0%}",
    )
    rows = []
    for curve in group["curves"]:
        kept = [curve.get(f"kept_within_{gap:g}_nats") for gap in GAPS]
        nats = curve[f"new_nats_at_{KEPT:.0%}_kept"]
        rows.append(
            (
                f"{curve['method']}@{curve['arch']}",
                *("-" if value is None else _share(value) for value in kept),
                "-" if nats is None else _number(nats),
            )
        )
    title = _paragraph(
        f"kept of {group['tasks'][0]} where the new task is within so many nats of the best "
        f"fine-tuning; nats of the new task where {KEPT:.0%} is kept (dials by validation data)"
    )
    return f"{title}\n{format_table(header, rows)}"


def label(row: Mapping[str, Any]) -> str:
    """A row as ``--methods`` asks for it: "ours@sparse:0.009", "ewc@sparse=100"."""
    rate = "" if row["rate"] is None else f":{row['rate']:g}"
    dial = "" if row["dial"] is None else f"={row['dial']:g}"
    return f"{row['method']}@{row['arch']}{rate}{dial}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _dials(group: Mapping[str, Any], row: Mapping[str, Any]) -> list[Any]:
    mine = (row["method"], row["arch"])
    return [(r["dial"], r["rate"]) for r in group["rows"] if (r["method"], r["arch"]) == mine]


def _value(task: Mapping[str, Statistic], key: str, exact: bool) -> str:
    return _share(task[key]) if exact else _number(task[f"{key}_nats"])


def _share(statistic: Statistic) -> str:
    if statistic["sd"] is None:
        return f"{statistic['mean']:.1%}"
    return f"{100 * statistic['mean']:.1f} ± {statistic['sd']:.1%}"


def _number(statistic: Statistic) -> str:
    spread = statistic["sd"]
    return f"{statistic['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
