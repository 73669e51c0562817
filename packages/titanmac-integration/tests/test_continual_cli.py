"""``titanmac continual``: what it writes, prints, goes on with and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blockell_format.snapshots import open_run
from titanmac_integration import load_checkpoint
from titanmac_integration._protocol._methods import METHODS
from titanmac_integration._protocol._protocol import Protocol
from titanmac_integration._protocol._records import read_records
from titanmac_integration.cli import build_parser, main

SMALL = [
    *("--d-model", "32", "--n-heads", "4", "--n-layers", "1", "--d-ff", "64"),
    *("--block-sparse-tile-size", "8", "--batch-size", "4", "--level-periods", "1,2,4"),
    *("--device", "cpu", "--quiet"),
]
TASKS = ["--tasks", "arithmetic", "reversal"]


def test_a_sequence_is_recorded_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["continual", "--out", str(out), "--steps", "8", "12", *TASKS, *SMALL]
    assert main([*command, "--methods", "ours-grown=0.01", "fine-tuning"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in (
        "demo: arithmetic, then reversal (8 + 12 steps)",
        "ours-grown@spare",
        "fine-tuning@sparse",
        "arithmetic, right answers",
        "forgotten",
        "Void: arithmetic was not learned to 95%",
        f"blockell-dashboard {out}",
    ):
        assert words in captured.out
    run = open_run(out)
    assert run.problems == []
    assert run.steps == [0, 4, 8, 12, 16, 20]
    assert run.config["method"] == "ours-grown"
    assert any("eval/arithmetic/exact_match" in line for line in run.metrics())
    live = [
        (run.snapshot(step).layer("blocks.0.mlp.fc1").col_indices >= 0).sum() for step in (8, 12)
    ]
    assert live[1] == 2 * live[0], "the second task grew"
    model = load_checkpoint(out)
    assert all(layer.density == 0.5 for layer in model.block_sparse_layers.values())

    summary = json.loads((out / "retention.json").read_text())
    assert [row["method"] for row in next(iter(summary["settings"].values()))["rows"]] == [
        "ours-grown",
        "fine-tuning",
    ]
    before = (out / "retention.jsonl").read_bytes()
    assert main([*command, "--methods", "ours-grown=0.01", "fine-tuning", "l2=1,10"]) == 0
    after = (out / "retention.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 2, "finished cells are not run again"
    assert "kept of arithmetic where the new task is within" in capsys.readouterr().out
    assert open_run(out).steps == run.steps
    assert main([*command, "--methods", "fine-tuning", "--seeds", "1"]) == 0
    assert capsys.readouterr().err == (
        f"{out} keeps its recording, of ours-grown with seed 0; record in another directory\n"
    )
    assert open_run(out).config["method"] == "ours-grown"
    assert main([*command, "--methods", "fine-tuning", "--force", "--no-record"]) == 0
    assert [r["method"] for r in read_records([out])] == ["fine-tuning"]
    assert not (out / "run.json").exists()


def test_seeds_and_a_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["continual", "--out", str(out), "--steps", "1", "--no-record", *TASKS, *SMALL]
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32
    try:
        flags = ["--methods", "fine-tuning", "--seeds", "3", "5", "--tf32"]
        assert main([*command, *flags]) == 0
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False
    assert read_records([out])[0]["tf32"] is False, "on a CPU there is no such thing"
    assert [r["seed"] for r in read_records([out])] == [3, 5]
    capsys.readouterr()
    assert main([*command, "--methods", "l2", "--seeds", "3", "--time-limit", "0"]) == 0
    assert "not complete: the same command again runs what is missing" in capsys.readouterr().out
    assert len(read_records([out])) == 2
    assert not list((out / "topology").glob("*"))


def test_a_training_that_breaks_down_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["continual", "--out", str(out), "--steps", "1", "3", "--warmup-steps", "0"]
    command += ["--no-record", *TASKS, *SMALL, "--methods"]
    assert main([*command, "fine-tuning=1e30"]) == 1
    shown = capsys.readouterr().out
    assert "fine-tuning@sparse=1e+30/seed0 broke down: no finite loss and gradient in" in shown
    assert "right answers" not in shown, "nothing to show a table of"
    assert main([*command, "fine-tuning=1e30,1e-3"]) == 0
    shown = capsys.readouterr().out
    assert "right answers" in shown
    assert "broke down" in shown


def test_a_run_of_another_command_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--tasks", "prose", "--steps", "2", "--out", str(out), *SMALL]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["continual", "--out", str(out), "--steps", "1", *TASKS, *SMALL]) == 1
    assert "already holds a run; choose another directory" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d-model", "33"], r"d_model (=33) must be a multiple of 2 * n_heads (=8)"),
        (["--rates", "0"], "lr (=0.0) must be a number above 0"),
        (["--steps", "1", "2", "3"], "steps (=(1, 2, 3)) must have one entry per task (2), or one"),
        (["--steps", "0"], "steps (=(0, 0)) must be positive"),
        (["--tasks", "arithmetic"], "tasks (=('arithmetic',)) must be at least two"),
        (["--tasks", "arithmetic", "chess"], "task (='chess') must be one of"),
        (["--seeds", "1", "-1"], "seeds (=[1, -1]) must be in [0, 2**64)."),
        (["--seq-len", "9"], "seq_len (=9) must be at least 10, the tokens of one problem of task"),
        (
            ["--methods", "ours=0"],
            "tolerance (=0.0) of method ours must be greater than 0;",
        ),
        (["--methods", "ours-fixed-eps=-1"], "eps (=-1.0) of method ours-fixed-eps must be 0 or"),
        (["--rates", "0", "0.001"], "lr (=0.0) must be a number above 0"),
        (["--methods", "ours:-1"], "lr (=-1.0) must be a number above 0"),
        (["--methods", "fine-tuning=-1"], "lr (=-1.0) must be a number above 0"),
        (["--methods", "magic"], "method (='magic') must be one of fine-tuning"),
        (["--device", "abacus"], "--device (=abacus) cannot be used"),
        (["--vocab-size", "100"], "vocab_size (=100) must be at least 256"),
        (["--seq-len", "500"], "seq_len (=500) must not exceed the model's max_seq_len"),
        (["--optimizer", "nested", "--cms-levels", "x:1"], "levels (pattern 'x') must name at le"),
    ],
)
def test_bad_flags_make_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert main(["continual", "--out", str(out), *SMALL, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_help_names_every_method_and_task() -> None:
    text = build_parser()._subparsers._group_actions[0].choices["continual"].format_help()  # type: ignore[union-attr, index]
    for word in (*METHODS, "text:FILE", "qa:FILE", "--time-limit", "sweep", "exit status: 0"):
        assert word in text, word
    examples = text[text.index("methods, each as") :]
    assert max(map(len, examples.splitlines())) <= 80


def test_a_file_that_has_changed_is_learned_anew(tmp_path: Path) -> None:
    out, text = tmp_path / "run", tmp_path / "words.txt"
    command = ["continual", "--out", str(out), "--steps", "1", "--no-record", *SMALL]
    command += ["--methods", "fine-tuning", "--tasks", "reversal", f"text:{text}"]
    for words, known in (("one two three ", 1), ("one two three ", 1), ("four five six ", 2)):
        text.write_text(words * 200)
        assert main(command) == 0
        assert len(read_records([out])) == known


def test_a_scheduler_that_ends_it_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Protocol, *_: object, **__: object) -> bool:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # again, while it saves
        return True

    monkeypatch.setattr(Protocol, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "run"
    assert main(["continual", "--out", str(out), "--steps", "1", *TASKS, *SMALL]) == 143
    assert capsys.readouterr().err == f"interrupted; what was trained so far is in {out}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_saves_the_model_and_goes_on_later(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "titanmac_integration.cli", "continual", "--out", str(out)]
    long = ["--steps", "100000", *TASKS, *SMALL]
    process = subprocess.Popen(
        [*command, *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # what a shell runs in the background ignores it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while len(list((out / "topology").glob("step-*"))) < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no snapshots within a minute"
            time.sleep(0.05)
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
    assert main([*command[3:], "--steps", "2", *TASKS, *SMALL]) == 0
    assert open_run(out).steps == [0, 4], "begun again from the start"
