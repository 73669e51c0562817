"""When the sparse kernels beat the dense product on a GPU: measured times, looked up.

Legend: B tile side, N tokens; width: outputs that share a column list (row_group*B).

For every direction, arithmetic, tile and width, `measured.json` holds shapes (N, in, out), and at
some densities of each how long the sparse kernel took, relative to scattering the weight and
multiplying densely, and to multiplying alone. A case takes a mean of the nearest shapes' ratios at
its own density. `benchmarks/grid_gpu.py` measures, `benchmarks/table_gpu.py` writes the file.

Products by the whole weight (`_gluon._whole`) take as long in any structure: for them the file
holds ratios by shape and density alone, to multiplying alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from blockell_kernels._backends import DIRECTIONS, Case, Verdict
from blockell_kernels._gluon import _halves
from blockell_kernels._gluon import _whole as _by_whole
from blockell_kernels._triton._device import capability, dot_precision
from blockell_kernels._triton._walk import least_density

UNMEASURED_FACTOR = 0.5
"""Of the break-even density, on GPUs of another generation than the measured one; of no more than
the density up to which the measured one took kernels that they run, too."""
NEIGHBOURS = 7
SAME, CLOSE = 0.05, 0.2
"""Octaves: a shape no farther away is the case's own and answers alone; a distance that counts half
as much as none."""
FEATURES = 0.4
"""What an octave of in or out counts, of an octave of N."""
DENSITIES = 1.0
"""What an octave of density counts, beyond those measured at a shape."""
BOUND = 0.5
"""Octaves by which one measurement may win or lose: far shapes then cannot outvote near ones. These
six numbers decided best about the measured shapes, each left out of the table in turn: for 5% of
the products they chose a way that is slower by more than 5%, the nearest shape alone for 8%. Where
one density of a shape is left out, it is 2.8%."""
STEP = 0.05
HIDDEN = 0.7
"""Of a copy's time, what passes beside the weight gradient if it is made for the input gradient
alone: in 99 steps of 256 to 4096 tokens whose forward product is sparse by itself it was 3 us on
the median, at any number of tokens (one H200, d0f45fe, 2026-11-28)."""
ONE_COPY = 0.95
"""Of what two sparse products take, what two dense ones with one copy may, to be chosen."""


class Shape(NamedTuple):
    """What was measured at one shape: log2 of the sparse kernel's share of the other's time."""

    N: int
    in_features: int
    out_features: int
    points: list[list[float]]
    """[density, against the dense product whose weight is copied first, against it alone], by
    rising density."""


class Found(NamedTuple):
    """What the table says of a case."""

    octaves: float
    """The log2 of the expected share: below zero the sparse kernel wins."""
    shapes: list[Shape]
    """By whose measurements, the nearest first."""
    width: int


@cache
def table() -> dict[str, Any]:
    """The shipped measurements: "device", "sources", "rows" by "direction arithmetic BxWidth", and
    "whole" by "direction arithmetic B"."""
    text = files("blockell_kernels._triton").joinpath("measured.json").read_text("utf-8")
    return json.loads(text)


def arithmetic(case: Case) -> str:
    """ "half", "tf32", "float32" where kernels for float16 halves run, else "3xtf32"."""
    if case.dtype != torch.float32:
        return "half"
    if dot_precision(case.dtype, case.device) == "tf32":
        return "tf32"
    return "float32" if _halves.available(case.device) else "3xtf32"


class Logs(NamedTuple):
    """log2 of a measured shape's sizes, and of the least and greatest density measured at it."""

    N: float
    in_features: float
    out_features: float
    low: float
    high: float


@cache
def _measured(section: str, key: str) -> tuple[list[Shape], list[Logs]]:
    """The shapes of one of the table's lists, in order, and their logarithms."""
    shapes = sorted(Shape(*row) for row in table()[section][key])
    densities = [(shape.points[0][0], shape.points[-1][0]) for shape in shapes]
    sizes = [(*shape[:3], *ends) for shape, ends in zip(shapes, densities, strict=True)]
    return shapes, [Logs(*map(math.log2, numbers)) for numbers in sizes]


