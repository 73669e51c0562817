"""Results of retention experiments: `retention.jsonl` in a run directory, one finished cell a line.

The file is written by `titanmac continual`, possibly by several processes at once, and read here
without any of its code. n tasks; a cell is one method with one dial on one seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockell_format.snapshots import Problem

__all__ = [
    "RECORDS_FILE",
    "Cell",
    "PathPoint",
    "Retention",
    "find_retention",
    "read_retention",
    "retention_stamp",
]

RECORDS_FILE = "retention.jsonl"
VERSION = 1
"""The version of the records that is understood."""
MAX_DEPTH = 3
MAX_PROBLEMS = 200
"""Bad lines listed one by one; of more, the number is stated."""
MAX_FIGURE = 1e300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PathPoint:
    """One measurement of the tasks learned before, while the next one is trained."""

    step: int
    """Counted from the beginning of this task's training."""
    values: tuple[float, ...]
    """Of the first tasks, on their own scale."""


@dataclass(frozen=True)
class Cell:
    """One method with one dial on one seed. All figures were measured on test data."""

    id: str
    setting: str
    """What must agree for cells to be compared: model, tasks, steps."""
    method: str
    arch: str
    dial: float | None
    """None where the method sets it itself."""
    dial_name: str
    seed: int
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    chance: Floats
    """[n] what guessing reaches."""
    perfect: Floats
    """[n]."""
    steps: tuple[int, ...]
    """Training steps of every task."""
    matrix: Floats
    """[n + 1, n] every task (column) before the first and after every training (row)."""
    nats: Floats
    """[n + 1, n] the same as loss per token."""
    path: tuple[tuple[PathPoint, ...], ...]
    """Of the trainings after the first."""
    seconds: float
    """Training time after the first task."""
    kept_bytes: int
    """What the method keeps of old tasks, beside the model."""
    overlap: Mapping[str, float]
    """Blocks that both tasks use, as a share; "used", "used_shuffled", "chance". May be empty."""
    own: Mapping[str, float]
    """Figures of the method's own after the last task, such as drift and its budget; by name."""
    uses_old_data: bool
    """Whether the method trains on data of old tasks."""


