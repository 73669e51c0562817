"""What to try where a method forgot, or where a task was not learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._summary import HARDLY, KEPT, LEARNED

Row = Mapping[str, Any]

RELEASING = "ours-releasing"
HELD_BACK = 0.5
"""Nats behind fine-tuning from which a new text counts as held back: with other symbols at most
0.3 were seen, with the same ones 0.5 and more. Answers count so below the share ``KEPT`` of
fine-tuning's."""
FEW = 50
"""Held-out questions below which one of them is more than the 2% that is asked about."""
WHERE = 'docs/retention.md, "Which method when"'


def advice(group: Mapping[str, Any]) -> list[str]:
    """Sentences for what a reader of the tables should not overlook, each with a remedy.

    Args:
        group: a setting of ``summarise``.
    """
    found = (_coarse(group), _void(group), _not_learned(group), _held_back(group), _lost(group))
    return [text for text in found if text]


def _coarse(group: Mapping[str, Any]) -> str:
    few = [
        f"{task} on {count} questions"
        for task, metric, count in zip(
            group["tasks"],
            group["metrics"],
            group.get("tested_on") or [FEW] * len(group["tasks"]),  # older records do not say
            strict=True,
        )
        if metric == "exact_match" and count < FEW
    ]
    if not few:
        return ""
    return (
        f"Tested coarsely: {', '.join(few)}. A tenth of a file is held out for testing; give more."
    )


def _void(group: Mapping[str, Any]) -> str:
    void = sorted(
        {f"{r['method']}@{r['arch']}, seed {s}" for r in group["rows"] for s in r["void"]}
    )
    if not void:
        return ""
    first = group["tasks"][0]
    if group["metrics"][0] != "exact_match":
        return f"Void: {first} was hardly learned before the next task by {'; '.join(void)}."
    return (
        f"Void: {first} was not learned to {LEARNED:.0%} before the next task by "
        f"{'; '.join(void)}. Train it longer (--steps). If that does not help, its held-out "
        "questions may not follow from the others: facts and few examples can only be learned by "
        "heart."
    )


def _not_learned(group: Mapping[str, Any]) -> str:
    """Later tasks that nothing learned, so that nothing can be said of methods."""
    names = []
    for number, task in list(enumerate(group["tasks"]))[1:]:
        if group["metrics"][number] == "exact_match":
            best = max(row["tasks"][number]["learned"]["mean"] for row in group["rows"])
            if best < LEARNED:
                names.append(f"{task} (at most {best:.1%})")
    if not names:
        return ""
    return (
        f"Not learned to {LEARNED:.0%} by any method: {', '.join(names)}. It may need more steps "
        "(--steps) or more data."
    )


def _held_back(group: Mapping[str, Any]) -> str:
    """Methods of ours far behind fine-tuning on a later task."""
    names, tasks = _collect(
        (row["method"], task)
        for number, task in list(enumerate(group["tasks"]))[1:]
        for row in group["rows"]
        if _could_release(row) and _is_behind(group, row, number)
    )
    if not names:
        return ""
    return (
        f"{names} learned much less of {tasks} than fine-tuning. Tasks written in the same "
        "symbols, such as two texts, or what contradicts the old task, leave a trust region or "
        f"fixed damping no room: try --methods {RELEASING}, which rehearses and lets go ({WHERE}); "
        "otherwise more steps (--steps)."
    )


def _could_release(row: Row) -> bool:
    return bool(row["method"].startswith("ours")) and row["method"] != RELEASING


def _is_behind(group: Mapping[str, Any], row: Row, number: int) -> bool:
    plain = [r["tasks"][number] for r in group["rows"] if r["method"] == "fine-tuning"]
    if not plain:
        return False
    mine = row["tasks"][number]
    if group["metrics"][number] == "exact_match":
        chance = group["chance"][number]
        gained = max(task["learned"]["mean"] for task in plain) - chance
        return gained >= HARDLY and bool(mine["learned"]["mean"] - chance < KEPT * gained)
    best = min(task["learned_nats"]["mean"] for task in plain)
    return bool(mine["learned_nats"]["mean"] > best + HELD_BACK)


def _lost(group: Mapping[str, Any]) -> str:
    """Methods of ours that lost more than a tenth of a task that had been learned."""
    names, tasks = _collect(
        (row["method"], task)
        for number, task in list(enumerate(group["tasks"]))[:-1]
        for row in group["rows"]
        if row["method"].startswith("ours")
        and row["tasks"][number].get("relative_forgetting", {"max": 0.0})["max"] > 1.0 - KEPT
    )
    if not names:
        return ""
    return (
        f"{names} forgot more than {1 - KEPT:.0%} of {tasks}. A task is kept better the better it "
        f"was learned (--steps); many tasks, or tasks in the same symbols, need ours-releasing "
        f"({WHERE})."
    )


def _collect(pairs: Any) -> tuple[str, str]:
    """Names of methods and of tasks, each once."""
    found: Sequence[tuple[str, str]] = list(pairs)
    return ", ".join(sorted({m for m, _ in found})), ", ".join(dict.fromkeys(t for _, t in found))