def interpolated(shape: Shape, density: float, column: int) -> float:
    """A shape's measurement at a density: on the line through two, beyond all as the last two.

    The line is one of octaves over octaves: many kernels take as long as blocks are many.
    """
    points = shape.points
    if len(points) == 1:
        return points[0][column]
    at = next((i for i, point in enumerate(points) if density <= point[0]), len(points) - 1)
    low, high = points[max(at, 1) - 1], points[max(at, 1)]
    slope = (high[column] - low[column]) / math.log2(high[0] / low[0])
    return low[column] + slope * math.log2(density / low[0])


def nearest(
    case: Case, kind: str, density: float | None = None
) -> tuple[list[tuple[float, Shape]], int] | None:
    """(weight, shape) of the nearest shapes, and their width: the widest not above the case's."""
    prefix, width = f"{case.direction} {kind} {case.B}x", case.row_group * case.B
    widths = [int(key[len(prefix) :]) for key in table()["rows"] if key.startswith(prefix)]
    fitting = [w for w in widths if w <= width]
    if not fitting:
        return None
    at = case.density if density is None else density
    return _nearest(case, "rows", f"{prefix}{max(fitting)}", at), max(fitting)


@lru_cache(maxsize=64)  # a case is asked about several times
def _nearest(case: Case, section: str, key: str, density: float) -> list[tuple[float, Shape]]:
    """(weight, shape) of the nearest of a list; of the first alone if it is the case's own.

    What counts is octaves: of tokens, of features, and of densities beyond those measured there.
    """
    N, octaves = math.log2(max(case.N, 1)), math.log2(density)
    inputs, outputs = math.log2(case.C * case.B), math.log2(case.R * case.B)
    shapes, logs = _measured(section, key)
    near = sorted(
        (
            abs(N - n)
            + FEATURES * (abs(inputs - i) + abs(outputs - o))
            + DENSITIES * max(0.0, octaves - high, low - octaves),
            at,
        )
        for at, (n, i, o, low, high) in enumerate(logs)
    )[:NEIGHBOURS]
    if near[0][0] <= SAME:
        near = near[:1]
    return [((far + CLOSE) ** -2, shapes[at]) for far, at in near]


def _mean(
    near: list[tuple[float, Shape]], share: Callable[[Shape], float], bound: float = BOUND
) -> float:
    """The weighted mean of a share, bounded where there are several shapes."""
    bound = bound if len(near) > 1 else math.inf
    shares = [(weight, min(bound, max(-bound, share(shape)))) for weight, shape in near]
    return sum(weight * found for weight, found in shares) / sum(weight for weight, _ in near)


def expected(
    case: Case,
    kind: str,
    copied: bool = True,
    density: float | None = None,
    bound: float = BOUND,
) -> Found | None:
    """The sparse kernel's time beside a dense product, its weight `copied` first or not.

    At another density than the case's, if one is given. Bounded, it tells who wins, not by how
    much.
    """
    found = nearest(case, kind, density)
    if found is None:
        return None
    near, width = found
    column, at = 1 if copied else 2, case.density if density is None else density
    octaves = _mean(near, lambda shape: interpolated(shape, at, column), bound)
    return Found(octaves, [shape for _, shape in near], width)


def expected_whole(case: Case, kind: str, copied: bool = True) -> Found | None:
    """As `expected`, of the product by the whole weight; None where that is not measured."""
    key, at = f"{case.direction} {kind} {case.B}", case.density
    found = nearest(case, kind)
    if key not in table()["whole"] or found is None or not _by_whole.available(case.device):
        return None
    near = _nearest(case, "whole", key, at)
    octaves = _mean(near, lambda shape: interpolated(shape, at, 1), math.inf)
    if copied:  # what the copy adds to the dense product, by the same measurements as elsewhere
        octaves -= _mean(
            found[0], lambda s: interpolated(s, at, 2) - interpolated(s, at, 1), math.inf
        )
    return Found(octaves, [shape for _, shape in near], 0)


