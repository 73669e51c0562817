"""What the writer puts on disk, what it refuses, and that it overwrites nothing."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from blockell_format.snapshots import (
    LayerInfo,
    LayerSnapshot,
    SnapshotWriter,
    open_run,
)


def test_round_trip(run_maker: Any) -> None:
    with run_maker.writer(config={"lr": 0.1}, run_id="abc", world_size=2) as writer:
        assert (writer.run_id, writer.attempt, writer.layers) == ("abc", 1, run_maker.layers)
        sums = {"blocks.0.fc1": ["x", "x"], "blocks.0.fc2": ["x", "y"]}
        path = run_maker.write(writer, 1200, checksums=sums)
    assert path == run_maker.path / "topology" / "step-00001200.safetensors"
    run = open_run(run_maker.path)
    assert (run.run_id, run.world_size, run.config, run.steps) == ("abc", 2, {"lr": 0.1}, [1200])
    assert run.layers == {info.name: info for info in run_maker.layers}
    assert run.problems == []
    snapshot = run.snapshot(1200)
    assert (snapshot.step, snapshot.attempt, snapshot.world_size) == (1200, 1, 2)
    assert snapshot.checksums == {"blocks.0.fc1": ("x", "x"), "blocks.0.fc2": ("x", "y")}
    assert snapshot.swap_counts == {"blocks.0.fc1": 1200 % 7, "blocks.0.fc2": 1200 % 7}
    assert run.created <= snapshot.created
    assert run.checksums() == {1200: snapshot.checksums}
    assert run.swap_counts() == {1200: snapshot.swap_counts}
    for name, written in run_maker.content(1200).items():
        read = snapshot.layer(name)
        for field, array in vars(written).items():
            got = getattr(read, field)
            assert np.array_equal(got, array), field
        assert read.block_age_steps.dtype == np.int32
        assert read.swapped.dtype == np.bool_


def test_header_is_made_of_strings(run_maker: Any) -> None:
    [path] = run_maker.make(3)
    with safe_open(str(path), framework="np") as file:
        metadata = file.metadata()
        assert set(metadata) == {
            *("format", "version", "run_id", "step", "attempt", "world_size", "created"),
            *("data_bytes", "layers", "checksums", "swap_counts", "crc32"),
        }
        assert all(isinstance(value, str) for value in metadata.values())
        assert len(file.keys()) == 10
    assert json.loads(metadata["layers"])[0] == ["blocks.0.fc1", 6, 5, 3, 4, 1]


def test_ages_beyond_int32_survive(run_maker: Any) -> None:
    content = run_maker.content()
    content["blocks.0.fc1"].block_age_steps[0, 0] = 2**40
    with run_maker.writer() as writer:
        run_maker.write(writer, 1, layers=content)
    ages = open_run(run_maker.path).snapshot(1).layer("blocks.0.fc1").block_age_steps
    assert ages.dtype == np.int64
    assert ages[0, 0] == 2**40


def test_spare_slots(run_maker: Any, make_layer_snapshot: Callable[..., LayerSnapshot]) -> None:
    content = {info.name: make_layer_snapshot(info, live=2) for info in run_maker.layers}
    with run_maker.writer() as writer:
        run_maker.write(writer, 1, layers=content)
    columns = open_run(run_maker.path).snapshot(1).layer("blocks.0.fc2").col_indices
    assert (columns[:, 2:] == -1).all()
    assert (columns[:, :2] >= 0).all()


def test_non_contiguous_and_big_endian_arrays(run_maker: Any) -> None:
    content = run_maker.content()
    layer = content["blocks.0.fc1"]
    wanted = layer.block_score.copy()
    layer.block_score = np.asfortranarray(layer.block_score).astype(">f4")
    layer.col_indices = np.asfortranarray(layer.col_indices)
    with run_maker.writer() as writer:
        run_maker.write(writer, 1, layers=content)
    read = open_run(run_maker.path).snapshot(1).layer("blocks.0.fc1")
    assert np.array_equal(read.block_score, wanted)
    assert np.array_equal(read.col_indices, layer.col_indices)


def test_metrics_survive_whatever_their_value(run_maker: Any) -> None:
    logged = {
        "loss": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "numpy": np.float32(0.5),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "text": 'line\n"quoted" \u2028 é',
        "none": None,
        "list": [1, math.nan],
        "nested": {"a": 1.5},
        "step": 99,
    }
    with run_maker.writer() as writer:
        writer.log(logged, 12)
    [line] = (run_maker.path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)  # valid JSON: no bare NaN
    assert (record["step"], record["attempt"]) == (12, 1)
    assert record["metrics"]["loss"] == "NaN"
    [metrics] = open_run(run_maker.path).metrics()
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["list"][1])
    assert (metrics["up"], metrics["down"]) == (math.inf, -math.inf)
    assert (metrics["numpy"], metrics["count"], metrics["flag"]) == (0.5, 7, True)
    assert (metrics["text"], metrics["none"]) == (logged["text"], None)
    assert (metrics["step"], metrics["nested"]) == (12, {"a": 1.5})


def test_text_that_is_not_unicode_is_replaced(run_maker: Any) -> None:
    with run_maker.writer(config={"path": "a\udcffb"}) as writer:
        writer.log({"name\udcff": "x\ud800"}, 1)
    run = open_run(run_maker.path)
    assert run.problems == []
    assert run.config == {"path": "a?b"}
    assert run.metrics() == [{"step": 1, "name?": "x?"}]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": object()}, "metrics.loss is a object; it must be a number"),
        ({"loss": np.zeros(3)}, "metrics.loss is a ndarray of several elements; log scalars"),
        ({"a": {"b": {1, 2}}}, "metrics.a.b is a set"),
        ({"a": b"bytes"}, "metrics.a is a bytes"),
    ],
)
def test_metrics_that_json_cannot_hold(run_maker: Any, metrics: Any, message: str) -> None:
    with run_maker.writer() as writer, pytest.raises(TypeError, match=message):
        writer.log(metrics, 1)
    assert open_run(run_maker.path).metrics() == []


def test_full_disk_while_logging(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_maker.writer() as writer:
        writer.log({"a": 1}, 1)
        real, calls = os.write, []

        def fills_up(fd: int, data: bytes) -> int:
            calls.append(fd)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(fd, data[:5])

        monkeypatch.setattr(os, "write", fills_up)
        with pytest.raises(OSError, match="No space left"):
            writer.log({"a": 2}, 2)
        monkeypatch.undo()
        writer.log({"a": 3}, 3)
    run = open_run(run_maker.path)
    assert run.metrics() == [{"step": 1, "a": 1}, {"step": 3, "a": 3}]
    assert [problem.reason[:14] for problem in run.problems] == ["line 2 dropped"]


def test_full_disk_while_writing(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_maker.writer() as writer:
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            run_maker.write(writer, 1)
        monkeypatch.undo()
        assert os.listdir(run_maker.path / "topology") == []
        run_maker.write(writer, 1)
    assert open_run(run_maker.path).steps == [1]


def test_a_full_disk_while_closing_holds_nobody_up(
    run_maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = run_maker.writer()
    fd = writer._metrics_fd
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        writer.close()
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert writer._lock._fd is None


def test_new_refuses_a_run(run_maker: Any) -> None:
    run_maker.make(1)
    before = {p: p.read_bytes() for p in run_maker.path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"already holds a run \(run.json exists\); choose"):
        run_maker.writer()
    assert {p: p.read_bytes() for p in run_maker.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "topology/step-00000001.safetensors"])
def test_new_refuses_the_rest_of_a_run(run_maker: Any, left: str) -> None:
    (run_maker.path / "topology").mkdir(parents=True)
    (run_maker.path / left).write_text("something")
    with pytest.raises(FileExistsError, match="already holds"):
        run_maker.writer()
    assert (run_maker.path / left).read_text() == "something"


@pytest.mark.parametrize("taken", [".", "topology"])
def test_a_file_where_a_directory_should_be(run_maker: Any, taken: str) -> None:
    path = run_maker.path / taken
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something")
    said = re.escape(f"{path} is not a directory; choose another run_dir.")
    with pytest.raises(FileExistsError, match=said):
        run_maker.writer()
    assert path.read_text() == "something"


def test_new_leaves_other_files_alone(run_maker: Any) -> None:
    run_maker.path.mkdir()
    (run_maker.path / "checkpoint.pt").write_text("weights")
    run_maker.make(1)
    assert (run_maker.path / "checkpoint.pt").read_text() == "weights"
    assert open_run(run_maker.path).problems == []


def test_one_snapshot_per_step(run_maker: Any) -> None:
    with run_maker.writer() as writer:
        path = run_maker.write(writer, 5)
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match=r"step \(=5\) was already recorded"):
            run_maker.write(writer, 5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["new", "resume"])
def test_second_process_is_refused(run_maker: Any, mode: str) -> None:
    body = f"""
