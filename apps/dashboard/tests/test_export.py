"""The report: one file that works without a server or a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blockell_dashboard.export import export_report
from blockell_format.snapshots import RunError, SnapshotWriter


def test_a_report_holds_every_layer_and_the_code_once(good_run: Path, tmp_path: Path) -> None:
    path = export_report(good_run, tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") >= 1 + 4 * 4
    assert page.count("plotly.js v") == 1
    assert re.search(r"<(script|link|img)[^>]+(src|href)=", page) is None
    for part in (
        "Block 0 · fc1",
        "Block 1 · fc2",
        "Block age at step 275",
        "Training metric: loss",
    ):
        assert part in page
    assert list(tmp_path.iterdir()) == [path]


def test_step_layer_and_theme_can_be_chosen(good_run: Path, tmp_path: Path) -> None:
    path = export_report(
        good_run, tmp_path / "r.html", step=50, layers=["blocks.1.mlp.fc1"], theme="dark"
    )
    page = path.read_text(encoding="utf-8")
    assert "Block age at step 50" in page
    assert "Block 0" not in page
    assert "#0e1117" in page


def test_problems_are_listed(damaged_run: Path, tmp_path: Path) -> None:
    page = export_report(damaged_run, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Problems (5)" in page
    assert "is not named like a snapshot" in page


def test_nothing_is_overwritten_unasked(good_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        export_report(good_run, target)
    assert target.read_text() == "mine"
    export_report(good_run, target, layers=["blocks.0.mlp.fc1"], overwrite=True)
    assert target.stat().st_size > 1_000_000


def test_what_is_not_there_is_named(good_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step \(=26\) has no snapshot; nearest: 25"):
        export_report(good_run, tmp_path / "r.html", step=26)
    with pytest.raises(ValueError, match=r"layer \(='head'\) is not in the run; layers: blocks"):
        export_report(good_run, tmp_path / "r.html", layers=["head"])
    with pytest.raises(RunError, match="does not exist"):
        export_report(tmp_path / "none", tmp_path / "r.html")
    with SnapshotWriter(tmp_path / "new", layers=()):
        pass
    with pytest.raises(ValueError, match="holds no readable snapshot yet and no metric"):
        export_report(tmp_path / "new", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_run_of_several_tasks(task_run: Path, tmp_path: Path) -> None:
    page = export_report(task_run, tmp_path / "r.html").read_text(encoding="utf-8")
    for part in ("Task of birth at step 100", "<th>born in 2 text</th>", "text begins", "Density"):
        assert part in page
    assert "in blocks.1.fc, rank 0 and rank 1 disagree" in page


def test_a_dense_run_has_a_report_of_its_metrics(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "dense", layers=()) as writer:
        writer.log({"accuracy": 0.5}, 1)
    page = export_report(tmp_path / "dense", tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Training metric: accuracy" in page


def test_a_layer_that_rotted_does_not_stop_the_report(run_copy: Path, tmp_path: Path) -> None:
    newest = sorted((run_copy / "topology").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    length = int.from_bytes(content[:8], "little")
    tensor = json.loads(content[8 : 8 + length])["blocks.0.mlp.fc1/col_indices"]
    start, stop = (8 + length + offset for offset in tensor["data_offsets"])
    content[start:stop] = b"\xff" * (stop - start)
    newest.write_bytes(content)
    page = export_report(run_copy, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("Block age at step 275") == 3
    assert "Problems (1)" in page