@lru_cache(maxsize=4096)
def takes_whole(case: Case) -> bool:
    """Whether the product by the whole weight beats the other sparse kernels."""
    kind = arithmetic(case)
    whole = expected_whole(case, kind, copied=False)
    other = expected(case, kind, copied=False, bound=math.inf)
    return whole is not None and (other is None or whole.octaves < other.octaves)


def _expected_by_its_way(
    case: Case, kind: str, copied: bool = True, bound: float = BOUND
) -> Found | None:
    """What is expected of the way that is taken."""
    if takes_whole(case):
        return expected_whole(case, kind, copied)
    return expected(case, kind, copied, bound=bound)


def verdict(case: Case) -> Verdict:
    """Whether the sparse kernel beats the dense product on this case, and by which measurement."""
    return _verdict(case, arithmetic(case))


def beats_copied(case: Case, beside: bool = False) -> bool:
    """Whether the sparse kernel beats a dense product whose weight is dense already.

    Beside: whose weight is made dense here instead of beside the weight gradient. True where that
    was not measured: nothing is then changed for the sake of a shared copy.
    """
    if case.device.type == "cuda" and capability(case.device) != (9, 0):
        return True
    kind = arithmetic(case)
    found = _expected_by_its_way(case, kind, copied=False)
    if found is None or not beside:
        return found is None or found.octaves <= 0
    copied, alone = (_expected_by_its_way(case, kind, c, math.inf) for c in (True, False))
    assert copied is not None
    assert alone is not None
    copy = 2 ** (alone.octaves - copied.octaves) - 1  # in times of the dense product
    return 2**alone.octaves <= 1 + HIDDEN * copy


def loses_to_one_copy(case: Case) -> bool:
    """Whether both sparse products of a step lose to dense ones by one copy of the weight.

    In times of a dense product alone; the two take about as long. Not where nothing was measured.
    """
    if case.device.type == "cuda" and capability(case.device) != (9, 0):
        return False
    kind = arithmetic(case)
    sparse = copy = 0.0
    for direction in DIRECTIONS[:2]:
        one = case._replace(direction=direction)
        alone, copied = (
            _expected_by_its_way(one, kind, with_copy, math.inf) for with_copy in (False, True)
        )
        if alone is None or copied is None:
            return False
        sparse += 2**alone.octaves
        copy = copy or 2 ** (alone.octaves - copied.octaves) - 1
    return 2 + copy < ONE_COPY * sparse


def break_even(case: Case, kind: str) -> float:
    """The density up to which the sparse kernel is expected to win, in steps."""
    density = 0.0
    while density < 1:
        denser = round(density + STEP, 2)
        found = expected(case, kind, density=denser)
        if found is None or found.octaves > 0:
            break
        density = denser
    return density


@lru_cache(maxsize=4096)
def _verdict(case: Case, kind: str) -> Verdict:
    found = expected(case, kind)
    if found is None:
        return Verdict(False, f"tile {case.B} was not measured for {case.direction} in {kind}")
    shape = found.shapes[0]
    where = f"measured on {table()['device']} at N={shape.N}, {shape.in_features} -> "
    where += f"{shape.out_features}"
    if len(found.shapes) > 1:
        where += f" and {len(found.shapes) - 1} shapes near it"
    where += f", tile {case.B}, {found.width} outputs sharing columns, {kind}"
    if case.device.type == "cuda" and capability(case.device) != (9, 0):
        # Above that density a kernel was measured that other GPUs do not run.
        limit = min(break_even(case, kind), least_density(case)) * UNMEASURED_FACTOR
        wins = case.density <= limit
        return Verdict(
            wins,
            f"density {case.density:.2f} {'<=' if wins else '>'} {limit:.2f}, {UNMEASURED_FACTOR} "
            f"times the break-even of {case.direction} on a GPU not measured; {where}",
        )
    taken = _expected_by_its_way(case, kind)
    assert taken is not None
    return Verdict(
        taken.octaves <= 0,
        f"{case.direction} at density {case.density:.2f} takes {2**taken.octaves:.2f} of the time "
        f"of the dense product with its copy, {where}",
    )