@dataclass(frozen=True)
class Retention:
    """What a file holds."""

    path: Path
    cells: tuple[Cell, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Lines left out, with the reason."""

    @property
    def settings(self) -> list[str]:
        """Experiments whose cells can be compared, in order of appearance."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def of(self, setting: str) -> list[Cell]:
        """The cells of one experiment."""
        return [cell for cell in self.cells if cell.setting == setting]


def find_retention(directories: Iterable[str | Path]) -> list[Path]:
    """Directories that hold results, at most three levels below the given ones.

    Hidden directories and what lies inside a run are not searched.
    """
    found: list[Path] = []
    for directory in map(Path, directories):
        _search(directory, MAX_DEPTH, found)
    return list(dict.fromkeys(path.resolve() for path in found))


def _search(directory: Path, depth: int, found: list[Path]) -> None:
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return  # whoever looks for runs reports it
    names = {entry.name for entry in entries}
    if RECORDS_FILE in names:
        found.append(directory)
    if depth == 0 or names & {RECORDS_FILE, "run.json"}:
        return
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir():
            _search(entry, depth - 1, found)


def retention_stamp(directory: Path) -> tuple[int, int] | None:
    """Modification time and size of the file: equal as long as nothing was added."""
    try:
        status = (directory / RECORDS_FILE).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def read_retention(directory: str | Path) -> Retention:
    """Everything readable in `directory`; of several lines with one id the last counts.

    Lines that are unfinished, damaged or from another version, and cells whose training broke
    down, are listed as problems. A missing file gives an empty result.
    """
    path = Path(directory)
    return _read(path / RECORDS_FILE, retention_stamp(path))


@lru_cache(maxsize=8)
def _read(path: Path, stamp: tuple[int, int] | None) -> Retention:
    if stamp is None:
        return Retention(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        return Retention(path, (), (Problem(path, error.strerror or str(error)),))
    cells: dict[str, Cell] = {}
    reasons: list[str] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cell = _cell(_load(line, unfinished=number == len(lines)))
            cells.pop(cell.id, None)
            cells[cell.id] = cell
        except ValueError as error:
            reasons.append(f"line {number}: {error}")
    if len(reasons) > MAX_PROBLEMS:
        rest = len(reasons) - MAX_PROBLEMS
        reasons = [*reasons[:MAX_PROBLEMS], f"{rest:,} more lines cannot be read"]
    problems = tuple(Problem(path, reason) for reason in reasons)
    return Retention(path, tuple(cells.values()), problems)


def _load(line: bytes, *, unfinished: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if unfinished:
            raise ValueError("unfinished: still being written, or cut off") from None
        raise ValueError("damaged: not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a record: no JSON object")
    if record.get("version") != VERSION:
        raise ValueError(
            f"version (={record.get('version')!r}) must be {VERSION}: it comes from another "
            "program or version"
        )
    return record


def _cell(record: Mapping[str, Any]) -> Cell:
    """A checked record; ValueError says what is wrong with it."""
    if record.get("failed") is not None:
        name = record.get("id", "a cell")
        raise ValueError(f"{name} has no result, training broke down: {record['failed']}")
    texts = {key: _text(record, key) for key in ("id", "method", "arch", "setting_key")}
    tasks, metrics = (_texts(record, key) for key in ("tasks", "metrics"))
    n = len(tasks)
    if n < 2 or len(metrics) != n:
        raise ValueError(f"tasks (={list(tasks)}) must be two or more, each with a metric")
    numbers = {key: _numbers(record, key, (n,)) for key in ("chance", "perfect", "steps")}
    if (numbers["chance"] == numbers["perfect"]).any() or (numbers["steps"] < 0).any():
        raise ValueError("chance and perfect must differ, and steps not be negative")
    dial, overlap = record.get("dial"), record.get("overlap") or {}
    if record.get("rate") is not None:  # a method with a learning rate of its own
        texts["method"] += f":{float(_numbers(record, 'rate', ())):g}"
    if not isinstance(overlap, dict):
        raise ValueError(f"overlap (={overlap!r:.60}) must be an object or null")
    return Cell(
        id=texts["id"],
        setting=texts["setting_key"],
        method=texts["method"],
        arch=texts["arch"],
        dial=None if dial is None else float(_numbers(record, "dial", ())),
        dial_name=str(record.get("dial_name") or "dial"),
        seed=int(_numbers(record, "seed", ())),
        tasks=tasks,
        metrics=metrics,
        chance=numbers["chance"],
        perfect=numbers["perfect"],
        steps=tuple(int(step) for step in numbers["steps"]),
        matrix=_numbers(record, "matrix", (n + 1, n)),
        nats=_numbers(record, "nats", (n + 1, n)),
        path=_path(record, n),
        seconds=float(_numbers(record, "seconds", (n - 1,)).sum()),
        kept_bytes=int(_numbers(record, "kept_bytes", ())),
        overlap={key: _number(overlap, key) for key in overlap},
        own=_finite(record.get("method_metrics")),
        uses_old_data=record.get("uses_old_data") is True,
    )


def _finite(values: Any) -> dict[str, float]:
    """What is a finite number of an object that only informs; nothing depends on the rest."""
    if not isinstance(values, dict):
        return {}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < MAX_FIGURE
    }


def _path(record: Mapping[str, Any], n: int) -> tuple[tuple[PathPoint, ...], ...]:
    phases = record.get("path")
    if not isinstance(phases, list) or len(phases) != n - 1:
        raise ValueError(f"path must be a list of {n - 1}, one per task after the first")
    found = []
    for learned, phase in enumerate(phases, 1):
        if not isinstance(phase, list) or not all(isinstance(point, dict) for point in phase):
            raise ValueError("path must hold lists of measurements")
        points = [
            PathPoint(int(_number(point, "step")), tuple(_numbers(point, "value", (learned,))))
            for point in phase
        ]
        found.append(tuple(sorted(points, key=lambda point: point.step)))
    return tuple(found)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} (={value!r:.60}) must be text")
    return value


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = record.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} (={values!r:.60}) must be a list of text")
    return tuple(values)


def _number(record: Mapping[str, Any], key: str) -> float:
    return float(_numbers(record, key, ()))


def _numbers(record: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Floats:
    """Finite numbers of exactly this shape."""
    try:
        values = np.asarray(record.get(key))
    except ValueError:  # lists of different lengths
        values = np.empty(0, dtype=object)
    size = " x ".join(map(str, shape)) + " finite numbers" if shape else "a finite number"
    if values.shape != shape or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"{key} must be {size}, is {json.dumps(record.get(key))[:80]}")
    return values.astype(np.float64)
