"""Restarted runs: what goes back behind a step supersedes what lay after it."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from blockell_format.snapshots import LayerInfo, RunError, open_run


def names(run_maker: Any) -> list[str]:
    return sorted(os.listdir(run_maker.path / "topology"))


def test_resume_supersedes_later_steps(run_maker: Any) -> None:
    run_maker.make(100, 200, 300, config={"lr": 1})
    before = {path: path.read_bytes() for path in (run_maker.path / "topology").iterdir()}
    with run_maker.writer(mode="resume", resume_step=150, config={"lr": 2}) as writer:
        assert writer.attempt == 2
        writer.log({"loss": -1.0}, 200)
        run_maker.write(writer, 200)
    run = open_run(run_maker.path)
    assert run.steps == [100, 200]
    assert (run.snapshot(100).attempt, run.snapshot(200).attempt) == (1, 2)
    assert run.metrics() == [{"step": 100, "loss": 1 / 101}, {"step": 200, "loss": -1.0}]
    assert run.problems == []
    assert [(entry.attempt, entry.resume_step) for entry in run.attempts] == [(1, 0), (2, 150)]
    assert run.config == {"lr": 2}
    # nothing on disk was touched
    assert names(run_maker) == [
        "step-00000100.safetensors",
        "step-00000200.a2.safetensors",
        "step-00000200.safetensors",
        "step-00000300.safetensors",
    ]
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(ValueError, match=r"step \(=300\) has no snapshot .* nearest: 200"):
        run.snapshot(300)


def test_superseded_as_soon_as_the_attempt_starts(run_maker: Any) -> None:
    run_maker.make(100, 200)
    run = open_run(run_maker.path)
    assert run.steps == [100, 200]
    with run_maker.writer(mode="resume", resume_step=100):
        assert run.refresh()
        assert run.steps == [100]
        assert [line["step"] for line in run.metrics()] == [100]


def test_the_furthest_way_back_counts(run_maker: Any) -> None:
    run_maker.make(100, 200, 300, 400)
    with run_maker.writer(mode="resume", resume_step=100) as writer:
        for step in (200, 300):
            run_maker.write(writer, step)
    with run_maker.writer(mode="resume", resume_step=250) as writer:
        run_maker.write(writer, 350)
    run = open_run(run_maker.path)
    assert {step: run.snapshot(step).attempt for step in run.steps} == {100: 1, 200: 2, 350: 3}


def test_without_resume_step_nothing_is_superseded(run_maker: Any) -> None:
    run_maker.make(100, 200)
    with run_maker.writer(mode="resume") as writer:
        writer.log({"loss": 0.0}, 250)
    with run_maker.writer(mode="resume") as writer:
        run_maker.write(writer, 300)
    run = open_run(run_maker.path)
    assert [entry.resume_step for entry in run.attempts] == [0, 200, 250]
    assert run.steps == [100, 200, 300]
    assert len(run.metrics()) == 3


def test_the_later_attempt_wins_at_its_own_start(run_maker: Any) -> None:
    run_maker.make(100)
    with run_maker.writer(mode="resume", resume_step=100) as writer:
        run_maker.write(writer, 100)
    run = open_run(run_maker.path)
    assert run.snapshot(100).attempt == 2


def test_changed_world_size(run_maker: Any) -> None:
    run_maker.make(100)
    with run_maker.writer(mode="resume", world_size=3) as writer:
        sums = {info.name: ["a", "a", "a"] for info in run_maker.layers}
        run_maker.write(writer, 200, checksums=sums)
    run = open_run(run_maker.path)
    assert run.world_size == 3
    assert [run.snapshot(step).world_size for step in run.steps] == [1, 3]
    assert run.checksums()[200]["blocks.0.fc1"] == ("a", "a", "a")


def test_a_line_cut_short_does_not_swallow_the_next(run_maker: Any) -> None:
    run_maker.make(100)
    with open(run_maker.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "metr')
    with run_maker.writer(mode="resume") as writer:
        writer.log({"loss": 2.0}, 120)
    run = open_run(run_maker.path)
    assert [line["step"] for line in run.metrics()] == [100, 120]
    assert [problem.reason.partition(":")[0] for problem in run.problems] == ["line 2 dropped"]


def test_temporary_files_of_a_killed_writer_are_removed(run_maker: Any) -> None:
    run_maker.make(100)
    leftover = run_maker.path / "topology" / ".tmp-123-step-00000200.safetensors"
    leftover.write_bytes(b"half")
    assert open_run(run_maker.path).problems == []
    run_maker.writer(mode="resume").close()
    assert not leftover.exists()


def test_nothing_to_resume(run_maker: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run.json to resume; start it with mode='new'"):
        run_maker.writer(mode="resume")
    assert not run_maker.path.exists()


def test_damaged_run_file(run_maker: Any) -> None:
    run_maker.make(100)
    (run_maker.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: "):
        run_maker.writer(mode="resume")


def test_another_model(run_maker: Any) -> None:
    run_maker.make(100)
    before = (run_maker.path / "run.json").read_bytes()
    run_maker.layers = (run_maker.layers[0], LayerInfo("blocks.0.fc2", 4, 6, 5, 4))
    message = r"layers differs from the run in .* \(blocks.0.fc2\); resume with the same model"
    with pytest.raises(ValueError, match=message):
        run_maker.writer(mode="resume")
    run_maker.layers = ()
    with pytest.raises(ValueError, match=r"\(blocks.0.fc1, blocks.0.fc2\)"):
        run_maker.writer(mode="resume")
    assert (run_maker.path / "run.json").read_bytes() == before


def test_another_run_id(run_maker: Any) -> None:
    run_maker.make(100, run_id="mine")
    with pytest.raises(ValueError, match=r"run_id \(='other'\) is not that of .* \('mine'\)"):
        run_maker.writer(mode="resume", run_id="other")
    run_maker.writer(mode="resume", run_id="mine").close()


def test_file_of_an_attempt_that_is_not_listed(run_maker: Any) -> None:
    run_maker.make(100)
    older = (run_maker.path / "run.json").read_bytes()
    with run_maker.writer(mode="resume") as writer:
        run_maker.write(writer, 200)
    (run_maker.path / "run.json").write_bytes(older)
    run = open_run(run_maker.path)
    assert run.steps == [100, 200]
    [problem] = run.problems
    assert problem.reason == "is of an attempt that run.json does not list; kept"


def test_a_line_without_attempt_is_of_the_first(run_maker: Any) -> None:
    run_maker.make(100)
    with open(run_maker.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 300, "metrics": {"loss": 1}}) + "\n")
    assert [line["step"] for line in open_run(run_maker.path).metrics()] == [100, 300]
    run_maker.writer(mode="resume", resume_step=200).close()
    assert [line["step"] for line in open_run(run_maker.path).metrics()] == [100]
