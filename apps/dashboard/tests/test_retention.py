"""Results of retention experiments: the reader, and the numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockell_dashboard import retention_stats as numbers
from blockell_dashboard import retention_tables as tables
from blockell_dashboard.io import find_runs
from blockell_dashboard.retention import (
    MAX_PROBLEMS,
    Cell,
    find_retention,
    read_retention,
    retention_stamp,
)
from blockell_dashboard.tables import to_csv

FILE = Path(__file__).parent / "data" / "retention.jsonl"


def record(**changes: Any) -> dict[str, Any]:
    """Three tasks; the first is half forgotten, the second gets better."""
    return {
        "version": 1,
        "id": "x/ours@sparse=auto/seed0",
        "setting_key": "x",
        "method": "ours",
        "arch": "sparse",
        "dial": None,
        "dial_name": "eps",
        "seed": 0,
        "failed": None,
        "tasks": ["sums", "text", "code"],
        "metrics": ["exact_match", "bits_per_byte", "bits_per_byte"],
        "chance": [0.2, 8.0, 8.0],
        "perfect": [1.0, 0.0, 0.0],
        "steps": [10, 20, 30],
        "matrix": [[0.2, 8.0, 8.0], [1.0, 9.0, 8.0], [0.8, 4.0, 8.0], [0.6, 2.0, 6.0]],
        "nats": [[5.0, 5.0, 5.0], [0.1, 6.0, 5.0], [0.5, 3.0, 5.0], [1.0, 2.0, 4.0]],
        "path": [
            [{"step": 5, "value": [0.4]}, {"step": 20, "value": [0.8]}],
            [{"step": 15, "value": [0.7, 3.0]}],
        ],
        "seconds": [2.0, 3.5],
        "kept_bytes": 1000,
        "overlap": {"used": 0.5, "used_shuffled": 0.4, "chance": 1 / 3},
        **changes,
    }


def cell_of(tmp_path: Path, **changes: Any) -> Cell:
    (tmp_path / "retention.jsonl").write_text(json.dumps(record(**changes)) + "\n")
    (cell,) = read_retention(tmp_path).cells
    return cell


def test_a_recorded_experiment_is_read_whole() -> None:
    results = read_retention(FILE.parent)
    assert results.problems == ()
    assert results.settings == ["pilot-91f8a8a7"]
    groups = numbers.group_cells(results.of("pilot-91f8a8a7"))
    assert [group.label for group in groups] == [
        "ours · sparse",
        "fine-tuning · sparse · lr 0.003",
    ]
    assert [[cell.seed for cell in group.cells] for group in groups] == [[0, 1, 2]] * 2
    # The same figures as in the summary that the experiment wrote for these seeds.
    ours = groups[0].cells[1]
    assert numbers.relative_forgetting(ours) == pytest.approx(0.0372991, abs=1e-5)
    assert numbers.new_nats(ours) == pytest.approx(1.63916, abs=1e-5)
    assert not any(group.void for group in groups)


def test_measures_follow_their_definitions(tmp_path: Path) -> None:
    cell = cell_of(tmp_path)
    assert numbers.relative_forgetting(cell) == pytest.approx(0.5)
    assert numbers.relative_forgetting(cell, 1) == pytest.approx((4.0 - 2.0) / (4.0 - 8.0))
    assert numbers.kept(cell) == pytest.approx(0.5)
    assert numbers.lowest(cell) == 0.4
    assert numbers.new_nats(cell) == pytest.approx((3.0 + 4.0) / 2)
    assert cell.seconds == 5.5
    scores = numbers.score_matrix(cell)
    np.testing.assert_allclose(scores[:, 0], [0.0, 1.0, 0.75, 0.5])
    np.testing.assert_allclose(scores[:, 1], [0.0, -0.125, 0.5, 0.75])
    nan = np.nan
    np.testing.assert_allclose(
        numbers.change_matrix(cell),
        [[nan, nan, nan], [0.0, nan, nan], [-0.25, 0.0, nan], [-0.5, 0.25, 0.0]],
    )


def test_lines_count_steps_over_all_trainings(tmp_path: Path) -> None:
    first, second, third = numbers.task_lines(cell_of(tmp_path))
    assert first.steps.tolist() == [0, 10, 15, 30, 45, 60]
    assert first.values.tolist() == [0.2, 1.0, 0.4, 0.8, 0.7, 0.6]
    assert second.steps.tolist() == [0, 10, 30, 45, 60]
    assert second.values.tolist() == [8.0, 9.0, 4.0, 3.0, 2.0]
    assert third.steps.tolist() == [0, 10, 30, 60]
    np.testing.assert_allclose(third.scores, [0, 0, 0, 0.25])


def test_a_method_with_a_learning_rate_of_its_own_is_a_group_of_its_own(tmp_path: Path) -> None:
    assert cell_of(tmp_path, rate=2e-3).method == "ours:0.002"
    assert cell_of(tmp_path, rate=None).method == "ours"


def test_a_first_task_that_only_falls_has_its_lowest_at_the_highest_loss(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, chance=[0.0, 8.0, 8.0], perfect=[-1.0, 0.0, 0.0])
    assert numbers.lowest(cell) == 0.8


def test_nothing_learned_is_nothing_kept(tmp_path: Path) -> None:
    matrix = record()["matrix"]
    matrix[1][0] = 0.2
    cell = cell_of(tmp_path, matrix=matrix)
    assert np.isnan(numbers.relative_forgetting(cell))
    assert numbers.kept(cell) == 0.0
    (group,) = numbers.group_cells([cell])
    assert group.void == (0,)
    assert tables.method_table([group])["relative forgetting"] == ["unknown"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, r"version \(=2\) must be 1"),
        ({"failed": "loss is nan at step 7"}, "training broke down: loss is nan at step 7"),
        ({"tasks": ["sums"]}, r"tasks \(=\['sums'\]\) must be two or more"),
        ({"tasks": "sums"}, "must be a list of text"),
        ({"method": None}, r"method \(=None\) must be text"),
        ({"matrix": [[1.0], [2.0, 3.0]]}, "matrix must be 4 x 3 finite numbers"),
        ({"matrix": [[float("nan")] * 3] * 4}, "matrix must be 4 x 3 finite numbers"),
        ({"nats": None}, "nats must be 4 x 3 finite numbers, is null"),
        ({"chance": [1.0, 8.0, 8.0]}, "chance and perfect must differ"),
        ({"seed": "zero"}, "seed must be a finite number"),
        ({"kept_bytes": True}, "kept_bytes must be a finite number, is true"),
        ({"path": []}, "path must be a list of 2"),
        ({"path": [[3], []]}, "path must hold lists of measurements"),
        ({"path": [[{"step": 1, "value": []}], []]}, "value must be 1 finite numbers"),
        ({"overlap": 3}, r"overlap \(=3\) must be an object"),
        ({"dial": "big"}, "dial must be a finite number"),
    ],
)
def test_a_bad_record_is_listed_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    good = record(id="good")
    lines = [json.dumps(good), json.dumps(record(**change)), json.dumps(record(id="good too"))]
    (tmp_path / "retention.jsonl").write_text("\n".join(lines) + "\n")
    results = read_retention(tmp_path)
    assert [cell.id for cell in results.cells] == ["good", "good too"]
    (problem,) = results.problems
    assert re.match(f"line 2: .*{reason}", problem.reason), problem.reason


def test_damaged_and_unfinished_lines(tmp_path: Path) -> None:
    file = tmp_path / "retention.jsonl"
    good = json.dumps(record()).encode()
    file.write_bytes(
        b"\xff\xfe\x00\n[1, 2]\n\n" + good + b"\n" + b"[" * 100_000 + b"\n" + good[:99]
    )
    results = read_retention(tmp_path)
    assert len(results.cells) == 1
    assert [problem.reason for problem in results.problems] == [
        "line 1: damaged: not JSON",
        "line 2: not a record: no JSON object",
        "line 5: damaged: not JSON",
        "line 6: unfinished: still being written, or cut off",
    ]
    before = retention_stamp(tmp_path)
    file.write_bytes(good + b"\n" + json.dumps(record(kept_bytes=7)).encode() + b"\n")
    assert retention_stamp(tmp_path) != before
    results = read_retention(tmp_path)
    assert [cell.kept_bytes for cell in results.cells] == [7]  # of one id the last counts
    assert results.problems == ()


def test_much_rubbish_is_counted_not_listed(tmp_path: Path) -> None:
    (tmp_path / "retention.jsonl").write_text("rubbish\n" * (MAX_PROBLEMS + 50))
    results = read_retention(tmp_path)
    assert len(results.problems) == MAX_PROBLEMS + 1
    assert results.problems[-1].reason == "50 more lines cannot be read"


def test_directories_with_results_are_found_beside_runs(tmp_path: Path, good_run: Path) -> None:
    for name in ("a/b/one", ".hidden", "1/2/3/4/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "retention.jsonl").write_text("")
    (tmp_path / "runs").symlink_to(good_run.parent)
    assert find_retention([tmp_path, tmp_path / "none"]) == [(tmp_path / "a/b/one").resolve()]
    choices, problems = find_runs([tmp_path])
    assert {choice.label for choice in choices} == {"one", "good"}
    assert problems == []
    choices, problems = find_runs([tmp_path / "a"])
    assert [choice.label for choice in choices] == ["one"]
    assert problems == []
    assert read_retention(tmp_path).cells == ()


@pytest.mark.parametrize(
    ("make", "columns", "rows"),
    [
        (tables.statistics_table, "method,arch,dial,seeds,relative_forgetting_mean", 2),
        (tables.cell_table, "method,arch,dial,seed,new_task_nats,old_task_kept", 6),
        (tables.lines_table, "method,arch,dial,seed,task,metric,step,value,score", 6 * (10 + 3)),
        (lambda groups: tables.matrix_table(groups[0]), "method,arch,dial,seed,after,task", 18),
    ],
)
def test_every_chart_has_its_data(
    make: Callable[..., tables.Table], columns: str, rows: int
) -> None:
    groups = numbers.group_cells(read_retention(FILE.parent).cells)
    lines = to_csv(make(groups)).decode().splitlines()
    assert lines[0].startswith(columns)
    assert len(lines) == 1 + rows
    assert len({line.count(",") for line in lines}) == 1


def test_the_table_of_methods_states_mean_spread_and_range() -> None:
    groups = numbers.group_cells(read_retention(FILE.parent).cells)
    table = tables.method_table(groups)
    assert table["seeds"] == [3, 3]
    assert table["relative forgetting"][0] == "1.6% ± 1.9% [0.0% to 3.7%]"
    assert table["relative forgetting"][1] == "101.0%"
    assert table["new task's loss, nats"][0] == "1.645 ± 0.006 [1.639 to 1.651]"
    assert table["kept, MB"][0].startswith("21.15")


def test_a_task_below_chance_was_not_learned(tmp_path: Path) -> None:
    """The share that is lost of nothing would be any number: -396% was shown."""
    matrix = record()["matrix"]
    matrix[1][0] = 0.19
    cell = cell_of(tmp_path, matrix=matrix)
    assert np.isnan(numbers.relative_forgetting(cell))
    assert np.isnan(numbers.mean_forgetting(cell))
    assert numbers.kept(cell) == 0.0


def test_forgetting_of_all_old_tasks(tmp_path: Path) -> None:
    cell = cell_of(tmp_path)
    each = [numbers.relative_forgetting(cell, task) for task in range(2)]
    assert numbers.mean_forgetting(cell) == pytest.approx(sum(each) / 2)
    table = tables.method_table(numbers.group_cells([cell]))
    assert table["of all old tasks"] == [f"{sum(each) / 2:.1%}"]


def test_figures_of_the_methods_own_and_old_data_are_told(tmp_path: Path) -> None:
    own = {"drift": 0.25, "budget": float("nan"), "note": "x", "done": True, "eps": 1, "n": 10**400}
    cell = cell_of(tmp_path, method_metrics=own, uses_old_data=True)
    assert cell.own == {"drift": 0.25, "eps": 1.0}
    (group,) = numbers.group_cells([cell])
    table = tables.own_table(group)
    assert table["figure"] == ["drift", "eps"]
    assert table["mean"] == [0.25, 1.0]
    assert tables.method_table([group])["old data"] == ["yes"]

    plain = cell_of(tmp_path, method_metrics=[3])
    assert plain.own == {}
    assert "old data" not in tables.method_table(numbers.group_cells([plain]))
    both = tables.method_table(numbers.group_cells([plain, dataclasses.replace(cell, method="m")]))
    assert both["old data"] == ["no", "yes"]
