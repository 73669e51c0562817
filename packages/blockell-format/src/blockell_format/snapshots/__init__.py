"""Snapshots of a topology over a training run: one writer, one reader, no torch.

FORMAT.md of this package states the format in one page.
"""

from ._discover import discover_runs
from ._files import DirectoryLock, write_atomically
from ._layers import LayerInfo, LayerSnapshot
from ._manifest import Attempt
from ._problems import Problem, RunError, SnapshotError
from ._run import Run, open_run
from ._snapshot import Snapshot
from ._writer import SnapshotWriter

__all__ = [
    "Attempt",
    "DirectoryLock",
    "LayerInfo",
    "LayerSnapshot",
    "Problem",
    "Run",
    "RunError",
    "Snapshot",
    "SnapshotError",
    "SnapshotWriter",
    "discover_runs",
    "open_run",
    "write_atomically",
]
