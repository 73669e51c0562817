"""Runs to open: a good one, and directories that hold all kinds of rubbish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard.example import EXAMPLE_LAYERS, write_example_run
from blockell_format.snapshots import LayerSnapshot


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
