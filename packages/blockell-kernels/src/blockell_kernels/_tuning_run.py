"""Measures sparse kernel and dense product, case by case, for the tuning cache.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from blockell_format import create_random_topology, transposed_index
from blockell_kernels._backends import DIRECTIONS, Backend, Case, Direction, Pattern, get_backend
from blockell_kernels._tuning import Table, Timing, cell_of, write

REPETITIONS = 30


class Shape(NamedTuple):
    """A layer's features."""

    in_features: int
    out_features: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """From "640x2560"."""
        return cls(*_two_numbers(text, "shape", "INxOUT, as 640x2560"))


class Layout(NamedTuple):
    """A tile and how many block rows share their columns."""

    tile: int
    row_group: int

    @classmethod
    def of(cls, text: str) -> Layout:
        """From "16x8"."""
        return cls(*_two_numbers(text, "layout", "TILExROWGROUP, as 16x8"))


def _two_numbers(text: str, name: str, form: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{name} (={text!r}) must have the form {form}.")
    return int(match[1]), int(match[2])


def tune(
    shapes: Iterable[Shape],
    *,
    layouts: Iterable[Layout],
    tokens: Iterable[int],
    densities: Iterable[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    device: str | torch.device = "cuda",
    report: Callable[[str], object] | None = None,
) -> Path:
    """Measure all combinations on one GPU and add them to its tuning cache.

    float32 is measured in the arithmetic that torch allows at the time (TF32 or not).

    Args:
        shapes: (in_features, out_features) of the layers.
        layouts: (tile, row_group); where a shape is no multiple of one, that pair is left out.
        tokens: numbers of tokens, at least 1; one answers for its neighbourhood, a factor of 1.4
            either way.
        densities: shares of live blocks, in (0, 1].
        dtypes: float32, float16, bfloat16.
        device: a CUDA device.
        report: is told every measurement, as a line of text.

    Returns:
        The file.

    Raises:
        ValueError: a number breaks a rule above, the cache is switched off, or there was nothing to
            measure.
    """
    device, tokens, densities = torch.device(device), list(tokens), list(densities)
    if device.type != "cuda":
        raise ValueError(f"device (={str(device)!r}) must be a CUDA device, as cuda or cuda:1.")
    for N in tokens:
        if N < 1:
            raise ValueError(f"tokens (={N}) must be at least 1.")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities (={density}) must be in (0, 1].")
    cells: dict[str, list[Timing]] = {}
    for case in cases(shapes, layouts, tokens, densities, dtypes, device):
        timing, cell = _measure(case), cell_of(case, _arithmetic(case))
        cells.setdefault(cell, []).append(timing)
        if report is not None:
            report(
                f"{cell}: N={timing.N}, {timing.in_features} -> {timing.out_features}, density "
                f"{timing.density:.2f}: sparse {timing.sparse_us:.1f} us, dense "
                f"{timing.dense_us:.1f} us"
            )
    if not cells:
        raise ValueError("nothing to measure: no shape is a multiple of a layout's tile and group.")
    name = torch.cuda.get_device_name(device)
    return write(Table(name, datetime.date.today().isoformat(), cells))


def cases(
    shapes: Iterable[Shape],
    layouts: Iterable[Layout],
    tokens: Iterable[int],
    densities: Iterable[float],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
) -> Iterator[Case]:
    """All combinations that exist and that the sparse kernels run, each density once."""
    sparse, layouts, tokens = get_backend("triton"), list(layouts), list(tokens)
    densities, dtypes = list(densities), list(dtypes)
    for in_features, out_features in shapes:
        for B, G in layouts:
            if in_features % B or out_features % (B * G):
                continue
            R, C = out_features // B, in_features // B
            for K in sorted({max(1, round(density * C)) for density in densities}):
                for dtype in dtypes:
                    for N in tokens:
                        for direction in DIRECTIONS:
                            case = Case(direction, device, dtype, N, R, C, K, B, G)
                            if sparse.unsupported(case) is None:
                                yield case


def _arithmetic(case: Case) -> str:
    from blockell_kernels._triton._rule import arithmetic

    return arithmetic(case)


def _measure(case: Case) -> Timing:
    """Both backends on random operands: medians of CUDA graph replays, caches cold."""
    with torch.cuda.device(case.device):
        functions = [operation(get_backend(name), case) for name in ("triton", "dense")]
        sparse_us, dense_us = (replay_us(function) for function in functions)
    sizes = case.N, case.C * case.B, case.R * case.B
    return Timing(*sizes, case.density, sparse_us, dense_us)


def operation(backend: Backend, case: Case) -> Callable[[], object]:
    """One direction of a backend over random operands of a case."""
    N, R, C, K, B = case.N, case.R, case.C, case.K, case.B
    generator = torch.Generator().manual_seed(0)
    cols = create_random_topology(R, C, K, generator=generator, row_group=case.row_group)
    cols = cols.to(case.device)
    index = transposed_index(cols, C)
    pattern = Pattern(cols, C, B, case.row_group, K, index.order, index.col_start)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=case.device, dtype=case.dtype)

    x, dy, values = random(N, C * B), random(N, R * B), random(R, K, B, B)
    directions: dict[Direction, Callable[[], object]] = {
        "forward": lambda: backend.forward(x, values, None, pattern),
        "grad_input": lambda: backend.grad_input(dy, values, pattern),
        "grad_values": lambda: backend.grad_values(dy, x, pattern),
    }
    return directions[case.direction]


def replay_us(function: Callable[[], object]) -> float:
    """Median microseconds of one call as a CUDA graph, the level-2 cache cold."""
    clear = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()  # compiles, outside of the capture
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            function()
        times = []
        for _ in range(REPETITIONS):
            clear.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(side)
            graph.replay()
            end.record(side)
            times.append((start, end))
        side.synchronize()
    graph.reset()
    return sorted(start.elapsed_time(end) for start, end in times)[REPETITIONS // 2] * 1e3
