"""Time what the dashboard reads and draws on a long run.

    python benchmarks/bench_dashboard.py [--snapshots 2000] [--layers 8] [--json FILE]

Writes a made-up run into a temporary directory, then times, with cold
Python caches and a warm file cache: opening it, the overview, the series of one layer, one step
of one layer, drawing, and what a live refresh costs when nothing or one snapshot is new.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import plotly

from blockell_dashboard import figures
from blockell_dashboard.io import LoadedRun
from blockell_dashboard.layer_table import layer_table
from blockell_format import topology_checksum
from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter

REPEATS = 20
FIRST_VIEW = ("open", "overview", "layer_series")


def long_layers(count: int) -> tuple[LayerInfo, ...]:
    """Weights of 2560 x 640 and 640 x 2560 in tiles of 16, half dense."""
    return tuple(
        LayerInfo(f"blocks.{i // 2}.mlp.fc{i % 2 + 1}", *((160, 40, 20), (40, 160, 80))[i % 2], 16)
        for i in range(count)
    )


def write_long_run(path: Path, snapshots: int, layers: tuple[LayerInfo, ...]) -> None:
    """Snapshots that differ only in a few blocks: the reader's work is the same."""
    rng = np.random.default_rng(0)
    states = {}
    for info in layers:
        columns = np.argsort(rng.random((info.R, info.C)), axis=1)[:, : info.K].astype(np.int32)
        shape = columns.shape
        states[info.name] = LayerSnapshot(
            columns,
            np.zeros(shape, dtype=np.int32),
            rng.random(shape).astype(np.float32),
            np.zeros(shape, dtype=bool),
            columns.copy(),
        )
    checksums = {name: [topology_checksum(layer.col_indices)] for name, layer in states.items()}
    with SnapshotWriter(path, layers=layers) as writer:
        for index in range(snapshots):
            for layer in states.values():
                layer.block_age_steps += 10
                layer.block_age_steps[index % layer.block_age_steps.shape[0], 0] = 0
            writer.write(
                index * 10, states, checksums=checksums, swap_counts=dict.fromkeys(states, 40)
            )
            for step in range(index * 10, index * 10 + 10):
                writer.log({"loss": 1.0 + 1.0 / (1 + step), "lr": 1e-3}, step)


@contextmanager
def timed(results: dict[str, float], name: str) -> Iterator[None]:
    """Time on the clock and of the processor, which other work on the machine changes less."""
    start, work = time.perf_counter(), time.process_time()
    yield
    results[f"{name}_ms"] = (time.perf_counter() - start) * 1e3
    results[f"{name}_cpu_ms"] = (time.process_time() - work) * 1e3


def repeated(call: Callable[[int], Any], prepare: Callable[[int], Any] = int) -> dict[str, float]:
    """The same for `REPEATS` calls: percentiles on the clock, and the mean of the processor."""
    times, work = [], 0.0
    for index in range(REPEATS):
        prepare(index)
        once: dict[str, float] = {}
        with timed(once, "call"):
            call(index)
        times.append(once["call_ms"])
        work += once["call_cpu_ms"]
    low, middle, high = (round(value, 2) for value in np.percentile(times, [20, 50, 80]))
    return {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "cpu_ms": round(work / REPEATS, 2)}


def measure(path: Path, name: str) -> dict[str, Any]:
    """Times in milliseconds."""
    once: dict[str, float] = {}
    with timed(once, "open"):
        loaded = LoadedRun(path)
    with timed(once, "overview"):
        history = loaded.history()
        loaded.metrics().get("loss")
    with timed(once, "layer_series"):
        series = loaded.series(name)
    steps, info = loaded.run.steps, loaded.run.layers[name]
    spread = np.linspace(0, len(steps) - 1, REPEATS).astype(int)
    newest = loaded.snapshot(name, steps[-1])
    rates = history.rates(name)
    return {
        "first_view_ms": round(sum(once[f"{part}_ms"] for part in FIRST_VIEW), 1),
        "first_view_cpu_ms": round(sum(once[f"{part}_cpu_ms"] for part in FIRST_VIEW), 1),
        **{key: round(value, 1) for key, value in once.items()},
        "table_of_layers": repeated(lambda i: layer_table(loaded, steps[spread[i]])),
        "read_one_step": repeated(lambda i: loaded.snapshot(name, steps[spread[i]])),
        "draw_heatmap": repeated(
            lambda _: figures.topology_heatmap(newest, info, colour="age").to_json()
        ),
        "draw_swap_rate": repeated(lambda _: figures.swap_rate(history.steps, rates).to_json()),
        "draw_entropy": repeated(
            lambda _: figures.column_entropy(
                series.steps, series.entropy, series.dead_columns, C=info.C
            ).to_json()
        ),
        "refresh_nothing_new": repeated(lambda _: loaded.refresh()),
        "refresh_one_new": _refresh_with_news(loaded, name),
    }


def _refresh_with_news(loaded: LoadedRun, name: str) -> dict[str, float]:
    run = loaded.run
    layers = {key: run.snapshot(run.steps[-1]).layer(key) for key in run.layers}
    first = run.steps[-1] + 10
    with SnapshotWriter(loaded.path, layers=tuple(run.layers.values()), mode="resume") as writer:

        def write(index: int) -> None:
            step = first + 10 * index
            sums = {key: [key] for key in layers}
            writer.write(step, layers, checksums=sums, swap_counts=dict.fromkeys(layers, 1))
            writer.log({"loss": 1.0}, step)

        def look(_: int) -> None:
            loaded.refresh()
            loaded.history()
            loaded.metrics()
            loaded.series(name)

        return repeated(look, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=8, help="alternately 160 x 40 and 40 x 160")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    layers = long_layers(options.layers)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        write_long_run(path, options.snapshots, layers)
        size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        result = {
            "date": datetime.date.today().isoformat(),
            "snapshots": options.snapshots,
            "layers": options.layers,
            "run_mb": round(size_bytes / 1e6, 1),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "plotly": plotly.__version__,
            "cpus": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            **measure(path, layers[0].name),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
