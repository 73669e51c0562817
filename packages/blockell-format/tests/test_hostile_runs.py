"""Directories that are no runs, damaged run files, and finding runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockell_format.snapshots import RunError, discover_runs, open_run


def change(**changes: Any) -> Callable[[Path], object]:
    """Replace entries of run.json; None removes one."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return apply


def first_attempt(**changes: Any) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        content["attempts"][0].update(changes)
        path.write_text(json.dumps(content))

    return apply


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(10 << 30)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


LAYER = {"name": "a", "R": 2, "C": 2, "K": 1, "B": 4, "row_group": 1}
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: p.unlink(), "holds no run.json; a run directory is made by SnapshotWriter"),
    (lambda p: p.write_bytes(b""), "Expecting value"),
    (lambda p: p.write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
    (lambda p: p.write_bytes(p.read_bytes()[:50]), "is not JSON, or cut off (Unterminated string"),
    (lambda p: p.write_bytes(p.read_bytes()[:50]), "readable only with it: put back a copy"),
    (lambda p: p.write_bytes(b"[" * 200_000), "nested too deeply"),
    (lambda p: p.write_text("[]"), 'is not a run file: "format" must be "blockell-run"'),
    (fifo, "is not a regular file"),
    (directory, "is not a regular file"),
    (sparse, "more than 67108864 are not read"),
    (change(format="other"), 'is not a run file: "format" must be "blockell-run"'),
    (change(version=2), "has format version 2; this release reads version 1: update"),
    (change(version=None), "has format version None"),
    (change(run_id=7), '"run_id" is not a string'),
    (change(run_id="\ud800"), "not valid Unicode"),
    (change(created="now"), '"created" is not a finite number'),
    (change(created=10**400), '"created" is not a finite number'),
    (change(layers={}), "the layer table is not a list"),
    (change(layers=[{"name": "a"}]), "entry 0 of the layer table lacks one of"),
    (change(layers=[LAYER, LAYER]), "the layer table names a layer twice"),
    (change(layers=[{**LAYER, "R": -1}]), r"R (=-1) of layer 'a' must be in [1,"),
    (change(layers=[{**LAYER, "name": []}]), "must be a non-empty string"),
    (change(attempts=[]), '"attempts" is not a list with at least one entry'),
    (change(attempts=[3]), "attempt 1 is not an object"),
    (first_attempt(attempt=2), "attempt 1 is numbered 2"),
    (first_attempt(resume_step=-1), '"resume_step" is not an integer'),
    (first_attempt(world_size=10**9), '"world_size" is not an integer in [1, 1048576]'),
    (first_attempt(config=[1]), '"config" of attempt 1 is not an object'),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_unusable_run_file(run_maker: Any, damage: Callable[[Path], object], reason: str) -> None:
    run_maker.make(100, config={"a": 1})
    run = open_run(run_maker.path)
    damage(run_maker.path / "run.json")
    with pytest.raises(RunError) as caught:
        open_run(run_maker.path)
    assert reason in str(caught.value)
    str(caught.value).encode()
    # a run that is open keeps what it has read
    run.refresh()
    assert run.steps == [100]
    assert len(run.metrics()) == 1
    [problem] = run.problems
    assert problem.reason.endswith("the last good content is used")


@pytest.mark.parametrize("depth", [300, 700, 950, 5000])
def test_a_nested_configuration_is_read_or_refused(run_maker: Any, depth: int) -> None:
    """Between what the parser and what the reader can take, RecursionError came out."""
    run_maker.make(100, config={"a": "nested"})
    path = run_maker.path / "run.json"
    nested = '{"a":' * depth + "1" + "}" * depth
    path.write_text(path.read_text().replace('{"a":"nested"}', nested))
    assert nested in path.read_text()
    steps, reason = [100], ""
    try:
        steps = open_run(run_maker.path).steps
    except RunError as error:
        reason = str(error)
    assert steps == [100]
    assert not reason or (depth > 300 and "nested too deeply" in reason)


def test_run_file_that_is_repaired(run_maker: Any) -> None:
    run_maker.make(100)
    path = run_maker.path / "run.json"
    good = path.read_bytes()
    run = open_run(run_maker.path)
    path.write_text("{")
    assert run.refresh()
    assert len(run.problems) == 1
    path.write_bytes(good)
    assert run.refresh()
    assert run.problems == []


def test_no_permission(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_maker.make(100)
    real = os.open

    def guarded(path: Any, *args: Any) -> int:
        if str(path).endswith("run.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(RunError, match=r"run\.json: cannot be read: Permission denied"):
        open_run(run_maker.path)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing does not exist; pass the directory that holds"):
        open_run(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is not a directory"):
        open_run(tmp_path / "file")
    with pytest.raises(RunError, match=r"holds no run\.json"):
        open_run(tmp_path)


def test_another_run_takes_the_place(run_maker: Any) -> None:
    run_maker.make(100, run_id="first")
    run = open_run(run_maker.path)
    for path in sorted(run_maker.path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run_maker.layers = run_maker.layers[:1]
    run_maker.make(100, 200, run_id="second")
    assert run.refresh()
    assert (run.run_id, run.steps, list(run.layers)) == ("second", [100, 200], ["blocks.0.fc1"])
    assert len(run.metrics()) == 2
    assert run.problems == []
    assert run.snapshot(100).layer("blocks.0.fc1").swapped.any()


def test_run_without_layers(run_maker: Any) -> None:
    run_maker.layers = ()
    run_maker.make(100)
    run = open_run(run_maker.path)
    assert (run.layers, run.steps, run.swap_counts()) == ({}, [100], {100: {}})


def test_discover(run_maker: Any, tmp_path: Path) -> None:
    places = ["b", "a", "group/c", "group/deeper/d"]
    for place in places:
        run_maker.path = tmp_path / "runs" / place
        run_maker.make(1)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / ".hidden").mkdir()
    wanted = [tmp_path / "runs" / place for place in sorted(places)]
    assert discover_runs(tmp_path / "runs") == (wanted, [])
    assert discover_runs([str(tmp_path / "runs")]) == (wanted, [])
    assert discover_runs([wanted[1], wanted[0], tmp_path / "runs"])[0] == [
        wanted[1],
        wanted[0],
        *wanted[2:],
    ]


def test_discover_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    paths = [tmp_path / name for name in ("missing", "file", "empty")]
    runs, problems = discover_runs(paths)
    assert runs == []
    assert [problem.path for problem in problems] == paths
    assert [problem.reason for problem in problems] == [
        "does not exist",
        "is not a directory",
        "holds no run: no run.json here or up to 3 levels below",
    ]

    def denied(path: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    [problem] = discover_runs([tmp_path / "empty"])[1]
    assert problem.reason == "cannot be read: Permission denied"


def test_discover_survives_loops(run_maker: Any, tmp_path: Path) -> None:
    run_maker.path = tmp_path / "runs" / "a"
    run_maker.make(1)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    assert discover_runs(tmp_path / "runs") == ([tmp_path / "runs" / "a"], [])
