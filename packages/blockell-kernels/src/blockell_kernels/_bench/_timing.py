"""Time steps fairly: contenders take turns, so that a disturbance meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

CLEAR_BYTES = 256 * 2**20  # more than any level-2 cache


class Percentiles(NamedTuple):
    """Milliseconds per step."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


class CpuClock:
    """Wall time of one step, or the process's CPU time, which other processes hardly disturb."""

    def __init__(self, cpu_time: bool = False) -> None:
        self._now = time.process_time if cpu_time else time.perf_counter

    def time_ms(self, step: Callable[[], object]) -> float:
        start = self._now()
        step()
        return (self._now() - start) * 1e3


class CudaClock:
    """Time between two events on the device, the level-2 cache cold."""

    def __init__(self, device: str) -> None:
        self._clear = torch.empty(CLEAR_BYTES, dtype=torch.uint8, device=device)

    def time_ms(self, step: Callable[[], object]) -> float:
        self._clear.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def clock_for(device: str, cpu_time: bool = False) -> CpuClock | CudaClock:
    """The clock of a device type."""
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock(cpu_time)


def time_all(
    steps: dict[str, Callable[[], object]],
    clock: CpuClock | CudaClock,
    *,
    rounds: int,
    budget_s: float,
) -> dict[str, Percentiles]:
    """Percentiles per step, over `rounds` rounds in which each takes one turn.

    One round more warms up. A step that has used up `budget_s` seconds, after three turns at least,
    sits out the rest.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            if len(samples[name]) < 3 or sum(samples[name]) < budget_s * 1e3:
                samples[name].append(clock.time_ms(step))
    return {name: _percentiles(times) for name, times in samples.items()}


def _percentiles(times_ms: list[float]) -> Percentiles:
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Percentiles(*torch.tensor(times_ms, dtype=torch.float64).quantile(quantiles).tolist())


def host_us(step: Callable[[], object], device: str, calls: int = 15) -> float | None:
    """Microseconds after which a call returns on the host, the device idle before; the median.

    None where the host computes, too: there it is the time itself.
    """
    if torch.device(device).type != "cuda":
        return None
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(samples)[calls // 2]


def peak_mib(step: Callable[[], object], device: str) -> float | None:
    """MiB that a step holds at most, beyond its operands; None where torch does not count them.

    A CUDA graph holds its memory all the time, and shows none.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
