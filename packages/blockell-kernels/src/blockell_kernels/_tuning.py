"""Times measured on this machine, kept in a file between processes, and looked up by case.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; width: outputs
that share a column list (row_group*B).

`python -m blockell_kernels.tune` measures the sparse kernel against the dense product; here the
results are stored and found again. A measurement answers for its *class*: direction, arithmetic,
tile, width, and N, in and out to the nearest power of two; between measured densities the ratio of
times is interpolated. So a new number of tokens never measures anything, it finds a class or does
not, and then the table shipped with the package answers.

One file per device name and per versions of this package and of Triton, in the directory that the
environment variable BLOCKELL_TUNING names ("off": no file is read or written), by default
`blockell-kernels` in the user's cache directory. It is read when a case is first decided. One that
cannot be read is reported by a warning and ignored.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blockell_kernels._backends import Case, Verdict

ENV_VAR = "BLOCKELL_TUNING"
OFF = ("off", "0", "no", "false")
FORMAT = 1


class Timing(NamedTuple):
    """One measurement."""

    N: int
    in_features: int
    out_features: int
    density: float
    sparse_us: float
    dense_us: float


class Table(NamedTuple):
    """The measurements of one device."""

    device: str
    date: str
    """When the latest of them were made."""
    cells: dict[str, list[Timing]]
    """By `cell_of`."""

    def merged(self, other: Table) -> Table:
        """The other's measurements over this one's."""
        cells = {}
        for key in {**self.cells, **other.cells}:
            by_shape = {row[:4]: row for row in self.cells.get(key, [])}
            by_shape |= {row[:4]: row for row in other.cells.get(key, [])}
            cells[key] = [by_shape[shape] for shape in sorted(by_shape)]
        return Table(other.device, max(self.date, other.date), cells)


def cell_of(case: Case, arithmetic: str) -> str:
    """The key of a case's measurements: direction, arithmetic, tile and width."""
    return f"{case.direction} {arithmetic} {case.B}x{case.row_group * case.B}"


def directory() -> Path | None:
    """Where the files lie; None where the cache is switched off."""
    named = os.environ.get(ENV_VAR)
    if named is not None and named.strip().lower() in OFF:
        return None
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "blockell-kernels"


def file_for(device: str) -> Path | None:
    """The file of a device's measurements; None where the cache is switched off."""
    where = directory()
    if where is None:
        return None
    from blockell_kernels import __version__
    from blockell_kernels.env import version_of

    name = f"{device} {__version__} triton {version_of('triton')}"
    return where / f"tuning-{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.json"


def write(table: Table) -> Path:
    """Add measurements to the device's file, all or nothing, and take them up in this process.

    Raises:
        ValueError: the cache is switched off.
        OSError: the directory cannot be written.
    """
    path = file_for(table.device)
    if path is None:
        raise ValueError(
            f"environment variable {ENV_VAR} (={os.environ.get(ENV_VAR)!r}) switches the tuning "
            "cache off; unset it, or name a directory."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read(path)
    table = (known or Table(table.device, table.date, {})).merged(table)
    content = {"format": FORMAT, "device": table.device, "date": table.date, "cells": table.cells}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    forget()
    return path


def read(path: Path) -> Table | None:
    """The table in a file; None where there is none, or, with a warning, none that can be used."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn(path, str(error))
        return None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} instead of {FORMAT}")
        cells = {str(k): [_timing(row) for row in rows] for k, rows in content["cells"].items()}
        return Table(str(content["device"]), str(content["date"]), cells)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(path, f"it is damaged ({type(error).__name__}: {error})")
        return None


def _timing(row: Iterable[Any]) -> Timing:
    N, in_features, out_features, density, sparse_us, dense_us = row
    timing = Timing(
        int(N), int(in_features), int(out_features), float(density), float(sparse_us),
        float(dense_us),
    )  # fmt: skip
    if not all(0 < number < math.inf for number in timing):
        raise ValueError(f"no measurement: {timing}")
    return timing


def _warn(path: Path, why: str) -> None:
    warnings.warn(
        f"tuning cache {path} is ignored: {why}. Delete it, or measure again with "
        "`python -m blockell_kernels.tune`.",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def table_for(device: str) -> Table | None:
    """The measurements of a device, read once; None where there are none."""
    path = file_for(device)
    return None if path is None else read(path)


def forget() -> None:
    """Decide again, by what the files hold now."""
    from blockell_kernels import _backends, _plan

    table_for.cache_clear()
    _backends.forget()
    _plan.forget()


def verdict(case: Case, arithmetic: str) -> Verdict | None:
    """What was measured here says of a case; None where nothing of its class was."""
    if case.device.type != "cuda":
        return None
    table = table_for(torch.cuda.get_device_name(case.device))
    return None if table is None else judge(table, case, arithmetic)


def judge(table: Table, case: Case, arithmetic: str) -> Verdict | None:
    """The verdict of one table; see `verdict`."""
    shape = (case.N, case.C * case.B, case.R * case.B)
    rows = [row for row in table.cells.get(cell_of(case, arithmetic), []) if _alike(row, shape)]
    if not rows:
        return None
    nearest = min(rows, key=lambda row: (_octaves(row, shape), row))
    points = sorted(
        (row.density, row.sparse_us / row.dense_us) for row in rows if row[:3] == nearest[:3]
    )
    ratio = _between(points, case.density)
    closest = min(
        (row for row in rows if row[:3] == nearest[:3]),
        key=lambda row: (abs(row.density - case.density), row.density),
    )
    return Verdict(
        ratio <= 1,
        f"measured on this {table.device} ({table.date}, tuning cache): {case.direction} at "
        f"N={closest.N}, {closest.in_features} -> {closest.out_features}, density "
        f"{closest.density:.2f} takes {closest.sparse_us:.1f} us sparse and {closest.dense_us:.1f} "
        f"us dense; at density {case.density:.2f} {ratio:.2f} times the dense time",
    )


def _alike(row: Timing, shape: tuple[int, int, int]) -> bool:
    """Whether N, in and out agree to the nearest power of two."""
    return all(
        round(math.log2(max(a, 1))) == round(math.log2(b))
        for a, b in zip(shape, row[:3], strict=True)
    )


def _octaves(row: Timing, shape: tuple[int, int, int]) -> float:
    return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(shape, row[:3], strict=True))


def _between(points: list[tuple[float, float]], density: float) -> float:
    """The ratio at a density, linear between measured ones; in proportion to it below them.

    Above the densest measurement the sparse time grows in proportion as well: the careful guess.
    """
    low, high = points[0], points[-1]
    if density <= low[0]:
        return low[1]
    if density >= high[0]:
        return high[1] * density / high[0]
    for (d0, r0), (d1, r1) in itertools.pairwise(points):
        if density <= d1:
            return r0 + (r1 - r0) * (density - d0) / (d1 - d0)
    raise AssertionError(points)
