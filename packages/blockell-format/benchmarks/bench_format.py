"""Times of the import, of snapshots and of listing a long run.

    python packages/blockell-format/benchmarks/bench_format.py [--snapshots 2000]

32 layers of R = 160, C = 40, K = 20, B = 16: TitanMAC's fc1 at 50% density.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter, open_run


def import_seconds() -> float:
    code = "import time; t = time.perf_counter(); import blockell_format.snapshots; "
    code += "print(time.perf_counter() - t)"
    runs = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(9)]
    return statistics.median(float(output) for output in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=2000)
    count = parser.parse_args().snapshots
    rng = np.random.default_rng(0)
    infos = [LayerInfo(name=f"blocks.{i}.fc1", R=160, C=40, K=20, B=16) for i in range(32)]
    columns = np.stack([rng.permutation(40)[:20] for _ in range(160)]).astype(np.int32)
    layer = LayerSnapshot(
        col_indices=columns,
        block_age_steps=rng.integers(0, 10_000, (160, 20)).astype(np.int32),
        block_score=rng.random((160, 20), dtype=np.float32),
        swapped=np.zeros((160, 20), dtype=bool),
        previous_columns=columns,
    )
    layers = {info.name: layer for info in infos}
    checksums = {info.name: ["0" * 32] for info in infos}
    print(f"import blockell_format.snapshots: {import_seconds():.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        written = []
        with SnapshotWriter(Path(folder) / "run", layers=infos) as writer:
            for step in range(count):
                started = time.perf_counter()
                path = writer.write(
                    step, layers, checksums=checksums, swap_counts=dict.fromkeys(layers, 0)
                )
                written.append(1e3 * (time.perf_counter() - started))
        size_mb = path.stat().st_size / 1e6
        print(f"one snapshot: {size_mb:.2f} MB, written in {np.median(written):.1f} ms")
        started = time.perf_counter()
        run = open_run(Path(folder) / "run")
        print(f"open {count} snapshots: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        run.refresh()
        print(f"refresh, nothing new: {1e3 * (time.perf_counter() - started):.1f} ms")
        started = time.perf_counter()
        for _ in run.read_layer(infos[0].name, steps=run.steps[:200]):
            pass
        spent = 1e3 * (time.perf_counter() - started) / len(run.steps[:200])
        print(f"read one layer of one snapshot: {spent:.2f} ms")


if __name__ == "__main__":
    main()
