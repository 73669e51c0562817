"""The page, driven by Streamlit's own test runner (no browser)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from blockell_dashboard._server import APP_SCRIPT
from blockell_dashboard.example import EXAMPLE_LAYERS, write_example_run
from blockell_format.snapshots import LayerInfo, SnapshotWriter, open_run

FIRST, SECOND = sorted(layer.name for layer in EXAMPLE_LAYERS[:4])[:2]


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch):
    """Start the app on directories, with a page address."""

    def start(*directories: Path, **address: str) -> AppTest:
        arguments = [part for path in directories for part in ("--dir", str(path))]
        monkeypatch.setattr("sys.argv", [str(APP_SCRIPT), *arguments])
        app = AppTest.from_file(str(APP_SCRIPT), default_timeout=60)
        for key, value in address.items():
            app.query_params[key] = value
        return app.run()

    return start


def charts(app: AppTest) -> list[dict]:
    """The figures on the page, in order."""
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def titles(app: AppTest) -> list[str]:
    return [chart["layout"]["title"]["text"].split("</b>")[0][3:] for chart in charts(app)]


def text(app: AppTest) -> str:
    blocks = (app.markdown, app.header, app.subheader, app.code, app.error, app.info, app.warning)
    return "\n".join(element.value for kind in blocks for element in kind).replace("\\", "")


def tiles(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def test_a_good_run_shows_everything(open_app, good_run: Path) -> None:
    app = open_app(good_run)
    assert not app.exception
    assert titles(app) == [
        "Block age at step 275",
        "Block ages at step 275",
        "Swap rate",
        "Column entropy",
        "Training metric: loss",
    ]
    assert tiles(app)["Newest step"] == "275"
    assert tiles(app)["Layers"] == "4"
    assert tiles(app)["Density"] == "50.0%"
    assert tiles(app)["Problems"] == "0"
    assert tiles(app)["Last swap rate"].endswith("%")
    assert len(app.get("download_button")) == 6
    assert all(chart.proto.alt for chart in app.get("plotly_chart"))


def test_steps_and_colours_can_be_chosen(open_app, good_run: Path) -> None:
    app = open_app(good_run)
    app.button(key="previous").click().run()
    assert titles(app)[0] == "Block age at step 250"
    app.select_slider(key="step").set_value(100).run()
    assert titles(app)[:2] == ["Block age at step 100", "Block ages at step 100"]
    app.button(key="next").click().run()
    assert titles(app)[0] == "Block age at step 125"
    app.session_state["colour"] = "change"
    app.run()
    assert titles(app)[0] == "Born, died and kept at step 125"
    app.selectbox(key="layer").set_value(SECOND).run()
    assert titles(app)[0] == "Born, died and kept at step 125"
    assert not app.exception
    assert app.query_params["step"] == "125"
    assert app.query_params["layer"] == SECOND
    assert app.query_params["colour"] == "change"


def test_a_link_restores_the_selection(open_app, good_run: Path) -> None:
    app = open_app(good_run, run="good", layer=SECOND, step="150", colour="score")
    assert app.selectbox(key="layer").value == SECOND
    assert titles(app)[0] == "Block score at step 150"


def test_the_metric_is_in_the_link(open_app, good_run: Path) -> None:
    app = open_app(good_run)
    app.selectbox(key="metric").set_value("learning_rate").run()
    assert app.query_params["metric"] == "learning_rate"
    other = open_app(good_run, metric="learning_rate")
    assert titles(other)[-1] == "Training metric: learning_rate"


@pytest.mark.parametrize("step", ["148", "1e9", "-5", "many", ""])
def test_a_link_with_nonsense_still_opens(open_app, good_run: Path, step: str) -> None:
    app = open_app(good_run, run="gone", layer="gone", step=step, colour="smell")
    assert not app.exception
    expected = {"148": 150, "-5": 0}.get(step, 275)
    assert titles(app)[0] == f"Block age at step {expected}"
    assert app.selectbox(key="layer").value == FIRST


def test_the_colour_scale_does_not_move_with_the_step(open_app, good_run: Path) -> None:
    app = open_app(good_run)

    def scales() -> list[object]:
        heatmap, ages = charts(app)[:2]
        return [heatmap["data"][-1]["zmax"], ages["layout"]["xaxis"]["range"]]

    before = scales()
    app.select_slider(key="step").set_value(50).run()
    assert scales() == before


def test_a_growing_run_is_followed_while_the_newest_step_is_selected(
    open_app, run_copy: Path
) -> None:
    app = open_app(run_copy)
    assert titles(app)[0] == "Block age at step 275"
    _continue(run_copy, 300)
    app.run()
    assert titles(app)[0] == "Block age at step 300"
    app.select_slider(key="step").set_value(100).run()
    _continue(run_copy, 325)
    app.run()
    assert titles(app)[0] == "Block age at step 100"
    assert tiles(app)["Newest step"] == "325"


def test_another_page_in_between_does_not_stop_the_following(
    open_app, tmp_path: Path, good_run: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(good_run, tmp_path / name)
    app = open_app(tmp_path, run="a")
    app.session_state["page"] = "compare"
    app.run()
    assert titles(app)[0] == "loss"
    _continue(tmp_path / "a", 300)
    app.session_state["page"] = "topology"
    app.run()
    assert titles(app)[0] == "Block age at step 300"


def test_the_run_that_was_looked_at_is_among_those_compared(
    open_app, tmp_path: Path, good_run: Path
) -> None:
    for name in "abcdef":
        shutil.copytree(good_run, tmp_path / name)
    oldest = min("abcdef", key=lambda name: (tmp_path / name / "run.json").stat().st_mtime_ns)
    app = open_app(tmp_path, run=oldest, page="compare")
    chosen = app.session_state["runs"]
    assert len(chosen) == 4
    assert chosen[0] == oldest


def _continue(path: Path, step: int) -> None:
    run = open_run(path)
    layers = {name: run.snapshot(run.steps[-1]).layer(name) for name in run.layers}
    with SnapshotWriter(path, layers=tuple(run.layers.values()), mode="resume") as writer:
        writer.write(
            step,
            layers,
            checksums={name: [name] for name in layers},
            swap_counts=dict.fromkeys(layers, 1),
        )


def test_several_runs_can_be_chosen_from(open_app, tmp_path: Path, good_run: Path) -> None:
    shutil.copytree(good_run, tmp_path / "a")
    one = (LayerInfo("head", R=4, C=4, K=2, B=8),)
    write_example_run(tmp_path / "b", layers=one, decisions=2)
    app = open_app(tmp_path, run="a")
    assert tiles(app)["Layers"] == "4"
    app.selectbox(key="run").set_value("b").run()
    assert not app.exception
    assert tiles(app)["Layers"] == "1"
    assert titles(app)[0] == "Block age at step 25"
    assert app.query_params["run"] == "b"


def test_a_link_to_what_is_gone_says_so(open_app, tmp_path: Path, good_run: Path) -> None:
    shutil.copytree(good_run, tmp_path / "a")
    shutil.copytree(good_run, tmp_path / "b_1")
    app = open_app(tmp_path, run="b_2", layer="no.such")
    said = [toast.value.replace("\\", "") for toast in app.toast]
    first = app.query_params["run"]
    assert said == [
        f"There is no run b_2 here; this is {first}.",
        f"There is no layer no.such here; this is {FIRST}.",
    ]
    assert not app.run().toast
    shutil.rmtree(tmp_path / first)
    [toast] = app.run().toast
    assert toast.value.startswith(f"There is no run {first} here".replace("_", "\\_"))
    assert not open_app(tmp_path).toast


@pytest.mark.parametrize("kind", ["empty", "missing", "file"])
def test_nothing_to_show_is_explained(open_app, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    app = open_app(path)
    assert not app.exception
    assert "No run to show yet" in text(app)
    assert str(path) in text(app)
    for command in ("nox -s demo", "titanmac continual", "blockell-dashboard example"):
        assert command in text(app)
    assert not app.get("plotly_chart")


def test_a_directory_of_garbage_is_explained(open_app, garbage_dir: Path) -> None:
    app = open_app(garbage_dir)
    assert not app.exception
    assert "cannot be opened as a run" in text(app)
    assert "is not a run file" in text(app)
    assert "nox -s demo" in text(app)


def test_the_newest_run_that_opens_is_shown_first(open_app, tmp_path: Path, good_run: Path) -> None:
    shutil.copytree(good_run, tmp_path / "good")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "run.json").write_text("{")
    app = open_app(tmp_path)
    assert app.selectbox(key="run").options == ["newer", "good"]
    assert app.header[0].value == "good"
    app.selectbox(key="run").set_value("newer").run()
    assert not app.exception
    assert "cannot be opened as a run" in text(app)


def test_bad_files_are_listed_and_the_rest_is_shown(open_app, damaged_run: Path) -> None:
    app = open_app(damaged_run)
    assert not app.exception
    assert len(charts(app)) == 5
    assert tiles(app)["Problems"] == "5"
    listed = app.dataframe[-1].value
    assert "is not named like a snapshot; ignored" in listed["reason"].tolist()
    assert len(listed) == 5


def test_a_layer_that_cannot_be_read_at_one_step(open_app, run_copy: Path) -> None:
    path = sorted((run_copy / "topology").iterdir())[-1]
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)
    path.write_bytes(content)
    app = open_app(run_copy)
    assert not app.exception
    assert "cannot be shown at step 275" in text(app)
    assert titles(app)[0] == "Swap rate"
    app.button(key="previous").click().run()
    assert titles(app)[0] == "Block age at step 250"


def test_a_single_snapshot(open_app, tmp_path: Path) -> None:
    app = open_app(write_example_run(tmp_path / "one", decisions=1))
    assert not app.exception
    assert "the only snapshot so far" in text(app)
    assert len(charts(app)) == 5


def test_a_run_without_a_snapshot_yet(open_app, tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "new", layers=EXAMPLE_LAYERS) as writer:
        writer.log({"loss": 3.0}, 1)
    app = open_app(tmp_path / "new")
    assert not app.exception
    assert "No topology decision is recorded yet" in text(app)
    assert titles(app) == ["Training metric: loss"]


def test_a_single_layer_without_metrics_and_with_spare_slots(open_app, tmp_path: Path) -> None:
    layer = (LayerInfo("head", R=6, C=10, K=8, B=4),)
    path = write_example_run(tmp_path / "spare", layers=layer, decisions=3, live={"head": 4})
    (path / "metrics.jsonl").unlink()
    app = open_app(path)
    assert not app.exception
    assert tiles(app)["Density"] == "40.0%"
    assert "4 per row (40% dense)" in charts(app)[0]["layout"]["title"]["text"]
    assert len(charts(app)) == 4


def test_names_from_files_are_not_taken_for_markup(open_app, tmp_path: Path) -> None:
    name = "a*b*[c](d) <script>alert(1)</script> $x$"
    layer = (LayerInfo(name, R=2, C=2, K=1, B=4),)
    app = open_app(write_example_run(tmp_path / "odd_*run*", layers=layer, decisions=2))
    assert not app.exception
    assert app.header[0].value == r"odd\_\*run\*"
    assert "\\<script\\>" in app.subheader[0].value
