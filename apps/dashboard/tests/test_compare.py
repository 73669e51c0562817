"""Several runs side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard import compare, figures
from blockell_dashboard.io import LoadedRun
from blockell_dashboard.tasks import TaskSpan


@pytest.fixture
def runs(task_run: Path, good_run: Path) -> dict[str, LoadedRun]:
    return {"tasks": LoadedRun(task_run), "good": LoadedRun(good_run)}


def test_a_line_per_run(runs: dict[str, LoadedRun]) -> None:
    table = compare.run_table(runs, "loss")
    assert table["run"] == ["tasks", "good"]
    assert table["newest_step"] == [100, 275]
    assert table["density"] == [0.5, 0.5]
    assert table["decisions"] == [1, 11]
    assert table["mean_swap_rate"][0] == pytest.approx(0.25)  # standstill is no decision
    assert table["last loss"][0] == 1.0
    assert table["lowest loss"][1] == np.nanmin(runs["good"].metrics().get("loss")[1])
    assert np.isnan(compare.run_table(runs, "accuracy")["last accuracy"][1])
    assert "last loss" not in compare.run_table(runs, None)
    assert compare.run_table({}, None) == {}


def test_metrics_that_more_runs_have_come_first(runs: dict[str, LoadedRun]) -> None:
    names = compare.common_metrics(list(runs.values()))
    assert names[0] == "loss"
    assert set(names[1:]) == {"accuracy", "learning_rate", "tokens_per_s"}


def test_a_run_has_one_colour_in_all_charts() -> None:
    steps, names = np.arange(3), ["a", "b", "c"]
    series = {name: (name, steps, steps / 2) for name in names}
    charts = [
        figures.compare_runs([series[name] for name in drawn], title="", y_title="", order=names)
        for drawn in (names, ["c", "b"])
    ]
    first, second = ({t.name: t.line.color for t in fig.data} for fig in charts)
    assert len(set(first.values())) == 3
    assert second == {name: first[name] for name in "cb"}


def test_settings_that_differ() -> None:
    table = compare.config_differences(
        {
            "a": {"seed": 0, "model": {"d": 16, "tied": True}, "tasks": ["x"]},
            "b": {"seed": 1, "model": {"d": 16, "tied": True}, "tasks": ["x"], "note": "n" * 99},
        }
    )
    assert table == {
        "setting": ["seed", "note"],
        "a": ["0", ""],
        "b": ["1", "n" * 59 + "…"],
    }


def test_settings_that_lie_deep_are_compared_as_text() -> None:
    one: dict[str, object] = {"x": 1}
    two: dict[str, object] = {"x": 2}
    for _ in range(400):
        one, two = {"a": one}, {"a": two}
    table = compare.config_differences({"one": one, "two": two, "none": {}})
    assert table["setting"] == ["a.a.a.a.a.a.a.a"]
    assert [len(table[name][0]) for name in ("one", "two", "none")] == [60, 60, 0]
    same = {"one": {"seeds": list(range(99))}, "two": {"seeds": [*range(98), 0]}}
    assert compare.config_differences(same)["setting"] == ["seeds"]  # beyond what is shown


def test_lines_of_runs_can_be_told_apart() -> None:
    steps = np.arange(100)
    series = [(f"run <{i}>", steps, np.sin(steps + i)) for i in range(9)]
    series.append(("short", steps[:3], np.array([1.0, np.nan, np.inf])))
    fig = figures.compare_runs(series, title="loss", y_title="loss")
    drawn = [trace for trace in fig.data if trace.showlegend is not False]
    assert next(trace.name for trace in drawn) == "run &lt;0&gt;"
    looks = {(trace.line.color, trace.marker.symbol, trace.line.dash) for trace in drawn}
    assert len(looks) == len(drawn) == 10
    long = [(name * 9, *line) for name, *line in series]
    assert figures.compare_runs(long, title="loss", y_title="loss").layout.height == 390 + 10 * 30
    spans = (TaskSpan("a", 0, 49), TaskSpan("b", 49, 99))
    step = np.where(steps > 49, 8.0, 1.0)
    mean = figures.compare_runs(
        [("x", steps, step)], title="loss", y_title="loss", spans={"x": spans}
    ).data[-1]
    np.testing.assert_array_equal(mean.y, step)
    assert figures.compare_runs([], title="x", y_title="y").data == ()
    table = compare.series_table(series, "loss")
    assert len(table["run"]) == len(table["step"]) == len(table["loss"]) == 903
    assert len(compare.series_table([], "loss")["step"]) == 0
