"""From records to figures: per method and dial, over seeds, and along the curve of the dial.

Dials are chosen on validation data; what is stated of a chosen dial was measured on test data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from titanmac_integration._metrics import relative_forgetting

from . import _measures as measures

LEARNED = 0.95
"""The first task must be learned this well, or the comparison is void."""
GAPS = (0.05, 0.1, 0.25)
"""Nats by which the new task may be worse than with the best fine-tuning."""
KEPT = 0.9
"""Share of the old task that counts as kept when the new task is compared."""
HARDLY = 0.05
"""Share of the way from chance to perfect below which nothing was learned that could be lost."""

Record = dict[str, Any]


def describe(record: Record, joint: Record | None = None) -> dict[str, float | None]:
    """The figures of one cell.

    Everything but the "validation_" ones, which dials are chosen on, was measured on test data.
    "new_nats" is the mean loss of the later tasks, each right after it was trained.
    """
    n = len(record["tasks"])
    chance, perfect = record["chance"], record["perfect"]

    def scaled(matrix: list[list[float]]) -> list[list[float]]:
        return [
            [(v - c) / (p - c) for v, c, p in zip(row, chance, perfect, strict=True)]
            for row in matrix
        ]

    matrix = scaled(record["matrix"])
    lowest = _lowest(record)
    return {
        "first_learned": record["matrix"][1][0],
        "first_at_end": record["matrix"][-1][0],
        "first_lowest": lowest,
        "relative_forgetting": relative_forgetting(
            record["matrix"][1][0], record["matrix"][-1][0], chance[0]
        ),
        "mean_relative_forgetting": _mean_relative(record, n),
        "first_nats_change": record["nats"][-1][0] - record["nats"][1][0],
        "new_nats": _new_nats(record["nats"], n),
        "average_accuracy": measures.average_accuracy(matrix),
        "bwt": measures.backward_transfer(matrix),
        "fwt": measures.forward_transfer(matrix),
        "forgetting": measures.forgetting(matrix),
        "intransigence": (
            measures.intransigence(matrix, scaled(joint["matrix"])) if joint is not None else None
        ),
        "seconds": sum(record["seconds"]),
        "peak_bytes": record["peak_bytes"],
        "kept_bytes": record["kept_bytes"],
        "parameters": record["parameters"],
        "validation_kept": _kept(record, "validation_matrix"),
        "validation_new_nats": _new_nats(record["validation_nats"], n),
        "kept": _kept(record, "matrix"),
    }


def summarise(records: Iterable[Record]) -> dict[str, Any]:
    """Everything that a table, a figure or a dashboard page needs, as JSON types."""
    records = [record for record in records if record["failed"] is None]
    by_setting: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_setting[record["setting_key"]].append(record)
    return {
        "version": 1,
        "settings": {name: _summarise_setting(group) for name, group in by_setting.items()},
    }


def _summarise_setting(records: list[Record]) -> dict[str, Any]:
    joints = {(r["arch"], r["seed"]): r for r in records if r["method"] == "joint"}
    points: dict[tuple[str, str, float | None, float | None], list[Record]]
    points = defaultdict(list)
    for record in records:
        key = (record["method"], record["arch"], record["dial"], record.get("rate"))
        points[key].append(record)
    rows = [
        {
            "method": method,
            "arch": arch,
            "dial": dial,
            "rate": rate,
            "seeds": sorted(cell["seed"] for cell in cells),
            "void": [cell["seed"] for cell in cells if not _is_learned(cell)],
            "tasks": [
                _statistics([_fate(c, j) for c in cells]) for j in range(len(records[0]["tasks"]))
            ],
            **_statistics([describe(c, joints.get((c["arch"], c["seed"]))) for c in cells]),
        }
        for (method, arch, dial, rate), cells in points.items()
    ]
    return {
        "setting": records[0]["setting"],
        "tasks": records[0]["tasks"],
        "metrics": records[0]["metrics"],
        "chance": records[0]["chance"],
        "tested_on": records[0].get("tested_on"),
        "steps": records[0]["steps"],
        "device": sorted({record["device"] for record in records}),
        "rows": rows,
        "curves": _curves(rows),
    }


def _curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and architecture: what it keeps at given losses of the new task, and back.

    Learning rates of one method lie on one curve. The reference is the best fine-tuning on the same
    architecture or, where there is none, the best on any. Dials with few seeds count like those
    with many: look at the rows.
    """
    plain = [row for row in rows if row["method"] == "fine-tuning"]
    curves = []
    for method, arch in dict.fromkeys((row["method"], row["arch"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["arch"]) == (method, arch)]
        same = [row for row in plain if row["arch"] == arch] or plain
        curve: dict[str, Any] = {"method": method, "arch": arch}
        if same:
            best = min(same, key=lambda row: row["validation_new_nats"]["mean"])
            curve["reference_nats"] = best["new_nats"]["mean"]
            limit = best["validation_new_nats"]["mean"]
            for gap in GAPS:
                within = [r for r in mine if r["validation_new_nats"]["mean"] <= limit + gap]
                chosen = max(within, key=lambda r: r["validation_kept"]["mean"], default=None)
                curve[f"kept_within_{gap:g}_nats"] = chosen and chosen["kept"]
        keeping = [row for row in mine if row["validation_kept"]["mean"] >= KEPT]
        chosen = min(keeping, key=lambda r: r["validation_new_nats"]["mean"], default=None)
        curve[f"new_nats_at_{KEPT:.0%}_kept"] = chosen and chosen["new_nats"]
        curve[f"dial_at_{KEPT:.0%}_kept"] = chosen and chosen["dial"]
        curve[f"rate_at_{KEPT:.0%}_kept"] = chosen and chosen["rate"]
        curves.append(curve)
    return curves


def _statistics(cells: list[dict[str, Any]]) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    for key in cells[0]:
        values = [cell[key] for cell in cells if cell[key] is not None]
        if not values:
            continue
        statistics[key] = {
            "mean": fmean(values),
            "sd": stdev(values) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }
    return statistics


def _fate(record: Record, task: int) -> dict[str, float | None]:
    """What became of one task, on test data: None for what the last task has not.

    "worst" is the worst value at any time after it was learned.
    """
    matrix, nats = record["matrix"], record["nats"]
    learned, at_end = matrix[task + 1][task], matrix[-1][task]
    figures = {"learned": learned, "learned_nats": nats[task + 1][task]}
    if task == len(matrix) - 2:
        return figures
    later = [point for phase in record["path"][task:] for point in phase]
    chance, perfect = record["chance"][task], record["perfect"][task]
    worst = min if perfect > chance else max
    lost = relative_forgetting(learned, at_end, chance)
    return {
        **figures,
        "at_end": at_end,
        "at_end_nats": nats[-1][task],
        "worst": worst([at_end, *(point["value"][task] for point in later)]),
        "worst_nats": max([nats[-1][task], *(point["nats"][task] for point in later)]),
        "relative_forgetting": lost if _share_learned(record, task) >= HARDLY else None,
    }


def _share_learned(record: Record, task: int) -> float:
    """How far a task had come from chance to perfect."""
    chance, perfect = record["chance"][task], record["perfect"][task]
    return float((record["matrix"][task + 1][task] - chance) / (perfect - chance))


def _is_learned(record: Record) -> bool:
    if record["metrics"][0] == "exact_match":
        return bool(record["matrix"][1][0] >= LEARNED)
    return _share_learned(record, 0) >= HARDLY


def _new_nats(nats: list[list[float]], n: int) -> float:
    return fmean(nats[j + 1][j] for j in range(1, n))


def _kept(record: Record, matrix: str) -> float:
    lost = relative_forgetting(record[matrix][1][0], record[matrix][-1][0], record["chance"][0])
    return 1.0 - (lost if lost is not None else 1.0)


def _mean_relative(record: Record, n: int) -> float | None:
    matrix, chance = record["matrix"], record["chance"]
    lost = [relative_forgetting(matrix[j + 1][j], matrix[-1][j], chance[j]) for j in range(n - 1)]
    known = [value for value in lost if value is not None]
    return fmean(known) if known else None


def _lowest(record: Record) -> float:
    """The worst value of the first task at any time after it was learned."""
    values = [record["matrix"][-1][0]]
    values += [point["value"][0] for phase in record["path"] for point in phase]
    return min(values) if record["perfect"][0] > record["chance"][0] else max(values)
