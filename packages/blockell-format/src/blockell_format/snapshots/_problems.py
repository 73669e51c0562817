"""What went wrong while reading: exceptions, and problems that are listed instead of raised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


class RunError(ValueError):
    """The directory cannot be used as a run; the message says why and what to do."""


class SnapshotError(ValueError):
    """A snapshot, or one layer of it, cannot be used; the message names file and reason."""


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that any terminal or browser takes, whatever bytes are in the name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Problem:
    """A file, or a part of one, that could not be read or that holds something odd."""

    path: Path
    """The file."""
    reason: str
    """What is wrong with it, and what became of the data."""

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def describe(error: BaseException) -> str:
    """An exception as a reason."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error) or type(error).__name__
