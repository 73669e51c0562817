"""Runs to open: a good one, and directories that hold all kinds of rubbish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard.example import EXAMPLE_LAYERS, write_example_run
from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve decisions of four layers; nobody may change it."""
    path = tmp_path_factory.mktemp("runs") / "good"
    return write_example_run(path, layers=EXAMPLE_LAYERS[:4], decisions=12)


@pytest.fixture
def run_copy(good_run: Path, tmp_path: Path) -> Path:
    """The good run, for tests that damage or extend it."""
    return Path(shutil.copytree(good_run, tmp_path / "copy"))


@pytest.fixture
def garbage_dir(tmp_path: Path) -> Path:
    """A directory whose run.json is no run file, with foreign files beside it."""
    path = tmp_path / "garbage"
    (path / "topology").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"name": "something else"}))
    (path / "topology" / "step-00000001.safetensors").write_bytes(b"\x00" * 40)
    (path / "metrics.jsonl").write_text("not json\n")
    return path


@pytest.fixture
def damaged_run(run_copy: Path) -> Path:
    """A run with a truncated, an empty, a foreign and a misnamed file, and a bad metrics line."""
    files = sorted((run_copy / "topology").glob("*.safetensors"))
    files[3].write_bytes(files[3].read_bytes()[:100])
    files[5].write_bytes(b"")
    files[7].write_bytes(b"PK\x03\x04 this is a zip file, or says so")
    (run_copy / "topology" / "notes.txt").write_text("hello")
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": "many"}\n')
    return run_copy


@pytest.fixture
def small_layer() -> LayerSnapshot:
    """R = 3, C = 4, K = 3 with one spare slot per row; row 0 swapped column 3 for column 1."""
    return LayerSnapshot(
        col_indices=np.array([[0, 1, -1], [2, 3, -1], [1, 0, -1]], dtype=np.int32),
        block_age_steps=np.array([[30, 0, 0], [10, 20, 0], [30, 30, 0]], dtype=np.int32),
        block_score=np.array([[0.5, 1.0, 0.0], [2.0, np.nan, 0.0], [0.25, 4.0, 0.0]], "float32"),
        swapped=np.array([[False, True, False], [False] * 3, [False] * 3]),
        previous_columns=np.array([[0, 3, -1], [2, 3, -1], [1, 0, -1]], dtype=np.int32),
    )


@pytest.fixture(scope="session")
def task_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that learn "sums" for 50 steps, then grow by one block per row for "text".

    Snapshots at 0, 25, 50, 75 and 100. At 25 row 0 of both swaps column 0 for column 5; nothing
    else is ever swapped. Two ranks, which disagree on the second layer at 75 and 100.
    """
    path = tmp_path_factory.mktemp("runs") / "tasks"
    layers = [LayerInfo(f"blocks.{i}.fc", R=2, C=6, K=3, B=8) for i in range(2)]
    config = {"tasks": ["sums", "text"], "steps": [50, 50], "model": {"d": 16}}
    writer = SnapshotWriter(path, layers=layers, config=config, run_id="tasks", world_size=2)
    with writer:
        for step in (0, 25, 50, 75, 100):
            columns = np.array([[0 if step == 0 else 5, 1, -1], [2, 3, -1]], dtype=np.int32)
            ages = np.full((2, 3), step, dtype=np.int32)
            ages[0, 0] = max(step - 25, 0)
            ages[:, 2] = 0
            if step > 50:
                columns[:, 2], ages[:, 2] = 4, step - 50
            swapped, before = np.zeros((2, 3), dtype=bool), columns.copy()
            if step == 25:
                swapped[0, 0], before[0, 0] = True, 0
            score = np.ones((2, 3), dtype=np.float32)
            layer = LayerSnapshot(columns, ages, score, swapped, before)
            sums = {"blocks.0.fc": ["a", "a"], "blocks.1.fc": ["a", "b" if step > 50 else "a"]}
            writer.write(
                step,
                {info.name: layer for info in layers},
                checksums=sums,
                swap_counts=dict.fromkeys(sums, int(swapped.sum())),
            )
            writer.log({"loss": 8.0 if step == 75 else 1.0, "accuracy": step / 100}, step)
    return path
