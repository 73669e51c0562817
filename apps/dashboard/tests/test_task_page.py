"""The page of a run of several tasks, and the page that compares runs, without a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from blockell_dashboard._server import APP_SCRIPT
from blockell_format.snapshots import SnapshotWriter


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Start the app on a directory, with a page address."""

    def start(directory: Path, **address: str | list[str]) -> AppTest:
        monkeypatch.setattr("sys.argv", [str(APP_SCRIPT), "--dir", str(directory)])
        app = AppTest.from_file(str(APP_SCRIPT), default_timeout=60)
        for key, value in address.items():
            app.query_params[key] = value
        return app.run()

    return start


def titles(app: AppTest) -> list[str]:
    specs = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    return [spec["layout"]["title"]["text"].split("</b>")[0][3:] for spec in specs]


def test_grown_blocks_are_seen(open_app: Callable[..., AppTest], task_run: Path) -> None:
    app = open_app(task_run, colour="change", step="75")
    assert not app.exception
    # Blocks that were grown between two snapshots are born, though no decision swapped them in.
    assert titles(app)[0] == "Born, died and kept since step 50, at step 75"
    assert "Density" in titles(app)
    assert app.dataframe[0].value["born_in_2_text"].tolist() == [2, 2]
    app.button(key="previous").click().run()
    assert titles(app)[0] == "Born, died and kept at step 50"
    app.session_state["colour"] = "task"
    app.run()
    assert titles(app)[0] == "Task of birth at step 50"


def test_changes_since_a_step_and_their_link(
    open_app: Callable[..., AppTest], task_run: Path
) -> None:
    app = open_app(task_run, colour="since", since="26")
    assert titles(app)[0] == "Born, died and kept since step 25, at step 100"
    app.selectbox(key="since").set_value(0).run()
    assert titles(app)[0] == "Born, died and kept since step 0, at step 100"
    assert app.query_params["since"] == "0"
    app.select_slider(key="step").set_value(0).run()
    assert titles(app)[0] == "Born, died and kept since step 0, at step 0"
    assert not app.exception


def test_ranks_that_disagree_are_named(open_app: Callable[..., AppTest], task_run: Path) -> None:
    app = open_app(task_run)
    (message,) = (error.value.replace("\\", "") for error in app.error)
    assert "at step 75, 1 layer differs; in blocks.1.fc, rank 0 and rank 1 disagree" in message
    assert "2 snapshots with a difference" in message


def test_runs_side_by_side(
    open_app: Callable[..., AppTest], task_run: Path, good_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(task_run, tmp_path / "a")
    shutil.copytree(good_run, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    app = open_app(tmp_path, page="compare", runs=["b", "a", "c", "gone"])
    assert not app.exception
    assert titles(app) == ["loss", "Swap rate, all layers"]
    runs, settings, problems = (frame.value for frame in app.dataframe)
    assert runs["run"].tolist() == ["b", "a"]
    assert settings["setting"].tolist() == ["made_up", "seed", "tasks", "steps", "model.d"]
    assert problems["file"].tolist() == ["c"]
    app.multiselect(key="runs").set_value([]).run()
    assert "Choose one or more runs" in app.info[0].value
    assert not app.exception


def test_a_dense_run_says_why_there_is_no_topology(
    open_app: Callable[..., AppTest], tmp_path: Path
) -> None:
    with SnapshotWriter(tmp_path / "dense", layers=()) as writer:
        writer.log({"loss": 1.0}, 1)
    app = open_app(tmp_path / "dense")
    assert "no block-sparse layer" in app.info[0].value
    assert app.metric[0].value == "1"  # the newest step, of the metrics
    assert titles(app) == ["Training metric: loss"]
