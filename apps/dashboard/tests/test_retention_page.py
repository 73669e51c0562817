"""The retention page, driven by Streamlit's own test runner, and its part of the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit
from streamlit.testing.v1 import AppTest

from blockell_dashboard._server import APP_SCRIPT
from blockell_dashboard.export import export_report
from blockell_format.snapshots import RunError, SnapshotWriter

FILE = Path(__file__).parent / "data" / "retention.jsonl"
TITLES = [
    "Old task kept against new task's loss",
    "What is left of arithmetic",
    "Every task over the steps",
    "Score matrix",
]


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Start the app on a directory, with a page address."""

    def start(directory: Path, **address: str) -> AppTest:
        monkeypatch.setattr("sys.argv", [str(APP_SCRIPT), "--dir", str(directory)])
        app = AppTest.from_file(str(APP_SCRIPT), default_timeout=60)
        for key, value in address.items():
            app.query_params[key] = value
        return app.run()

    return start


@pytest.fixture
def results_dir(tmp_path: Path) -> Path:
    """Results without a recorded run."""
    path = tmp_path / "results"
    path.mkdir()
    shutil.copy(FILE, path)
    return path


def titles(app: AppTest) -> list[str]:
    specs = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    return [spec["layout"]["title"]["text"].split("</b>")[0][3:] for spec in specs]


def test_results_alone_open_the_page(open_app: Callable[..., AppTest], results_dir: Path) -> None:
    app = open_app(results_dir)
    assert not app.exception
    assert titles(app) == TITLES
    assert app.dataframe[0].value["method"].tolist() == [
        "ours · sparse",
        "fine-tuning · sparse · lr 0.003",
    ]
    assert len(app.get("download_button")) == 5
    assert all(chart.proto.alt for chart in app.get("plotly_chart"))

    app.selectbox(key="method").set_value("fine-tuning · sparse · lr 0.003").run()
    app.session_state["matrix"] = "change"
    app.run()
    assert titles(app)[3] == "Forgetting matrix"
    assert app.query_params["method"] == "fine-tuning · sparse · lr 0.003"
    assert app.query_params["matrix"] == "change"


def test_a_run_with_results_has_both_pages(
    open_app: Callable[..., AppTest], run_copy: Path
) -> None:
    shutil.copy(FILE, run_copy)
    app = open_app(run_copy)
    assert titles(app)[0] == "Block age at step 275"
    link = {"page": "retention", "method": "fine-tuning · sparse · lr 0.003", "matrix": "change"}
    app = open_app(run_copy, **link)
    assert not app.exception
    assert titles(app)[3] == "Forgetting matrix"
    assert app.selectbox(key="method").value == link["method"]
    app.session_state["page"] = "topology"
    app.run()
    assert titles(app)[0] == "Block age at step 275"
    assert app.query_params["page"] == "topology"


def test_bad_lines_are_listed_and_new_ones_appear(
    open_app: Callable[..., AppTest], results_dir: Path
) -> None:
    lines = FILE.read_text().splitlines(keepends=True)
    file = results_dir / FILE.name
    file.write_text('{"version": 1, "id": "cut o')
    app = open_app(results_dir, method="gone", setting="gone", matrix="smell")
    assert not app.exception
    assert "can be shown yet" in app.info[0].value
    file.write_text("rubbish\n" + lines[0] + '{"version": 1, "id": "cut o')
    app.run()
    assert not app.exception
    assert titles(app) == TITLES
    assert app.dataframe[1].value["reason"].tolist() == [
        "line 1: damaged: not JSON",
        "line 3: unfinished: still being written, or cut off",
    ]


def test_several_experiments_can_be_chosen_from(
    open_app: Callable[..., AppTest], results_dir: Path
) -> None:
    other = json.loads(FILE.read_text().splitlines()[0])
    other.update(id="other", setting_key="other", matrix=[[0, 8], [0.5, 9], [0.1, 2]])
    with (results_dir / FILE.name).open("a") as file:
        file.write(json.dumps(other) + "\n")
    app = open_app(results_dir, setting="other")
    assert app.selectbox(key="setting").value == "other"
    assert "comparison is void" in app.warning[0].value
    app.selectbox(key="setting").set_value("pilot-91f8a8a7").run()
    assert not app.exception
    assert not app.warning


def test_a_report_holds_the_results(results_dir: Path, tmp_path: Path) -> None:
    with (results_dir / FILE.name).open("a") as file:
        file.write("rubbish\n")
    page = export_report(results_dir, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert page.count("Plotly.newPlot(") >= 2 + 2 * 3
    for part in (*TITLES[:1], "Forgetting matrix", "1.6% ± 1.9%", "line 7: damaged"):
        assert part in page
    with pytest.raises(ValueError, match="holds no run, so there is no step or layer"):
        export_report(results_dir, tmp_path / "s.html", step=3)
    (results_dir / FILE.name).write_text("rubbish\n")
    with pytest.raises(RunError):
        export_report(results_dir, tmp_path / "s.html")


def test_a_report_of_a_run_holds_both(run_copy: Path, tmp_path: Path) -> None:
    shutil.copy(FILE, run_copy)
    target = export_report(run_copy, tmp_path / "r.html", layers=["blocks.0.mlp.fc1"])
    page = target.read_text(encoding="utf-8")
    for part in ("Block age at step 275", "Forgetting matrix", "Retention: pilot"):
        assert part in page
    with SnapshotWriter(tmp_path / "new", layers=()):
        pass
    shutil.copy(FILE, tmp_path / "new")
    page = export_report(tmp_path / "new", tmp_path / "n.html").read_text(encoding="utf-8")
    assert "Forgetting matrix" in page
    assert "0 snapshots" in page


def test_figures_of_the_methods_own_are_a_table(
    open_app: Callable[..., AppTest], results_dir: Path
) -> None:
    path = results_dir / FILE.name
    first, *rest = path.read_text().splitlines()
    record = {**json.loads(first), "method_metrics": {"retention/drift_max": 0.5}}
    path.write_text("\n".join([json.dumps(record), *rest]) + "\n")
    app = open_app(results_dir)
    assert not app.exception
    own = app.dataframe[1].value
    assert own["figure"].tolist() == ["retention/drift_max"]
    assert own["n"].tolist() == [1]


def test_the_page_looks_as_often_as_asked(
    open_app: Callable[..., AppTest], results_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals: list[float | None] = []
    fragment = streamlit.fragment

    def recording(*arguments: object, run_every: float | None = None) -> object:
        intervals.append(run_every)
        return fragment(*arguments, run_every=run_every)  # type: ignore[call-overload]

    monkeypatch.setattr(streamlit, "fragment", recording)
    app = open_app(results_dir)
    assert intervals == [3.0]
    app.select_slider[0].set_value(5).run()
    assert intervals == [3.0, 5.0]
