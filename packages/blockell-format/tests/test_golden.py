"""Version 1 stays readable for ever, and the writer still writes it byte for byte.

The run in golden/v1 was written once by the first release of the writer and is never written
again: a change that needs other files is a new version of the format. Its snapshots lack what
writers may leave out, the sums of their tensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter, open_run

GOLDEN = Path(__file__).parent / "golden" / "v1"
LAYERS = (LayerInfo("blocks.0.mlp.fc1", 4, 5, 3, 16), LayerInfo("äöü/fc2", 4, 6, 4, 8, 2))
FILES = [
    "step-00000100.safetensors",
    "step-00000200.a2.safetensors",
    "step-00000200.safetensors",
]


def golden_layer(info: LayerInfo, step: int) -> LayerSnapshot:
    """Made by arithmetic, so that no random generator has to stay the same."""
    rows = np.arange(info.R)[:, None] // info.row_group
    slots = np.arange(info.K)[None]
    columns = ((2 * rows + slots + step // 100) % info.C).astype(np.int32)
    columns[:, -1] = -1
    swapped = np.broadcast_to((rows + slots) % 3 == 0, columns.shape) & (columns >= 0)
    scores = ((rows * 7 + slots * 3 + step) / 8).astype(np.float32)
    scores[0, 0] = np.nan
    return LayerSnapshot(
        col_indices=columns,
        block_age_steps=np.where(swapped, 0, step + rows * info.K + slots),
        block_score=scores,
        swapped=swapped,
        previous_columns=np.where(swapped, (columns + 1) % info.C, columns).astype(np.int32),
    )


def write_golden_run(path: Path) -> None:
    """The calls that made golden/v1."""

    def write(writer: SnapshotWriter, step: int, ranks: list[str]) -> None:
        content = {info.name: golden_layer(info, step) for info in LAYERS}
        swaps = {name: int(layer.swapped.sum()) for name, layer in content.items()}
        sums = {LAYERS[0].name: ranks, LAYERS[1].name: ["same", "same"]}
        writer.write(step, content, checksums=sums, swap_counts=swaps)
        writer.log({"loss": 100.0 / step, "perplexity": float("inf"), "task": "ü"}, step)

    config = {"learning_rate": 0.001, "limit": float("nan")}
    options: dict[str, Any] = {"layers": LAYERS, "world_size": 2}
    with SnapshotWriter(path, run_id="golden", config=config, **options) as writer:
        write(writer, 100, ["a", "a"])
        write(writer, 200, ["a", "b"])
    with SnapshotWriter(path, mode="resume", resume_step=100, **options) as writer:
        write(writer, 200, ["c", "c"])


def test_golden_run_is_read(tmp_path: Path) -> None:
    path = tmp_path / "moved"
    shutil.copytree(GOLDEN, path)
    run = open_run(path)
    assert run.problems == []
    assert (run.run_id, run.world_size, run.steps) == ("golden", 2, [100, 200])
    assert tuple(run.layers.values()) == LAYERS
    assert run.config["learning_rate"] == 0.001
    assert np.isnan(run.config["limit"])
    assert [(entry.attempt, entry.resume_step) for entry in run.attempts] == [(1, 0), (2, 100)]
    assert run.created == 1700000000.0
    assert [(line["step"], line["loss"], line["task"]) for line in run.metrics()] == [
        (100, 1.0, "ü"),
        (200, 0.5, "ü"),
    ]
    assert run.metrics()[0]["perplexity"] == float("inf")
    assert run.swap_counts() == {
        100: {"blocks.0.mlp.fc1": 3, "äöü/fc2": 4},
        200: {"blocks.0.mlp.fc1": 3, "äöü/fc2": 4},
    }
    assert run.checksums() == {
        100: {"blocks.0.mlp.fc1": ("a", "a"), "äöü/fc2": ("same", "same")},
        200: {"blocks.0.mlp.fc1": ("c", "c"), "äöü/fc2": ("same", "same")},
    }
    for step in run.steps:
        for info in LAYERS:
            read = run.snapshot(step).layer(info.name)
            for field, wanted in vars(golden_layer(info, step)).items():
                assert np.array_equal(getattr(read, field), wanted, equal_nan=field[-1] == "e")


def test_golden_values(tmp_path: Path) -> None:
    layer = open_run(GOLDEN).snapshot(200).layer("blocks.0.mlp.fc1")
    assert layer.col_indices.tolist() == [[2, 3, -1], [4, 0, -1], [1, 2, -1], [3, 4, -1]]
    assert layer.block_age_steps.tolist()[1] == [203, 204, 205]
    assert layer.block_score.tolist()[1] == [25.875, 26.25, 26.625]
    assert layer.swapped.tolist()[0] == [True, False, False]
    assert layer.previous_columns.tolist()[0] == [3, 3, -1]


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_writer_still_writes_the_golden_bytes(tmp_path: Path) -> None:
    write_golden_run(tmp_path / "run")
    topology = tmp_path / "run" / "topology"
    assert sorted(path.name for path in topology.iterdir()) == FILES
    for name in FILES:
        header, tensors = parts(topology / name)
        golden_header, golden_tensors = parts(GOLDEN / "topology" / name)
        assert tensors == golden_tensors
        for each in (header, golden_header):
            float(each["__metadata__"].pop("created"))
        assert "crc32" not in golden_header["__metadata__"]
        del header["__metadata__"]["crc32"]
        assert header == golden_header
    ours, golden = (json.loads((p / "run.json").read_text()) for p in (tmp_path / "run", GOLDEN))
    for content in (ours, golden):
        del content["created"]
        for entry in content["attempts"]:
            del entry["created"]
    assert ours == golden
    lines, golden_lines = (
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (tmp_path / "run", GOLDEN)
    )
    for line in [*lines, *golden_lines]:
        assert line.pop("time") > 0
    assert lines == golden_lines
