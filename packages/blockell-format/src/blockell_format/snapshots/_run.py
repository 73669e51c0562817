"""A run directory, read incrementally."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ._files import (
    METRICS_FILE,
    RUN_FILE,
    TOPOLOGY_DIR,
    parse_snapshot_name,
)
from ._header import Header, parse_header
from ._layers import FIELDS, LayerInfo, LayerSnapshot
from ._manifest import Attempt, Manifest, layer_table, read_manifest
from ._metrics import MetricsReader
from ._problems import Problem, RunError, SnapshotError, describe, printable
from ._scan import Loaded, Signature, load_metadata, scan, signature_of
from ._snapshot import Snapshot, check_names


class Run:
    """A run directory: layers, snapshots, metrics, and a list of what could not be read.

    Opening reads the header of every snapshot, no tensor. `refresh` reads only what is new.
    One object may be used from several threads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._headers: dict[str, Header] = {}
        self._bad: dict[str, tuple[Signature, str]] = {}
        self._unknown_attempts: list[str] = []
        self._by_step: dict[int, str] = {}
        self._steps: list[int] = []
        self._scan_problems: list[Problem] = []
        self._read_problems: dict[Problem, None] = {}
        self._manifest_problem: Problem | None = None
        self._metrics = MetricsReader(self.path / METRICS_FILE)
        self._flat: list[dict[str, Any]] = []
        self._flat_state: tuple[int, int, int] = (0, 0, 0)
        self._manifest_signature = signature_of(self.path / RUN_FILE)
        self._use_manifest(read_manifest(self.path))
        self.refresh()

    def _use_manifest(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._table = layer_table(manifest.layers)
        self._layers = {layer.name: layer for layer in manifest.layers}

    @property
    def run_id(self) -> str:
        """Identity of the run, also when the directory is moved."""
        return self._manifest.run_id

    @property
    def created(self) -> float:
        """Unix time of the first attempt."""
        return self._manifest.created

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the latest attempt that gave one."""
        return self._manifest.config

    @property
    def world_size(self) -> int:
        """Number of ranks of the latest attempt."""
        return self._manifest.attempts[-1].world_size

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """All starts of the training job, oldest first."""
        return self._manifest.attempts

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """Layers by name, in the order of the layer table."""
        return dict(self._layers)

    @property
    def steps(self) -> list[int]:
        """Steps of all good snapshots, ascending; superseded ones are dropped."""
        return list(self._steps)

    @property
    def problems(self) -> list[Problem]:
        """Everything that could not be read so far, or that is odd, with the reason."""
        with self._lock:
            topology = self.path / TOPOLOGY_DIR
            result = [] if self._manifest_problem is None else [self._manifest_problem]
            result += self._scan_problems
            result += [Problem(topology / name, why) for name, (_, why) in self._bad.items()]
            result += [
                Problem(topology / name, "is of an attempt that run.json does not list; kept")
                for name in self._unknown_attempts
            ]
            result += self._metrics.problems
            return result + list(self._read_problems)

    def snapshot(self, step: int) -> Snapshot:
        """The snapshot of one of `steps`.

        Raises:
            ValueError: the run has no snapshot of this step.
        """
        with self._lock:
            name = self._by_step.get(step)
            if name is None:
                near = sorted(self._steps, key=lambda known: abs(known - step))[:1]
                hint = f"nearest: {near[0]}" if near else "the run has no snapshots yet"
                raise ValueError(
                    f"step (={step}) has no snapshot in {printable(self.path)}; {hint}."
                )
            path = self.path / TOPOLOGY_DIR / name
            return Snapshot(path, self._headers[name], self._layers, self._report)

    def swap_counts(self) -> dict[int, dict[str, int]]:
        """Swapped blocks per step and layer; from the headers, nothing is read."""
        with self._lock:
            return {
                s: self._headers[n].swaps_by_layer(self._layers) for s, n in self._by_step.items()
            }

    def checksums(self) -> dict[int, dict[str, tuple[str, ...]]]:
        """Checksums per step and layer, one per rank; from the headers, nothing is read."""
        with self._lock:
            return {
                s: self._headers[n].sums_by_layer(self._layers) for s, n in self._by_step.items()
            }

    def read_layer(
        self,
        name: str,
        steps: Collection[int] | None = None,
        fields: Collection[str] = FIELDS,
    ) -> Iterator[tuple[int, LayerSnapshot]]:
        """Read one layer over many steps; no other layer is touched.

        A step whose layer cannot be read is left out and listed in `problems`.

        Args:
            name: a layer of the run.
            steps: default all; steps that the run does not have are left out.
            fields: what to read of it.

        Raises:
            ValueError: no such layer or field.
        """
        check_names(self._layers, name, fields)
        return self._read_steps(name, self.steps if steps is None else list(steps), fields)

    def _read_steps(
        self, name: str, steps: list[int], fields: Collection[str]
    ) -> Iterator[tuple[int, LayerSnapshot]]:
        for step in steps:
            if step not in self._by_step:
                continue
            try:
                layer = self.snapshot(step).layer(name, fields)
            except SnapshotError:
                continue  # it is in the list of problems
            yield step, layer

    def verify(self) -> list[Problem]:
        """Read every layer of every snapshot, then return `problems`."""
        for name in self._layers:
            for _ in self.read_layer(name):
                pass
        return self.problems

    def metrics(self) -> list[dict[str, Any]]:
        """Logged metrics in the order of logging, `{"step": 12, "loss": 0.5, ...}`.

        Lines of superseded steps are dropped. The dictionaries are shared: do not change them.
        """
        with self._lock:
            manifest, records = self._manifest, self._metrics.records
            attempts, restarts, done = self._flat_state
            if (attempts, restarts) != (len(manifest.attempts), self._metrics.restarts):
                self._flat, done = [], 0
            self._flat += [
                record.metrics
                for record in records[done:]
                if not manifest.is_superseded(record.step, record.attempt)
            ]
            self._flat_state = len(manifest.attempts), self._metrics.restarts, len(records)
            return list(self._flat)

    def refresh(self) -> bool:
        """Read what is new since the last call; True if anything changed.

        Never raises for what it finds: see `problems`.
        """
        with self._lock:
            before = self._steps, self.problems
            # names and metrics come before run.json: an attempt is listed there before it writes
            topology = self.path / TOPOLOGY_DIR
            found, self._scan_problems = scan(topology, self._headers.keys() | self._bad.keys())
            changed = self._metrics.update()
            changed |= self._refresh_manifest()
            for known in (self._headers, self._bad):
                for name in known.keys() - found:
                    del known[name]
            new = found - self._headers.keys()
            for loaded in load_metadata(topology, new, self._is_known_bad):
                self._take(loaded)
            self._select()
            return changed or before != (self._steps, self.problems)

    def _refresh_manifest(self) -> bool:
        path = self.path / RUN_FILE
        signature = signature_of(path)
        if signature == self._manifest_signature:
            return False
        try:
            manifest = read_manifest(self.path)
        except RunError as error:
            self._manifest_problem = Problem(path, f"{error}; the last good content is used")
            return False
        self._manifest_signature = signature
        self._manifest_problem = None
        changed = manifest != self._manifest
        if changed:
            if (manifest.run_id, manifest.layers) != (self.run_id, self._manifest.layers):
                self._headers.clear()  # another run took the place: nothing read so far is its own
            self._bad.clear()
            self._use_manifest(manifest)
        return changed

    def _take(self, loaded: Loaded) -> None:
        """Check the metadata of a file against the run and its name."""
        try:
            if loaded.reason is not None:
                raise ValueError(loaded.reason)
            header = parse_header(loaded.metadata, self._manifest, self._table)
            if (header.step, header.attempt) != parse_snapshot_name(loaded.name):
                raise ValueError("was renamed: its metadata names another step or attempt")
        except ValueError as error:
            self._bad[loaded.name] = loaded.signature, describe(error)
        else:
            self._bad.pop(loaded.name, None)
            self._headers[loaded.name] = header

    def _is_known_bad(self, name: str, signature: Signature) -> bool:
        return name in self._bad and self._bad[name][0] == signature

    def _select(self) -> None:
        """Per step the file of the latest attempt, without superseded ones."""
        best: dict[int, tuple[int, str]] = {}
        last_attempt = len(self._manifest.attempts)
        unknown = []
        for name, header in self._headers.items():
            if self._manifest.is_superseded(header.step, header.attempt):
                continue
            if header.attempt > last_attempt:
                unknown.append(name)
            if header.step not in best or best[header.step][0] < header.attempt:
                best[header.step] = header.attempt, name
        self._unknown_attempts = sorted(unknown)
        self._steps = sorted(best)
        self._by_step = {step: best[step][1] for step in self._steps}

    def _report(self, problem: Problem) -> None:
        with self._lock:
            self._read_problems[problem] = None

    def __repr__(self) -> str:
        return (
            f"Run({printable(self.path)!r}, run_id={self.run_id!r}, layers={len(self._layers)}, "
            f"steps={len(self._steps)})"
        )


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory.

    Bad files inside never raise: they are listed in `Run.problems`, everything else is read.

    Raises:
        RunError: (a ValueError) not a directory, or no readable run.json; the message explains.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise RunError(
            f"run directory {printable(directory)} {what}; pass the directory that holds run.json."
        )
    return Run(directory)
