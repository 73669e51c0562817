"""Fixtures of the torch-free tests; without torch, tests/torch is not collected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter

collect_ignore = [] if importlib.util.find_spec("torch") else ["torch"]

settings.register_profile(
    "blockell", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("blockell")

LAYERS = (LayerInfo("blocks.0.fc1", 6, 5, 3, 4), LayerInfo("blocks.0.fc2", 4, 6, 4, 4, 2))


def make_layer(info: LayerInfo, seed: int = 0, live: int | None = None) -> LayerSnapshot:
    """A valid layer with `live` blocks per row and a swap in every row group."""
    rng = np.random.default_rng(seed)
    live = info.K if live is None else live
    rows = [rng.permutation(info.C) for _ in range(info.R // info.row_group)]
    columns = np.repeat(np.array(rows)[:, : info.K], info.row_group, axis=0).astype(np.int32)
    columns[:, live:] = -1
    swapped = np.zeros(columns.shape, dtype=bool)
    swapped[:, 0] = True
    before = columns.copy()
    before[:, 0] = -1
    return LayerSnapshot(
        col_indices=columns,
        block_age_steps=rng.integers(0, 1000, columns.shape),
        block_score=rng.random(columns.shape, dtype=np.float32),
        swapped=swapped,
        previous_columns=before,
    )


@dataclass
class RunMaker:
    """Writes run directories for tests."""

    path: Path
    layers: tuple[LayerInfo, ...] = LAYERS
    options: dict[str, Any] = field(default_factory=dict)

    def writer(self, **options: Any) -> SnapshotWriter:
        return SnapshotWriter(self.path, layers=self.layers, **{**self.options, **options})

    def content(self, seed: int = 0) -> dict[str, LayerSnapshot]:
        return {info.name: make_layer(info, seed) for info in self.layers}

    def write(self, writer: SnapshotWriter, step: int, **changes: Any) -> Path:
        """Write one snapshot; `changes` replace arguments."""
        arguments: dict[str, Any] = {
            "layers": self.content(abs(step)),
            "checksums": {info.name: [f"sum-{step}"] for info in self.layers},
            "swap_counts": {info.name: step % 7 for info in self.layers},
        }
        arguments.update(changes)
        return writer.write(step, **arguments)

    def make(self, *steps: int, **options: Any) -> list[Path]:
        """A closed run with these snapshots."""
        with self.writer(**options) as writer:
            for step in steps:
                writer.log({"loss": 1.0 / (step + 1)}, step)
            return [self.write(writer, step) for step in steps]


@pytest.fixture
def run_maker(tmp_path: Path) -> RunMaker:
    return RunMaker(tmp_path / "run")


@pytest.fixture
def make_layer_snapshot() -> Callable[..., LayerSnapshot]:
    return make_layer
