"""Find runs, read them step by step, and keep what was read.

Everything here is shared by the sessions of one server and safe to call from several threads.
What was computed from a snapshot stays valid while its file keeps name, modification time and
size. S recorded steps, L layers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from blockell_format.snapshots import (
    LayerInfo,
    LayerSnapshot,
    Problem,
    Run,
    RunError,
    SnapshotError,
    discover_runs,
    open_run,
)

from .ranks import Divergence, find_divergence, layers_apart
from .retention import RECORDS_FILE, find_retention, retention_stamp
from .series import (
    SUMMARY_FIELDS,
    LayerSeries,
    MetricLog,
    Row,
    SwapHistory,
    monotone_levels,
    summarise,
)
from .tasks import TaskSpan, task_spans

__all__ = ["LoadedRun", "RunChoice", "find_runs", "is_run", "load_run", "opens"]

MAX_SERIES_STEPS = 1000
"""Snapshots read for a layer's series; longer runs are sampled evenly."""
_KEPT_SNAPSHOTS = 64
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)
"""Where to count live blocks if a snapshot cannot be read: hardly ever do they change."""

_FileKey = tuple[str, str, int, int]


@dataclass(frozen=True)
class RunChoice:
    """A run that can be opened."""

    label: str
    """Unique among the runs found: the directory's name, with parents where names repeat."""
    path: Path
    """The run directory."""


def find_runs(paths: Iterable[str | Path]) -> tuple[list[RunChoice], list[Problem]]:
    """The runs in the given directories (or below them), newest first, and what was wrong.

    A directory with nothing but the results of a retention experiment counts as well.
    """
    paths = [Path(path) for path in paths]
    found, problems = discover_runs(paths)
    results = find_retention(paths)
    unique = list(dict.fromkeys([*(path.resolve() for path in found), *results]))
    problems = [
        problem
        for problem in problems
        if not any(path.is_relative_to(problem.path.resolve()) for path in results)
    ]
    unique.sort(key=_modified_ns, reverse=True)
    labels = _labels(unique)
    return [RunChoice(*choice) for choice in zip(labels, unique, strict=True)], problems


def _labels(paths: Sequence[Path]) -> list[str]:
    labels = []
    for path in paths:
        depth = 1
        while depth < len(path.parts) and any(
            other != path and other.parts[-depth:] == path.parts[-depth:] for other in paths
        ):
            depth += 1
        labels.append("/".join(path.parts[-depth:]))
    return labels


def _modified_ns(path: Path) -> int:
    newest = 0
    for name in ("run.json", "metrics.jsonl", "topology", RECORDS_FILE):
        try:
            newest = max(newest, (path / name).stat().st_mtime_ns)
        except OSError:
            continue
    return newest


