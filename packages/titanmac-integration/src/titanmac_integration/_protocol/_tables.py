"""The protocol's results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from titanmac_integration._report import format_table

from ._summary import GAPS, KEPT, LEARNED

Statistic = Mapping[str, Any]

REHEARSING = ("ours-rehearsing", "ours-recalling", "ours-releasing")
HELD_BACK = 0.5
"""Nats behind fine-tuning from which a new task counts as hardly learned: with other symbols at
most 0.3 were seen, with the same ones 0.5 and more."""


def retention_tables(summary: Mapping[str, Any]) -> str:
    """For every setting of a summary: what was kept and learned, and the curves of the dials."""
    parts = []
    for group in summary["settings"].values():
        first, *later = group["tasks"]
        parts.append(
            f"{group['setting']}: {first}, then {', then '.join(later)} "
            f"({' + '.join(map(str, group['steps']))} steps), {', '.join(group['device'])}"
        )
        parts.append(method_table(group))
        if any(len(_dials(group, row)) > 1 for row in group["rows"]):
            parts.append(curve_table(group))
        void = sorted(
            {f"{r['method']}@{r['arch']}, seed {s}" for r in group["rows"] for s in r["void"]}
        )
        if void:
            parts.append(
                f"Void: {first} was not learned to {LEARNED:.0%} before the next task by "
                f"{'; '.join(void)}. Train it longer (--steps)."
            )
        held_back = _held_back(group["rows"])
        if held_back:
            parts.append(
                f"{', '.join(held_back)} learned little of the new task. Tasks written in the same "
                "symbols, such as two texts, leave a trust region no room: try --methods "
                'ours-releasing, which rehearses instead (docs/retention.md, "Which method '
                'when").'
            )
    return "\n\n".join(parts)


def _held_back(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trust-region methods far behind fine-tuning on the new task."""
    plain = [row["new_nats"]["mean"] for row in rows if row["method"] == "fine-tuning"]
    if not plain:
        return []
    return sorted(
        {
            row["method"]
            for row in rows
            if row["method"].startswith("ours")
            and row["method"] not in REHEARSING
            and row["new_nats"]["mean"] > min(plain) + HELD_BACK
        }
    )


def method_table(group: Mapping[str, Any]) -> str:
    """One line per method and dial: mean and standard deviation over the seeds."""
    first = group["tasks"][0]
    exact = group["metrics"][0] == "exact_match"
    header = (
        "method",
        "dial",
        "seeds",
        f"{first} learned" if exact else f"{first} learned, bits per byte",
        "at the end",
        "lowest" if exact else "highest",
        "relative forgetting",
        "new task, nats",
        "average accuracy",
        "seconds",
        "kept, MB",
        "weights",
    )
    rows = []
    for row in group["rows"]:
        rows.append(
            (
                f"{row['method']}@{row['arch']}",
                dial_text(row["dial"], row["rate"]),
                str(len(row["seeds"])),
                *(
                    _share(row[key]) if exact else _number(row[key], 3)
                    for key in ("first_learned", "first_at_end")
                ),
                _extreme(row["first_lowest"], exact),
                _share(row["relative_forgetting"]) if "relative_forgetting" in row else "-",
                _number(row["new_nats"], 3),
                _number(row["average_accuracy"], 3),
                _number(row["seconds"], 0),
                f"{row['kept_bytes']['mean'] / 1e6:.2f}",
                f"{row['parameters']['mean']:,.0f}",
            )
        )
    return format_table(header, rows)


def curve_table(group: Mapping[str, Any]) -> str:
    """One line per method: what the dial trades."""
    header = (
        "method",
        *(f"kept at best + {gap:g} nats" for gap in GAPS),
        f"new task, nats, at {KEPT:.0%} kept",
    )
    rows = []
    for curve in group["curves"]:
        kept = [curve.get(f"kept_within_{gap:g}_nats") for gap in GAPS]
        nats = curve[f"new_nats_at_{KEPT:.0%}_kept"]
        rows.append(
            (
                f"{curve['method']}@{curve['arch']}",
                *("-" if value is None else _share(value) for value in kept),
                "-" if nats is None else _number(nats, 3),
            )
        )
    return format_table(header, rows)


def dial_text(dial: float | None, rate: float | None) -> str:
    """A dial, and the learning rate where a method had its own: "auto", "0.01, lr 0.004"."""
    text = "auto" if dial is None else f"{dial:g}"
    return text if rate is None else f"{text}, lr {rate:g}"


def _dials(group: Mapping[str, Any], row: Mapping[str, Any]) -> list[Any]:
    mine = (row["method"], row["arch"])
    return [(r["dial"], r["rate"]) for r in group["rows"] if (r["method"], r["arch"]) == mine]


def _share(statistic: Statistic) -> str:
    spread = statistic["sd"]
    return f"{statistic['mean']:.1%}" + ("" if spread is None else f" ± {spread:.1%}")


def _number(statistic: Statistic, digits: int) -> str:
    spread = statistic["sd"]
    text = f"{statistic['mean']:.{digits}f}"
    return text if spread is None or digits == 0 else f"{text} ± {spread:.{digits}f}"


def _extreme(statistic: Statistic, exact: bool) -> str:
    """The worst of all seeds."""
    return f"{statistic['min']:.1%}" if exact else f"{statistic['max']:.3f}"
