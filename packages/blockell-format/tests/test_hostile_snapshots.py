"""Files that only look like snapshots: each is listed with its reason, the others are read."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from blockell_format.snapshots import SnapshotError, _snapshot, open_run
from blockell_format.snapshots._header import MAX_HEADER_BYTES

LAYER = "blocks.0.fc1"


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **metadata: str | None) -> None:
    """Change tensors and metadata of a snapshot; the file stays a well-formed one.

    Without sums of its tensors, as a writer may leave them out.
    """
    arrays = load_file(path)
    for name, array in (tensors or {}).items():
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    new = metadata_of(path)
    new.pop("crc32", None)
    new["data_bytes"] = str(sum(array.nbytes for array in arrays.values()))
    for key, value in metadata.items():
        if value is None:
            del new[key]
        else:
            new[key] = value
    save_file(arrays, path, metadata=new)


def header_only(header: bytes, body: bytes = b"") -> Callable[[Path], object]:
    data = struct.pack("<Q", len(header)) + header + body
    return lambda path: path.write_bytes(data)


def cut(count: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:count])


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("step-00000100.safetensors"))


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path) -> None:
    header_only(b'{"__metadata__":' + b"[" * 100_000)(path)


WHOLE: list[tuple[Callable[[Path], object], str]] = [
    (cut(0), "is truncated: 0 bytes"),
    (cut(7), "is truncated: 7 bytes"),
    (cut(100), "is truncated: 100 bytes, the header alone needs"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is truncated or damaged"),
    (lambda p: p.write_bytes(p.read_bytes() + b"more"), "is truncated or damaged"),
    (lambda p: p.write_bytes(b"GIF89a" + bytes(500)), "is not a snapshot: its header would have"),
    (lambda p: p.write_bytes(b"\xff" * 500), "is not a snapshot: its header would have"),
    (header_only(b"no json at all"), "is not a snapshot: its header is not JSON"),
    (header_only(b'{"__metadata__":{"format":'), "is not a snapshot: its header is not JSON"),
    (header_only(b'{"a\xff\xfe": 1}'), "is not a snapshot: its header is not JSON"),
    (header_only(b"[1, 2]"), "its header has no metadata of strings"),
    (header_only(b"{}"), "its header has no metadata of strings"),
    (header_only(b'{"__metadata__":{"format":1}}'), "its header has no metadata of strings"),
    (header_only(b'{"__metadata__":[]}'), "its header has no metadata of strings"),
    (header_only(b'{"__metadata__":{"a":"b"}}'), 'its "format" is not "blockell-snapshot"'),
    (deep, "is not a snapshot: its header is not JSON"),
    (lambda p: save_file({"a": np.zeros(3)}, p), "its header has no metadata of strings"),
    (lambda p: rewrite(p, format="other"), 'its "format" is not "blockell-snapshot"'),
    (lambda p: rewrite(p, version="2"), "has format version '2'; this release reads version 1"),
    (lambda p: rewrite(p, version=None), "has format version None"),
    (lambda p: rewrite(p, run_id="x"), "belongs to another run"),
    (lambda p: rewrite(p, data_bytes=None), 'has no valid "data_bytes"'),
    (lambda p: rewrite(p, data_bytes="9" * 5000), 'has no valid "data_bytes"'),
    (lambda p: rewrite(p, step="-3"), 'has no valid "step"'),
    (lambda p: rewrite(p, step="1e3"), 'has no valid "step"'),
    (lambda p: rewrite(p, step="\u0663"), 'has no valid "step"'),
    (lambda p: rewrite(p, step="300"), "was renamed: its metadata names another step"),
    (lambda p: rewrite(p, attempt="2"), "was renamed: its metadata names another step or attempt"),
    (lambda p: rewrite(p, attempt="0"), 'has no valid "attempt"'),
    (lambda p: rewrite(p, world_size="0"), 'has no valid "world_size"'),
    (lambda p: rewrite(p, world_size=str(10**12)), 'has no valid "world_size"'),
    (lambda p: rewrite(p, created="yesterday"), 'has no valid "created"'),
    (lambda p: rewrite(p, layers="[]"), "has another layer table than run.json"),
    (lambda p: rewrite(p, layers='[["a",1,1,1,1,1]]'), "has another layer table"),
    (lambda p: rewrite(p, layers='[["a",1]]'), "entry 0 of the layer table lacks one of"),
    (lambda p: rewrite(p, layers="[" * 100_000), "nested too deeply"),
    (lambda p: rewrite(p, layers="{}"), "the layer table is not a list"),
    (lambda p: rewrite(p, swap_counts="[1]"), 'has no valid "swap_counts" for every layer'),
    (lambda p: rewrite(p, swap_counts="[1,-1]"), "that are not counts"),
    (lambda p: rewrite(p, swap_counts="[1,true]"), "that are not counts"),
    (lambda p: rewrite(p, swap_counts="[1,NaN]"), "that are not counts"),
    (lambda p: rewrite(p, swap_counts="[[],{}]"), "that are not counts"),
    (lambda p: rewrite(p, checksums=None), 'has no valid "checksums" for every layer'),
    (lambda p: rewrite(p, checksums='[["a","b"],"c"]'), "that are not one string per rank"),
    (lambda p: rewrite(p, checksums="[[1],[2]]"), "that are not one string per rank"),
    (lambda p: rewrite(p, checksums="[null,[]]"), "that are not one string per rank"),
    (lambda p: rewrite(p, checksums='["\\ud800","a"]'), 'has no valid "checksums"'),
    (directory_instead, "is not a regular file; ignored"),
    (link_instead, "is not a regular file; ignored"),
    (pipe_instead, "is not a regular file; ignored"),
]


@pytest.mark.parametrize(("damage", "reason"), WHOLE)
def test_unusable_file(run_maker: Any, damage: Callable[[Path], object], reason: str) -> None:
    _, path, _ = run_maker.make(100, 200, 300)
    damage(path)
    run = open_run(run_maker.path)
    assert run.steps == [100, 300]
    [problem] = run.problems
    assert problem.path == path
    assert reason in problem.reason
    str(problem).encode()
    assert [step for step, _ in run.read_layer(LAYER)] == [100, 300]


def test_huge_header_is_not_read(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    with open(path, "wb") as file:  # sparse: gigabytes without using the disk
        file.write(struct.pack("<Q", 50 << 30))
        file.truncate(60 << 30)
    run = open_run(run_maker.path)
    assert run.steps == []
    assert f"at most {MAX_HEADER_BYTES} are read" in run.problems[0].reason


def test_metadata_need_not_come_first(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    content["__metadata__"] = content.pop("__metadata__")
    header = json.dumps(content).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    run = open_run(run_maker.path)
    assert run.problems == []
    assert run.snapshot(100).layer(LAYER).col_indices.shape == (6, 3)


ROWS = (6, 3)
CONTENT: list[tuple[str, Any, str]] = [
    ("col_indices", None, "does not contain tensor|not found|col_indices"),
    ("col_indices", np.full(ROWS, 5, np.int32), r"\[row 0, slot 0\] \(=5\) must be in \[0, 5\)"),
    ("col_indices", np.full(ROWS, -9, np.int32), r"\(=-9\) must be in \[0, 5\)"),
    ("col_indices", np.zeros(ROWS, np.int32), "holds column 0 twice"),
    ("col_indices", np.zeros(ROWS, np.int64), "col_indices has dtype I64"),
    ("col_indices", np.zeros((3, 6), np.int32), r"has shape \[3, 6\] instead of \[6, 3\]"),
    ("col_indices", np.zeros((0, 3), np.int32), r"has shape \[0, 3\]"),
    ("col_indices", np.zeros(18, np.int32), r"has shape \[18\]"),
    ("block_score", np.zeros(ROWS, np.float16), "block_score has dtype F16"),
    ("block_age_steps", np.full(ROWS, -1, np.int32), "ages must not be negative"),
    ("block_age_steps", np.zeros(ROWS, np.float32), "block_age_steps has dtype F32"),
    ("swapped", np.zeros(ROWS, np.uint8), "swapped has dtype U8"),
    ("previous_columns", np.full(ROWS, 77, np.int32), r"previous_columns\[row 0, slot 0\] \(=77\)"),
]


@pytest.mark.parametrize(("field", "array", "reason"), CONTENT)
def test_one_bad_layer(run_maker: Any, field: str, array: Any, reason: str) -> None:
    _, path = run_maker.make(100, 200)
    rewrite(path, {f"{LAYER}/{field}": array})
    run = open_run(run_maker.path)
    assert run.steps == [100, 200]
    with pytest.raises(SnapshotError, match=reason):
        run.snapshot(200).layer(LAYER)
    assert [step for step, _ in run.read_layer(LAYER)] == [100]
    [problem] = run.problems
    assert problem.path == path
    assert problem.reason.startswith(f"layer '{LAYER}' dropped: ")
    # the other layer, and the other fields, are as good as ever
    assert [step for step, _ in run.read_layer("blocks.0.fc2")] == [100, 200]
    good = [name for name in ("col_indices", "block_score", "swapped") if name != field]
    assert len(list(run.read_layer(LAYER, fields=good))) == 2
    assert open_run(run_maker.path).verify() == run.problems


def test_scores_that_are_not_finite_are_kept(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    scores = np.ones(ROWS, np.float32)
    scores[0] = [np.nan, np.inf, -np.inf]
    rewrite(path, {f"{LAYER}/block_score": scores})
    run = open_run(run_maker.path)
    for _ in range(2):
        read = run.snapshot(100).layer(LAYER).block_score
        assert np.array_equal(read, scores, equal_nan=True)
    [problem] = run.problems
    assert problem.reason == f"layer '{LAYER}': block_score holds 3 non-finite values; kept"


def test_booleans_other_than_0_and_1(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    rewrite(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[f"{LAYER}/swapped"]["data_offsets"]
    start, end = start + 8 + length, end + 8 + length
    path.write_bytes(data[:start] + b"\x02" * (end - start) + data[end:])
    swapped = open_run(run_maker.path).snapshot(100).layer(LAYER).swapped
    assert swapped.all()
    assert swapped.sum() == swapped.size


def test_bad_tensor_table(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    path.write_bytes(path.read_bytes().replace(b'"data_offsets"', b'"data_onsets!"'))
    run = open_run(run_maker.path)
    with pytest.raises(SnapshotError, match="dropped"):
        run.snapshot(100).layer(LAYER)
    assert len(run.verify()) == 2


def test_file_that_vanishes(run_maker: Any) -> None:
    path, _ = run_maker.make(100, 200)
    run = open_run(run_maker.path)
    path.unlink()
    assert [step for step, _ in run.read_layer(LAYER)] == [200]
    assert "dropped: " in run.problems[0].reason
    assert run.refresh()
    assert run.steps == [200]


def test_foreign_names(run_maker: Any) -> None:
    run_maker.make(100)
    directory = os.fsencode(run_maker.path / "topology")
    foreign = [
        *(b"notes.txt", b"step-1.safetensors", b"step-000000100.safetensors"),
        *(b"step-00000100.a1.safetensors", b"step-00000100.a02.safetensors"),
        *(b"step-00000100.safetensors.bak", b"\xff\xfe.safetensors", b"step-\xff.safetensors"),
        b"step-" + "\u0660".encode() * 8 + b".safetensors",
    ]
    for name in foreign:
        with open(os.path.join(directory, name), "wb") as file:
            file.write(b"x")
    run = open_run(run_maker.path)
    assert run.steps == [100]
    assert len(run.problems) == len(foreign)
    assert {problem.reason for problem in run.problems} == {"is not named like a snapshot; ignored"}
    for problem in run.problems:
        str(problem).encode()


def test_run_directory_with_a_name_that_is_not_text(run_maker: Any, tmp_path: Path) -> None:
    run_maker.path = tmp_path / os.fsdecode(b"run-\xff\xfe")
    run_maker.make(100)
    run = open_run(run_maker.path)
    assert (run.steps, run.problems) == ([100], [])
    assert run.snapshot(100).layer(LAYER).col_indices.shape == ROWS
    repr(run).encode()
    repr(run.snapshot(100)).encode()
    with pytest.raises(ValueError, match="step") as caught:
        run.snapshot(1)
    str(caught.value).encode()


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, part: str) -> None:
    """Let an os function raise PermissionError for paths that contain `part`."""
    real = getattr(os, function)

    def guarded(path: Any, *args: Any, **options: Any) -> Any:
        if part in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, function, guarded)


def test_no_permission(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_maker.make(100, 200)
    with monkeypatch.context() as patch:
        refuse(patch, "open", "step-00000200")
        run = open_run(run_maker.path)
        assert run.steps == [100]
        assert run.problems[0].reason == "cannot be read: Permission denied"
    with monkeypatch.context() as patch:
        refuse(patch, "scandir", "topology")
        run.refresh()
        assert run.steps == [100]  # what was read before stays
        assert "cannot be read: Permission denied" in {p.reason for p in run.problems}
        assert open_run(run_maker.path).steps == []


def test_topology_is_a_file(run_maker: Any) -> None:
    run_maker.make()
    (run_maker.path / "topology").rmdir()
    assert open_run(run_maker.path).problems == []
    (run_maker.path / "topology").write_text("x")
    run = open_run(run_maker.path)
    assert run.steps == []
    assert "cannot be read: Not a directory" in run.problems[0].reason


@given(data=st.data())
def test_any_damage_is_survived(data: st.DataObject, run_maker: Any) -> None:
    """Flip, cut and insert bytes anywhere: never an exception, and the other file is read."""
    if not run_maker.path.exists():
        paths = run_maker.make(100, 200)
        run_maker.options["original"] = paths[1].read_bytes()
    path = run_maker.path / "topology" / "step-00000200.safetensors"
    content = bytearray(run_maker.options["original"])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
        if kind == "flip":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place + 1 :]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=20))
        else:
            del content[place]
        content = content or bytearray(b"x")
    path.write_bytes(content)
    run = open_run(run_maker.path)
    assert 100 in run.steps
    run.verify()
    steps = [step for step, _ in run.read_layer(LAYER)]
    assert steps in ([100], [100, 200])
    for problem in run.problems:
        str(problem).encode()


def test_asking_for_what_does_not_exist(run_maker: Any) -> None:
    run_maker.make(100)
    run = open_run(run_maker.path)
    with pytest.raises(ValueError, match=r"name \(='fc9'\) is not a layer .*: blocks.0.fc1, bl"):
        run.snapshot(100).layer("fc9")
    with pytest.raises(ValueError, match=r"name \(='fc9'\) is not a layer"):
        run.read_layer("fc9")
    with pytest.raises(ValueError, match=r"fields \(=\['weights'\]\) must be .* col_indices, bl"):
        run.read_layer(LAYER, fields=["weights"])
    with pytest.raises(ValueError, match=r"fields \(='swapped'\) must be a collection"):
        run.read_layer(LAYER, fields="swapped")
    assert run.problems == []


def test_partial_reads(run_maker: Any) -> None:
    run_maker.make(100, 200, 300)
    run = open_run(run_maker.path)
    read = list(run.read_layer(LAYER, steps=[300, 100, 150], fields=["swapped"]))
    assert [step for step, _ in read] == [300, 100]
    layer = read[0][1]
    assert layer.swapped.shape == ROWS
    with pytest.raises(AttributeError, match="block_score was not read; name it in `fields`"):
        _ = layer.block_score
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = layer.weights  # type: ignore[attr-defined]
    assert repr(layer) == "LayerSnapshot(swapped: bool[6, 3])"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # caches do this
        assert np.array_equal(twin.swapped, layer.swapped)
        assert not hasattr(twin, "block_score")


def test_one_layer_is_read_without_the_others(
    run_maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_maker.make(100)
    run = open_run(run_maker.path)
    loaded: list[str] = []

    class Watched:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = safe_open(*args, **options)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def metadata(self) -> Any:
            return self.file.metadata()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            loaded.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(_snapshot, "safe_open", Watched)
    run.snapshot(100).layer(LAYER, fields=["col_indices", "swapped"])
    assert loaded == [f"{LAYER}/col_indices", f"{LAYER}/swapped"]