class LoadedRun:
    """A run directory, and what has been computed from it so far."""

    def __init__(self, path: Path) -> None:
        """Open a run; RunError says why when it is none."""
        self.path = path
        self.version = 0
        """Grows whenever something new was read."""
        self._run = open_run(path)
        self._lock = threading.RLock()
        self._rows: dict[_FileKey, Row] = {}
        self._live: dict[_FileKey, int] = {}
        self._series: dict[str, tuple[int, LayerSeries]] = {}
        self._history: tuple[int, SwapHistory] | None = None
        self._divergence: tuple[int, Divergence | None] | None = None
        self._agreed: dict[int, tuple[str, int]] = {}
        self._metrics = MetricLog()
        self._metrics_version = -1
        self._snapshots: OrderedDict[_FileKey, LayerSnapshot] = OrderedDict()

    @property
    def run(self) -> Run:
        """The run itself: layers, steps, configuration, problems, checksums."""
        return self._run

    @property
    def newest_step(self) -> int | None:
        """Step of the last snapshot; before the first, of the last metric."""
        steps = self._run.steps
        return steps[-1] if steps else self.metrics().newest_step

    @property
    def spans(self) -> tuple[TaskSpan, ...]:
        """The trainings on several tasks, if the run's configuration states them."""
        return task_spans(self._run.config)

    def refresh(self) -> int:
        """Read what is new on disk; returns the version."""
        with self._lock:
            if self._run.refresh():
                self.version += 1
            return self.version

    def snapshot(self, name: str, step: int) -> LayerSnapshot:
        """One layer at one step, whole.

        Raises:
            ValueError: no such layer or step, or the file cannot be read (SnapshotError, which
                `run.problems` lists as well).
        """
        snapshot = self._run.snapshot(step)
        key = _file_key(name, snapshot.path)
        with self._lock:
            if key not in self._snapshots:
                self._snapshots[key] = snapshot.layer(name)
                if len(self._snapshots) > _KEPT_SNAPSHOTS:
                    self._snapshots.popitem(last=False)
            self._snapshots.move_to_end(key)
            return self._snapshots[key]

    def series(self, name: str) -> LayerSeries:
        """One layer over time; only snapshots not seen before are read."""
        with self._lock:
            version, series = self._series.get(name, (-1, None))
            if series is None or version != self.version:
                series = self._read_series(name)
                self._series[name] = self.version, series
            return series

    def history(self) -> SwapHistory:
        """Swaps of all layers at all steps, from the headers; hardly any tensor is read."""
        with self._lock:
            if self._history is None or self._history[0] != self.version:
                self._history = self.version, self._read_history()
            return self._history[1]

    def divergence(self) -> Divergence | None:
        """Where processes began to disagree on the topology; from the headers, each seen once."""
        with self._lock:
            if self._divergence is None or self._divergence[0] != self.version:
                self._divergence = self.version, self._find_divergence()
            return self._divergence[1]

    def _find_divergence(self) -> Divergence | None:
        if all(attempt.world_size == 1 for attempt in self._run.attempts):
            return None
        apart: dict[int, dict[str, tuple[str, ...]]] = {}
        for step in self._run.steps:
            snapshot = self._run.snapshot(step)
            seen = self._run.run_id, snapshot.attempt
            if self._agreed.get(step) == seen:
                continue
            checksums = snapshot.checksums
            if layers_apart(checksums):
                apart[step] = checksums
            else:
                self._agreed[step] = seen
        return find_divergence(apart)

    def metrics(self) -> MetricLog:
        """The numeric metrics."""
        with self._lock:
            if self._metrics_version != self.version:
                self._metrics.update(self._run.metrics())
                self._metrics_version = self.version
            return self._metrics

    def _read_series(self, name: str) -> LayerSeries:
        info, steps = self._run.layers[name], self._run.steps
        # A power of two, so that what was read stays useful when the run grows.
        stride = 1
        while len(steps) > stride * MAX_SERIES_STEPS:
            stride *= 2
        chosen = steps[::stride]
        if steps and chosen[-1] != steps[-1]:
            chosen.append(steps[-1])
        kept: dict[int, Row] = {}
        for step in chosen:
            row = self._row(info, step)
            if row is not None:
                kept[step] = row
        return LayerSeries.from_rows(list(kept), list(kept.values()), sampled=stride > 1)

    def _row(self, info: LayerInfo, step: int) -> Row | None:
        snapshot = self._run.snapshot(step)
        key = _file_key(info.name, snapshot.path)
        if key not in self._rows:
            try:
                self._rows[key] = summarise(snapshot.layer(info.name, SUMMARY_FIELDS), info.C)
            except SnapshotError:
                return None  # the reader lists it among the problems
        return self._rows[key]

    def _read_history(self) -> SwapHistory:
        steps, layers = self._run.steps, self._run.layers
        counts = self._run.swap_counts()
        blocks = [
            monotone_levels(len(steps), partial(self._live_blocks, info, steps))
            for info in layers.values()
        ]
        return SwapHistory(
            names=tuple(layers),
            steps=np.array(steps, dtype=np.int64),
            swaps=np.array(
                [[counts[step][name] for name in layers] for step in steps], dtype=np.int64
            ).reshape(len(steps), len(layers)),
            blocks=np.array(blocks, dtype=np.int64).reshape(len(layers), len(steps)).T,
        )

    def _live_blocks(self, info: LayerInfo, steps: Sequence[int], at: int) -> int:
        for offset in _NEIGHBOURS:
            if 0 <= at + offset < len(steps):
                count = self._count_blocks(info, steps[at + offset])
                if count is not None:
                    return count
        return info.R * info.K  # nothing can be read around here; slots are the best guess

    def _count_blocks(self, info: LayerInfo, step: int) -> int | None:
        snapshot = self._run.snapshot(step)
        key = _file_key(info.name, snapshot.path)
        if key not in self._live:
            try:
                columns = snapshot.layer(info.name, ("col_indices",)).col_indices
            except SnapshotError:
                return None  # the reader lists it among the problems
            self._live[key] = int((columns >= 0).sum())
        return self._live[key]


def _file_key(layer: str, path: Path) -> _FileKey:
    """What tells one content of a layer's file from another."""
    try:
        status = path.stat()
    except OSError:
        return layer, str(path), -1, -1
    return layer, str(path), status.st_mtime_ns, status.st_size


_loaded: dict[Path, LoadedRun] = {}
_loaded_lock = threading.Lock()


def load_run(path: Path) -> LoadedRun:
    """The run at `path`, opened once per process.

    Raises:
        RunError: it is no run; the message says why.
    """
    with _loaded_lock:
        if path not in _loaded:
            _loaded[path] = LoadedRun(path)
        return _loaded[path]


def is_run(path: Path) -> bool:
    """Whether there is a run.json, readable or not."""
    return (path / "run.json").exists()


def opens(path: Path) -> bool:
    """Whether there is something to show: `load_run` takes it, or it holds retention results."""
    if retention_stamp(path) is not None:
        return True
    try:
        load_run(path)
    except RunError:
        return False
    return True
