"""Looks for snapshot files in a directory and reads their metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ._files import TEMPORARY_PREFIX, parse_snapshot_name
from ._header import read_metadata
from ._problems import Problem, describe

Signature = tuple[int, int, int]
_THREADS = 8
_CHUNK = 64


def signature_of(path: str | os.PathLike[str]) -> Signature:
    """Modification time, size and inode: changes whenever the file does."""
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1, -1)
    return status.st_mtime_ns, status.st_size, status.st_ino


def scan(directory: Path, known: Collection[str]) -> tuple[set[str], list[Problem]]:
    """Names of the snapshot files, and everything else in the directory as problems.

    Args:
        directory: need not exist.
        known: names that were found before; they stay when the directory cannot be read.
    """
    found: set[str] = set()
    problems: list[Problem] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(TEMPORARY_PREFIX):
                    continue  # being written, or left by a killed writer
                if name not in known and parse_snapshot_name(name) is None:
                    reason = "is not named like a snapshot; ignored"
                    problems.append(Problem(directory / name, reason))
                elif not entry.is_file(follow_symlinks=False):
                    reason = "is not a regular file; ignored"
                    problems.append(Problem(directory / name, reason))
                else:
                    found.add(name)
    except FileNotFoundError:
        pass  # no decision was recorded yet
    except OSError as error:
        problems.append(Problem(directory, describe(error)))
        found = set(known)
    return found, sorted(problems, key=lambda problem: problem.path)


class Loaded(NamedTuple):
    """Metadata of one file, or why there is none."""

    name: str
    signature: Signature
    metadata: dict[str, str]
    reason: str | None


def load_metadata(
    directory: Path, names: Collection[str], is_known: Callable[[str, Signature], bool]
) -> Iterator[Loaded]:
    """Read the metadata of files; many of them from several threads, to wait for the disk once.

    Args:
        directory: where they lie.
        names: which.
        is_known: by name and signature, whether a file need not be read again.
    """

    def load(chunk: list[str]) -> list[Loaded]:
        results = []
        for name in chunk:
            path = os.path.join(directory, name)
            signature = signature_of(path)
            if is_known(name, signature):
                continue
            try:
                results.append(Loaded(name, signature, read_metadata(path), None))
            except (ValueError, OSError) as error:
                results.append(Loaded(name, signature, {}, describe(error)))
        return results

    ordered = sorted(names)
    chunks = [ordered[i : i + _CHUNK] for i in range(0, len(ordered), _CHUNK)]
    if len(chunks) < 2:
        for chunk in chunks:
            yield from load(chunk)
        return
    from concurrent.futures import ThreadPoolExecutor  # most refreshes do without

    with ThreadPoolExecutor(_THREADS) as executor:
        for results in executor.map(load, chunks):
            yield from results
