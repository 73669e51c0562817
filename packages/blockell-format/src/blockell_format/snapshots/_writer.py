"""Writes a run directory."""

from __future__ import annotations

import dataclasses
import operator
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ._files import (
    MAX_STEP,
    METRICS_FILE,
    RUN_FILE,
    TEMPORARY_PREFIX,
    TOPOLOGY_DIR,
    DirectoryLock,
    snapshot_name,
    sync_directory,
    write_atomically,
)
from ._header import Header, RankSums, build_metadata
from ._json import dumps, to_plain
from ._layers import FIELDS, LayerInfo, LayerSnapshot, check_field
from ._manifest import MAX_WORLD_SIZE, Attempt, Manifest, read_manifest, write_manifest
from ._run import open_run
from ._snapshot import tensor_name


class SnapshotWriter:
    """Records topology decisions and metrics of a training run. Only rank 0 may have one.

    A snapshot appears under its final name completely or not at all. Nothing that exists is
    overwritten or deleted: a restarted job supersedes what it goes back behind (see `mode`).
    Usable as a context manager.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        layers: Sequence[LayerInfo],
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        world_size: int = 1,
        mode: Literal["new", "resume"] = "new",
        resume_step: int | None = None,
    ) -> None:
        """Create a run directory, or continue one.

        Args:
            run_dir: directory of the run; made if needed, other files in it are left alone.
            layers: layer table; when resuming it must equal that of the run.
            config: anything JSON can hold, for people and for the dashboard.
            run_id: identity of the run; default: a random one, or that of the resumed run.
            world_size: number of ranks, which is the number of checksums per layer.
            mode: "new" refuses a directory that holds a run. "resume" continues it as the next
                attempt: readers drop what earlier attempts recorded after `resume_step`.
            resume_step: the checkpoint's step, at least 0. Default: the last step on record, so
                that nothing is superseded. Only with "resume".

        Raises:
            FileExistsError: "new" and the directory holds a run already, or another process is
                writing to it.
            FileNotFoundError: "resume" and there is no run.
            ValueError: invalid arguments, or a layer table or run id that is not the run's.
            TypeError: `config` holds something that JSON cannot.
        """
        self.run_dir = Path(run_dir)
        table = tuple(layers)
        if len({layer.name for layer in table}) != len(table):
            raise ValueError("layers names a layer twice; names must be unique.")
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size (={world_size}) must be in [1, {MAX_WORLD_SIZE}].")
        if mode not in ("new", "resume"):
            raise ValueError(f'mode (={mode!r}) must be "new" or "resume".')
        if resume_step is not None and (mode == "new" or not 0 <= resume_step <= MAX_STEP):
            raise ValueError(
                f"resume_step (={resume_step}) must be at least 0 and goes with mode='resume' only."
            )
        plain = None if config is None else to_plain(config, "config")
        now = time.time()
        if mode == "new":
            self._refuse_existing()
            self.run_dir.mkdir(parents=True, exist_ok=True)
        elif not (self.run_dir / RUN_FILE).exists():
            raise FileNotFoundError(
                f"{self.run_dir} holds no {RUN_FILE} to resume; start it with mode='new'."
            )
        self._lock = DirectoryLock(self.run_dir)
        try:
            if mode == "new":
                self._refuse_existing()  # again: another process may have been faster
                attempts = (Attempt(1, 0, now, world_size, plain),)
                manifest = Manifest(run_id or os.urandom(16).hex(), now, table, attempts)
            else:
                manifest = self._resumed(table, run_id, resume_step, now, world_size, plain)
            (self.run_dir / TOPOLOGY_DIR).mkdir(exist_ok=True)
            write_manifest(self.run_dir, manifest)
            self._metrics_fd: int | None = _open_metrics(self.run_dir / METRICS_FILE)
        except BaseException:
            self._lock.release()
            raise
        self._manifest = manifest
        self._cut_short = False

    @property
    def run_id(self) -> str:
        """Identity of the run."""
        return self._manifest.run_id

    @property
    def attempt(self) -> int:
        """1 for a new run, one more for every resumption."""
        return self._manifest.attempts[-1].attempt

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layer table."""
        return self._manifest.layers

    def write(
        self,
        step: int,
        layers: Mapping[str, LayerSnapshot],
        *,
        checksums: Mapping[str, Sequence[str]],
        swap_counts: Mapping[str, int],
    ) -> Path:
        """Write the snapshot of one topology decision; returns its path.

        Args:
            step: optimizer step, at least 0.
            layers: every layer of the layer table.
            checksums: per layer one string per rank (`topology_checksum`).
            swap_counts: per layer the number of swapped blocks.

        Raises:
            ValueError: a layer is missing or unknown, or its content breaks a rule of the format;
                the message names layer, row and slot.
            FileExistsError: this attempt has already written a snapshot of this step.
        """
        self._require_open()
        step = _checked_step(step)
        for what, given in (
            ("layers", layers),
            ("checksums", checksums),
            ("swap_counts", swap_counts),
        ):
            self._check_names(what, given)
        tensors: dict[str, npt.NDArray[Any]] = {}
        for info in self.layers:
            for field in FIELDS:
                tensors[tensor_name(info.name, field)] = _field_array(
                    info, field, getattr(layers[info.name], field)
                )
        header = Header(
            step=step,
            attempt=self.attempt,
            world_size=self._manifest.attempts[-1].world_size,
            created=time.time(),
            swap_counts=tuple(_checked_count(info, swap_counts) for info in self.layers),
            checksums=tuple(self._rank_sums(info, checksums) for info in self.layers),
        )
        path = self.run_dir / TOPOLOGY_DIR / snapshot_name(step, self.attempt)
        if path.exists():
            raise FileExistsError(
                f"{path} exists: step (={step}) was already recorded by this attempt; "
                "record one snapshot per step."
            )
        data_bytes = sum(array.nbytes for array in tensors.values())
        sums = [
            "".join(f"{zlib.crc32(tensors[tensor_name(info.name, f)].data):08x}" for f in FIELDS)
            for info in self.layers
        ]
        metadata = build_metadata(self._manifest, header, data_bytes, sums)
        write_atomically(path, save(tensors, metadata))
        return path

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append one line to metrics.jsonl.

        Args:
            metrics: numbers, strings, booleans, None, or lists and mappings of these; scalars of
                numpy and torch are taken as numbers. NaN and infinities survive.
            step: optimizer step, at least 0.

        Raises:
            TypeError: a metric that JSON cannot hold, by name.
            ValueError: a negative step, or the writer is closed.
            OSError: the disk is full, ...; the writer can be used again afterwards.
        """
        fd = self._require_open()
        record = {
            "step": _checked_step(step),
            "attempt": self.attempt,
            "time": time.time(),
            "metrics": to_plain(metrics, "metrics"),
        }
        line = (dumps(record) + "\n").encode()
        try:
            _write_all(fd, b"\n" + line if self._cut_short else line)
        except OSError:  # a full disk, for instance: the next line must not be glued to the rest
            self._cut_short = True
            raise
        self._cut_short = False

    def close(self) -> None:
        """Flush the metrics to disk and let another writer in. Calling it again does nothing.

        Raises:
            OSError: the last metrics may not be on disk; the writer is closed all the same.
        """
        if self._metrics_fd is not None:
            fd, self._metrics_fd = self._metrics_fd, None
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
                self._lock.release()

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> int:
        if self._metrics_fd is None:
            raise ValueError(f"the writer of {self.run_dir} is closed; open another one.")
        return self._metrics_fd

    def _refuse_existing(self) -> None:
        topology = self.run_dir / TOPOLOGY_DIR
        for path in (self.run_dir, topology):
            if path.exists() and not path.is_dir():
                raise FileExistsError(f"{path} is not a directory; choose another run_dir.")
        for path in (self.run_dir / RUN_FILE, self.run_dir / METRICS_FILE):
            if path.exists() or path.is_symlink():
                raise FileExistsError(
                    f"{self.run_dir} already holds a run ({path.name} exists); choose another "
                    "directory, or continue it with mode='resume'."
                )
        if topology.is_dir() and any(topology.glob("step-*")):
            raise FileExistsError(f"{topology} already holds snapshots; choose another directory.")

    def _resumed(
        self,
        table: tuple[LayerInfo, ...],
        run_id: str | None,
        resume_step: int | None,
        now: float,
        world_size: int,
        config: dict[str, Any] | None,
    ) -> Manifest:
        old = read_manifest(self.run_dir)
        if run_id not in (None, old.run_id):
            raise ValueError(
                f"run_id (={run_id!r}) is not that of {self.run_dir} ({old.run_id!r})."
            )
        if table != old.layers:
            ours, theirs = ({layer.name: layer for layer in t} for t in (table, old.layers))
            names = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
            what = ", ".join(sorted(names)) or "their order"
            raise ValueError(
                f"layers differs from the run in {self.run_dir} ({what}); resume with the same "
                "model, or start a new run in another directory."
            )
        if resume_step is None:
            run = open_run(self.run_dir)
            resume_step = max([0, *run.steps, *(line["step"] for line in run.metrics())])
        if self._lock.held:
            for leftover in (self.run_dir / TOPOLOGY_DIR).glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink(missing_ok=True)  # half-written by a killed writer
        entry = Attempt(len(old.attempts) + 1, resume_step, now, world_size, config)
        return dataclasses.replace(old, attempts=(*old.attempts, entry))

    def _check_names(self, what: str, given: Mapping[str, Any]) -> None:
        known = {info.name for info in self.layers}
        missing, unknown = sorted(known - given.keys()), sorted(given.keys() - known)
        if missing or unknown:
            raise ValueError(
                f"{what} must name every layer of the layer table and no other; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
            )

    def _rank_sums(self, info: LayerInfo, checksums: Mapping[str, Sequence[str]]) -> RankSums:
        sums = checksums[info.name]
        world_size = self._manifest.attempts[-1].world_size
        if isinstance(sums, str) or len(sums) != world_size:
            raise ValueError(
                f"checksums of layer {info.name!r} (={sums!r}) must be one string per rank; "
                f"world_size is {world_size}."
            )
        ranks = tuple(str(entry) for entry in sums)
        return ranks[0] if len(set(ranks)) == 1 else ranks


def _checked_step(step: int) -> int:
    step = operator.index(step)
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step (={step}) must be in [0, {MAX_STEP}].")
    return step


def _checked_count(info: LayerInfo, swap_counts: Mapping[str, int]) -> int:
    count = operator.index(swap_counts[info.name])
    if count < 0:
        raise ValueError(f"swap_counts of layer {info.name!r} (={count}) must not be negative.")
    return count


def _field_array(info: LayerInfo, field: str, array: npt.ArrayLike) -> npt.NDArray[Any]:
    """A checked, contiguous, little-endian array."""
    array = np.asarray(array)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    try:
        check_field(info, field, array)
    except ValueError as error:
        raise ValueError(f"layer {info.name!r}: {error}") from None
    if field == "block_age_steps" and array.max() <= np.iinfo(np.int32).max:
        array = array.astype("<i4")
    return array


def _open_metrics(path: Path) -> int:
    """Open for appending, on a line of its own even after a line that was cut short."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags, 0o644)
    size = os.fstat(fd).st_size
    if size:
        os.lseek(fd, size - 1, os.SEEK_SET)
        if os.read(fd, 1) != b"\n":
            _write_all(fd, b"\n")
    sync_directory(path.parent)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
