"""Finding and reading runs: everything good is shown, everything bad is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard import io
from blockell_dashboard.example import EXAMPLE_LAYERS, write_example_run
from blockell_format import column_entropy
from blockell_format.snapshots import LayerInfo, RunError, Snapshot, SnapshotWriter, open_run

NAME = EXAMPLE_LAYERS[0].name


def test_runs_are_found_in_a_parent_directory(tmp_path: Path, good_run: Path) -> None:
    for name in ("one/run", "two/run", "three"):
        shutil.copytree(good_run, tmp_path / name)
    choices, problems = io.find_runs([tmp_path, tmp_path / "three"])
    assert sorted(choice.label for choice in choices) == ["one/run", "three", "two/run"]
    assert problems == []


def test_missing_and_empty_directories_are_problems(tmp_path: Path) -> None:
    choices, problems = io.find_runs([tmp_path, tmp_path / "missing"])
    assert choices == []
    assert [problem.reason for problem in problems][1] == "does not exist"
    assert "holds no run" in problems[0].reason


def test_series_agree_with_reading_every_snapshot(good_run: Path) -> None:
    loaded, run = io.LoadedRun(good_run), open_run(good_run)
    series, history = loaded.series(NAME), loaded.history()
    assert series.steps.tolist() == run.steps == history.steps.tolist()
    assert not series.sampled
    info = run.layers[NAME]
    for i, step in enumerate(run.steps):
        layer = run.snapshot(step).layer(NAME)
        assert series.entropy[i] == column_entropy(layer.col_indices, info.C)
        assert series.max_age[i] == layer.block_age_steps.max()
        assert series.median_age[i] == np.median(layer.block_age_steps)
        assert series.dead_columns[i] == info.C - len(np.unique(layer.col_indices))
        assert history.swaps[i, history.names.index(NAME)] == layer.swapped.sum()
    assert history.blocks[:, 0].tolist() == [info.R * info.K] * len(run.steps)
    low, high = series.score_range
    assert 0 < low < high


def test_the_start_is_not_a_decision(good_run: Path) -> None:
    history = io.LoadedRun(good_run).history()
    assert np.isnan(history.rates(NAME)[0])
    assert np.isfinite(history.pooled_rates()[1:]).all()


def test_swap_rates_count_live_blocks_only(tmp_path: Path) -> None:
    layer = LayerInfo("fc", R=10, C=10, K=8, B=4)
    path = write_example_run(tmp_path / "spare", layers=(layer,), decisions=3, live={"fc": 5})
    history = io.LoadedRun(path).history()
    assert history.blocks.tolist() == [[50], [50], [50]]
    assert history.rates("fc")[1] == history.swaps[1, 0] / 50


def test_nothing_is_read_twice(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = io.LoadedRun(run_copy)
    reads: list[tuple[int, str]] = []
    original = Snapshot.layer

    def counted(self: Snapshot, name: str, *fields: object) -> object:
        reads.append((self.step, name))
        return original(self, name, *fields)

    monkeypatch.setattr(Snapshot, "layer", counted)
    loaded.series(NAME)
    assert len(reads) == 12
    assert {name for _, name in reads} == {NAME}
    loaded.series(NAME)
    assert loaded.refresh() == 0
    loaded.series(NAME)
    assert len(reads) == 12
    loaded.snapshot(NAME, 25)
    loaded.snapshot(NAME, 25)
    assert len(reads) == 13

    layers = {name: original(loaded.run.snapshot(275), name) for name in loaded.run.layers}
    with SnapshotWriter(
        run_copy, layers=tuple(loaded.run.layers.values()), mode="resume"
    ) as writer:
        writer.write(
            300,
            layers,
            checksums={name: [name] for name in layers},
            swap_counts=dict.fromkeys(layers, 0),
        )
        writer.log({"loss": 0.5}, 300)
    del reads[:]
    assert loaded.refresh() == 1
    assert loaded.series(NAME).steps[-1] == 300
    assert reads == [(300, NAME)]
    steps, losses = loaded.metrics().get("loss")
    assert (steps[-1], losses[-1]) == (300, 0.5)


def test_a_resumed_run_forgets_what_it_superseded(run_copy: Path) -> None:
    loaded = io.LoadedRun(run_copy)
    assert loaded.metrics().get("loss")[0][-1] == 295
    with SnapshotWriter(
        run_copy, layers=tuple(loaded.run.layers.values()), mode="resume", resume_step=100
    ) as writer:
        writer.log({"loss": 9.0}, 101)
    loaded.refresh()
    assert loaded.series(NAME).steps.tolist() == [0, 25, 50, 75, 100]
    steps, losses = loaded.metrics().get("loss")
    assert (steps[-1], losses[-1]) == (101, 9.0)


def test_bad_files_are_left_out_and_named(damaged_run: Path) -> None:
    loaded = io.LoadedRun(damaged_run)
    assert len(loaded.series(NAME).steps) == 9
    assert len(loaded.history().steps) == 9
    names = [problem.path.name for problem in loaded.run.problems]
    assert len(names) == 5
    assert {"notes.txt", "metrics.jsonl"} < set(names)


def test_a_file_that_rots_after_it_was_listed_does_not_stop_the_rest(run_copy: Path) -> None:
    loaded = io.LoadedRun(run_copy)
    path = loaded.run.snapshot(100).path
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)
    path.write_bytes(content)
    assert 100 not in loaded.series(NAME).steps
    assert len(loaded.series(NAME).steps) == 11
    with pytest.raises(ValueError, match="dropped"):
        loaded.snapshot(NAME, 100)
    assert any(problem.path == path for problem in loaded.run.problems)


def test_one_flipped_bit_of_a_score_is_not_drawn(run_copy: Path) -> None:
    path = run_copy / "topology" / "step-00000100.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    content[8 + length + table[f"{NAME}/block_score"]["data_offsets"][0] + 3] ^= 1 << 6
    path.write_bytes(content)
    loaded = io.LoadedRun(run_copy)
    assert 100 not in loaded.series(NAME).steps
    assert len(loaded.series(NAME).steps) == 11
    [problem] = loaded.run.problems
    assert problem.path == path
    assert f"layer '{NAME}' dropped: block_score has CRC-32" in problem.reason
    other = next(name for name in loaded.run.layers if name != NAME)
    assert 100 in loaded.series(other).steps


def test_long_runs_are_sampled(good_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "MAX_SERIES_STEPS", 5)
    series = io.LoadedRun(good_run).series(NAME)
    assert series.sampled
    assert series.steps.tolist() == [0, 100, 200, 275]


def test_a_run_is_opened_once(good_run: Path) -> None:
    assert io.load_run(good_run) is io.load_run(good_run)


def test_no_run_is_an_error_with_a_reason(garbage_dir: Path) -> None:
    with pytest.raises(RunError, match="is not a run file"):
        io.load_run(garbage_dir)


def test_a_snapshot_that_rotted_does_not_change_the_density(tmp_path: Path) -> None:
    """Its slots were counted instead, spare ones included: half full at first, a sixth later."""
    layers = EXAMPLE_LAYERS[:1]
    path = write_example_run(tmp_path / "run", layers=layers, decisions=4, live={NAME: 4})
    first = sorted((path / "topology").iterdir())[0]
    content = bytearray(first.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)
    first.write_bytes(content)
    loaded = io.LoadedRun(path)
    assert loaded.history().blocks[:, 0].tolist() == [4 * layers[0].R] * 4
    assert len(loaded.run.problems) == 1
