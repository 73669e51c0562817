"""Real processes: killed, interrupted, imported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from blockell_format.snapshots import open_run
from titanmac_integration import load_checkpoint

COMMAND = [
    *(sys.executable, "-m", "titanmac_integration.cli", "continual", "--steps", "100000"),
    *("--d-model", "32", "--n-heads", "4", "--d-ff", "64", "--block-sparse-tile-size", "8"),
    *("--batch-size", "4", "--seq-len", "16", "--level-periods", "1,2,4", "--device", "cpu"),
    *("--log-every", "1"),
]


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_snapshots(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list((out / "topology").glob("step-*"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no snapshots within a minute"
        time.sleep(0.05)


def test_a_killed_run_can_be_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    try:
        wait_for_snapshots(process, out, 4)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    run = open_run(out)
    assert run.steps[:3] == [0, 4, 8]
    for step in run.steps:
        for name, info in run.layers.items():
            layer = run.snapshot(step).layer(name)
            assert layer.col_indices.shape == (info.R, info.K)
    assert any("train/loss" in line for line in run.metrics())


def test_ctrl_c_saves_the_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    try:
        wait_for_snapshots(process, out, 3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == f"interrupted; what was trained so far is in {out}\n"
    assert stdout == ""
    assert json.loads((out / "model.json").read_text())["info"]["step"] >= 8
    assert load_checkpoint(out).block_sparse_layers
    assert open_run(out).problems == []


def test_the_example_runs(tmp_path: Path) -> None:
    package = Path(__file__).parents[1]
    if not (package / "pyproject.toml").exists():
        return  # the tests of an installed wheel, which brings no examples
    example = package / "examples" / "train_block_sparse.py"
    assert len(example.read_text().splitlines()) <= 80
    command = [sys.executable, str(example), "--steps", "20", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "swap rate" in done.stdout
    assert open_run(tmp_path / "run").steps[0] == 0
