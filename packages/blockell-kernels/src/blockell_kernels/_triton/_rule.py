"""When the sparse kernels beat the dense product on a GPU: a measured table, looked up.

Legend: B tile side, N tokens; width: outputs that share a column list (row_group*B).

For every direction, arithmetic, tile and width, `break_even.json` holds the densities up to which
the sparse kernel was faster than scattering the weight and multiplying densely, and than
multiplying alone, at each measured (N, in, out); and where a kernel for more blocks took over and
was faster again. A case takes the numbers of the nearest of them, in octaves.
`benchmarks/grid_gpu.py` measures, `benchmarks/break_even.py` writes the file.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from blockell_kernels._backends import Case, Verdict
from blockell_kernels._gluon import _halves
from blockell_kernels._triton._device import capability, dot_precision
from blockell_kernels._triton._walk import least_density

UNMEASURED_FACTOR = 0.5
"""Of the break-even density, on GPUs of another generation than the measured one; of no more than
the density up to which the measured one took kernels that they run, too."""


class Measured(NamedTuple):
    """The break-even densities at one shape: rising, at each of them the faster one changes.

    Up to the first the sparse kernel is: [0.0] never, [1.0] always.
    """

    N: int
    in_features: int
    out_features: int
    copied: list[float]
    """Against a dense product whose weight is copied first."""
    alone: list[float]
    """Against one whose weight need not be copied."""


def passed(density: float, limits: list[float]) -> int:
    """How many of the break-evens lie below a density; after an even number sparse is faster."""
    return sum(density > limit for limit in limits)


@cache
def table() -> dict[str, Any]:
    """The shipped measurements: {"device", "rows": {"direction arithmetic BxWidth": [...]}}."""
    text = files("blockell_kernels._triton").joinpath("break_even.json").read_text("utf-8")
    return json.loads(text)


def arithmetic(case: Case) -> str:
    """ "half", "tf32", "float32" where kernels for float16 halves run, else "3xtf32"."""
    if case.dtype != torch.float32:
        return "half"
    if dot_precision(case.dtype, case.device) == "tf32":
        return "tf32"
    return "float32" if _halves.available(case.device) else "3xtf32"


def nearest(case: Case, kind: str) -> tuple[Measured, int] | None:
    """The nearest measured shape and its width, among the widest not above the case's."""
    prefix, width = f"{case.direction} {kind} {case.B}x", case.row_group * case.B
    widths = [int(key[len(prefix) :]) for key in table()["rows"] if key.startswith(prefix)]
    fitting = [w for w in widths if w <= width]
    if not fitting:
        return None
    shape = (case.N, case.C * case.B, case.R * case.B)

    def octaves(row: list[float]) -> float:
        return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(shape, row[:3], strict=True))

    row = min(table()["rows"][f"{prefix}{max(fitting)}"], key=octaves)
    return Measured(*row), max(fitting)


def verdict(case: Case) -> Verdict:
    """Whether the sparse kernel beats the dense product on this case, and by which measurement."""
    return _verdict(case, arithmetic(case))


def beats_copied(case: Case) -> bool:
    """Whether the sparse kernel beats a dense product whose weight is dense already.

    True where that was not measured: nothing is then changed for the sake of a shared copy.
    """
    if case.device.type == "cuda" and capability(case.device) != (9, 0):
        return True
    found = nearest(case, arithmetic(case))
    return found is None or passed(case.density, found[0].alone) % 2 == 0


@lru_cache(maxsize=4096)
def _verdict(case: Case, kind: str) -> Verdict:
    found = nearest(case, kind)
    if found is None:
        return Verdict(False, f"tile {case.B} was not measured for {case.direction} in {kind}")
    row, width = found
    limits, factor = row.copied, ""
    if case.device.type == "cuda" and capability(case.device) != (9, 0):
        # Above that density a kernel was measured that other GPUs do not run.
        limits = [min(limits[0], least_density(case)) * UNMEASURED_FACTOR]
        factor = f" times {UNMEASURED_FACTOR} on a GPU not measured"
    below = passed(case.density, limits)
    wins = below % 2 == 0
    # An always faster one is named by the limit above it, 1; a slower one by the one it has passed.
    limit = limits[below] if wins and below < len(limits) else limits[below - 1]
    sign = "<=" if case.density <= limit else ">"
    return Verdict(
        wins,
        f"density {case.density:.2f} {sign} {limit:.2f}, the break-even of "
        f"{case.direction} measured on {table()['device']} at N={row.N}, {row.in_features} -> "
        f"{row.out_features}, tile {case.B}, {width} outputs sharing columns, {kind}{factor}",
    )
