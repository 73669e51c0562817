"""Find run directories."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ._files import RUN_FILE
from ._problems import Problem, describe

MAX_DEPTH = 3


def discover_runs(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
) -> tuple[list[Path], list[Problem]]:
    """Find the runs among directories and below them, at most three levels deep.

    Args:
        paths: run directories, or parent directories of runs; one path is taken as well.

    Returns:
        Directories that hold a run.json (whether `open_run` can read it is not checked), each
        once, by the order of `paths`, then by name; and what could not be searched or held no
        run, with the reason.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    runs: dict[Path, Path] = {}
    problems: list[Problem] = []
    for path in map(Path, paths):
        found: list[Path] = []
        if not path.is_dir():
            reason = "is not a directory" if path.exists() else "does not exist"
            problems.append(Problem(path, reason))
            continue
        failures = len(problems)
        _search(path, MAX_DEPTH, found, problems)
        if not found and len(problems) == failures:
            reason = f"holds no run: no {RUN_FILE} here or up to {MAX_DEPTH} levels below"
            problems.append(Problem(path, reason))
        for run in found:
            runs.setdefault(run.resolve(), run)
    return list(runs.values()), problems


def _search(directory: Path, depth: int, found: list[Path], problems: list[Problem]) -> None:
    try:
        with os.scandir(directory) as entries:
            listing = sorted(entries, key=lambda entry: entry.name)
        if any(entry.name == RUN_FILE for entry in listing):
            found.append(directory)
            return
        if depth > 0:
            for entry in listing:
                if entry.is_dir() and not entry.name.startswith("."):
                    _search(directory / entry.name, depth - 1, found, problems)
    except OSError as error:
        problems.append(Problem(directory, describe(error)))