from blockell_format.snapshots import *
try:
    SnapshotWriter({str(run_maker.path)!r}, layers=[], mode={mode!r})
except FileExistsError as error:
    print(error)
"""
    command = [sys.executable, "-c", body]
    with run_maker.writer():
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    message = "already holds a run" if mode == "new" else f"(pid {os.getpid()}) is writing to"
    assert message in answer


def _sleep(ready: Any, done: Any) -> None:
    ready.set()
    done.wait(30)


def test_a_forked_child_does_not_keep_the_lock(run_maker: Any) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    with run_maker.writer():
        child = context.Process(target=_sleep, args=(ready, done))
        child.start()
        ready.wait(30)
    command = [
        *(sys.executable, "-c"),
        "import sys; from blockell_format.snapshots import *;"
        "run = open_run(sys.argv[1]);"
        "SnapshotWriter(sys.argv[1], layers=list(run.layers.values()), mode='resume')",
        str(run_maker.path),
    ]
    try:
        subprocess.run(command, check=True)
    finally:
        done.set()
        child.join()


def test_without_locks(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockell_format.snapshots import _files

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if _files.fcntl is not None:
        monkeypatch.setattr(_files.fcntl, "lockf", unsupported)
    run_maker.make(1)
    monkeypatch.setattr(_files, "fcntl", None)
    with run_maker.writer(mode="resume") as writer:
        run_maker.write(writer, 2)
    assert open_run(run_maker.path).steps == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, r"world_size \(=0\) must be in \[1,"),
        ({"mode": "append"}, r"mode \(='append'\) must be \"new\" or \"resume\""),
        ({"resume_step": 3}, r"resume_step \(=3\) must be at least 0 and goes with mode='resume'"),
        ({"mode": "resume", "resume_step": -1}, r"resume_step \(=-1\) must be at least 0"),
        ({"layers": [LayerInfo("a", 1, 1, 1, 1)] * 2}, "layers names a layer twice"),
    ],
)
def test_bad_arguments(run_maker: Any, options: dict[str, Any], message: str) -> None:
    options = {"layers": run_maker.layers, **options}
    with pytest.raises(ValueError, match=message):
        SnapshotWriter(run_maker.path, **options)
    assert not run_maker.path.exists()


def test_config_that_json_cannot_hold(run_maker: Any) -> None:
    itself: dict[str, Any] = {}
    itself["itself"] = itself
    with pytest.raises(TypeError, match="config is nested too deeply, or holds itself"):
        run_maker.writer(config=itself)
    with pytest.raises(TypeError, match=r"config.path is a PosixPath|WindowsPath"):
        run_maker.writer(config={"path": Path()})
    assert not run_maker.path.exists()


FIRST = "blocks.0.fc1"
DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"col_indices": np.full((6, 3), 9, np.int32)}, r"'blocks.0.fc1': col_indices\[row 0, slot 0"),
    ({"col_indices": np.zeros((6, 3), np.int32)}, r"row 0\] holds column 0 twice"),
    ({"col_indices": np.zeros((6, 3), np.int64)}, "col_indices has dtype int64; it must be int32"),
    ({"col_indices": np.zeros((5, 3), np.int32)}, r"col_indices has shape \[5, 3\]; .* \[6, 3\]"),
    ({"block_score": np.zeros((6, 3))}, "block_score has dtype float64; it must be float32"),
    ({"block_age_steps": np.full((6, 3), -1)}, "block_age_steps holds -1; ages must not be neg"),
    ({"swapped": np.zeros((6, 3), np.uint8)}, "swapped has dtype uint8; it must be bool"),
    (
        {"previous_columns": np.full((6, 3), 5, np.int32)},
        r"previous_columns\[row 0, slot 0\] \(=5\) must be in \[0, 5\), or -1",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_bad_content(run_maker: Any, damage: dict[str, Any], message: str) -> None:
    content = run_maker.content()
    vars(content[FIRST]).update(damage)
    with run_maker.writer() as writer, pytest.raises(ValueError, match=message):
        run_maker.write(writer, 1, layers=content)
    assert os.listdir(run_maker.path / "topology") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "layers must name every layer .* missing: blocks.0.fc1, blocks.0.fc2"),
        ({"swap_counts": {FIRST: 1}}, "swap_counts must name .* missing: blocks.0.fc2; unknown: n"),
        ({"swap_counts": {FIRST: -1, "blocks.0.fc2": 1}}, r"\(=-1\) must not be negative"),
        ({"checksums": {FIRST: ["a"], "blocks.0.fc2": ["a"], "x": ["a"]}}, "unknown: x"),
        ({"checksums": {FIRST: ["a", "b"], "blocks.0.fc2": ["a"]}}, "one string per rank; world_"),
        ({"checksums": {FIRST: "a", "blocks.0.fc2": ["a"]}}, r"\(='a'\) must be one string per"),
        ({"step": -1}, r"step \(=-1\) must be in \[0,"),
    ],
)
def test_bad_write_arguments(run_maker: Any, changes: dict[str, Any], message: str) -> None:
    step = changes.pop("step", 1)
    with run_maker.writer() as writer, pytest.raises(ValueError, match=message):
        run_maker.write(writer, step, **changes)


def test_closed_writer(run_maker: Any) -> None:
    writer = run_maker.writer()
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed; open another one"):
        writer.log({}, 1)
    with pytest.raises(ValueError, match="is closed; open another one"):
        run_maker.write(writer, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, 1, 1, 1), "must be a non-empty string"),
        (("a\ud800", 1, 1, 1, 1), "is not valid UTF-8 text"),
        (("a", 0, 1, 1, 1), r"R \(=0\) of layer 'a' must be in \[1,"),
        (("a", 1, 2.0, 1, 1), r"C \(=2.0\) of layer 'a' must be an integer"),
        (("a", 1, True, 1, 1), r"C \(=True\) of layer 'a' must be an integer"),
        (("a", 1, 2, 3, 1), r"K \(=3\) of layer 'a' must be at most C \(=2\)"),
        (("a", 6, 2, 1, 1, 4), r"row_group \(=4\) must be a positive divisor of R \(=6\)"),
    ],
)
def test_layer_info(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerInfo(*arguments)
