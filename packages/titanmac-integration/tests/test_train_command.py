"""``titanmac train`` as a user runs it: killed, interrupted, continued, on files, on full disks."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockell_format.snapshots import open_run
from titanmac_integration import ArithmeticTask, load_checkpoint
from titanmac_integration._cli.signals import StopSignals
from titanmac_integration.cli import main

SMALL = [
    *("--d-model", "32", "--n-heads", "4", "--d-ff", "64", "--block-sparse-tile-size", "8"),
    *("--batch-size", "4", "--seq-len", "16", "--level-periods", "1,2,4", "--device", "cpu"),
    *("--eval-every", "0", "--log-every", "5", "--dropout", "0.1", "--tasks", "prose"),
]
STEPS = 100
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
PYTHON = [sys.executable, "-m", "titanmac_integration"]


def train(out: Path, *flags: str) -> int:
    return main(["train", "--out", str(out), "--quiet", *flags])


def start(out: Path) -> subprocess.Popen[str]:
    flags = ["--steps", str(STEPS), "--checkpoint-every", "10", "--out", str(out)]
    return subprocess.Popen(
        [*PYTHON, "train", *SMALL, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 120
    while not any((out / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.01)


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint."""
    path = out / "checkpoints" / f"step-{step:08d}"
    return load_file(path / "model.safetensors") | load_file(path / "state.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def training_losses(out: Path) -> list[tuple[int, float]]:
    lines = open_run(out).metrics()
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps that nobody disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(out, *SMALL, "--steps", str(STEPS)) == 0
    return out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_run_continues_to_the_bit(
    uninterrupted: Path, tmp_path: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    process = start(out)
    try:
        wait_for_checkpoint(process, out)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped after step " in errors
        assert f"continue with: titanmac train --resume --out {out}" in errors
        assert load_checkpoint(out).block_sparse_layers
    else:
        assert process.returncode == -signal.SIGKILL
        assert main(["eval", str(out), "--device", "cpu"]) == 0
        assert "prose  bits per byte" in capsys.readouterr().out, "from the last checkpoint"
    assert not (out / "checkpoints" / f"step-{STEPS:08d}").exists()
    capsys.readouterr()

    assert train(out, "--resume", "--device", "cpu") == 0
    assert f"{STEPS} steps, {STEPS * 4 * 16:,} tokens" in capsys.readouterr().out
    assert_same(tensors(out, STEPS), tensors(uninterrupted, STEPS))
    assert_same(
        load_file(out / "model.safetensors"), load_file(uninterrupted / "model.safetensors")
    )
    runs = open_run(out), open_run(uninterrupted)
    assert runs[0].problems == []
    assert runs[0].steps == runs[1].steps
    assert training_losses(out) == training_losses(uninterrupted)
    results = [json.loads((path / "results.json").read_text()) for path in (out, uninterrupted)]
    for key in ("measures", "untrained", "tokens"):
        assert results[0][key] == results[1][key]


def test_a_finished_run_reports_what_it_cost(uninterrupted: Path) -> None:
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["seconds"])
    assert results["peak_memory_bytes"] > 10_000_000
    assert 0.0 < results["topology_frac"] < 1.0
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == [
        f"step-{STEPS:08d}"
    ]


def test_going_back_keeps_what_was_there(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = ["--checkpoint-every", "4", "--keep-checkpoints", "3"]
    assert train(out, *SMALL, "--steps", "12", *short) == 0
    checkpoints = out / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step-{s:08d}" for s in (4, 8, 12)]
    before = tensors(out, 12)
    assert train(out, "--resume", "4", "--device", "cpu", *short) == 0
    assert_same(tensors(out, 12), before)
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names == [
        *(f"step-{s:08d}" for s in (4, 8, 12)),
        *(f"superseded-{s:08d}" for s in (8, 12)),
    ]
    assert open_run(out).steps == [0, 4, 8, 12]


def test_what_cannot_be_continued_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def refused(*flags: str) -> str:
        before = (out / "run.json").read_bytes() if out.exists() else b""
        assert train(out, "--resume", "--device", "cpu", *flags) == 1
        assert not before or (out / "run.json").read_bytes() == before, "nothing may be written"
        return capsys.readouterr().err

    assert "holds no checkpoint to continue from" in refused()
    assert train(out, *SMALL, "--steps", "6", "--checkpoint-every", "3") == 0
    error = refused("--d-ff", "128", "--lr", "0.5", "--log-every", "1")
    assert "belongs to another configuration: d_ff is 64 in the checkpoint and 128 here" in error
    assert "lr is 0.003 in the checkpoint and 0.5 here" in error
    assert "log_every" not in error
    assert "task (='arithmetic') differs from that of the check" in refused("--tasks", "arithmetic")
    assert "holds no checkpoint of step 5; there are 3, 6" in refused("--resume", "5")
    assert "--resume continues a run and --force replaces it" in refused("--force")
    assert "--resume (=last) must be the step" in refused("--resume", "last")

    latest = out / "checkpoints" / "step-00000006"
    for name in ("model.safetensors", "state.safetensors", "state.json"):
        good = (latest / name).read_bytes()
        for bad in (
            good[:-20],
            b"",
            good[:-1] + bytes([good[-1] ^ 1]) if "json" not in name else b"{",
        ):
            (latest / name).write_bytes(bad)
            error = refused()
            assert f"step-00000006 cannot be used: {name}" in error
            assert "Other checkpoints: steps 3." in error
        (latest / name).unlink()
        assert f"cannot be used: {name} cannot be read" in refused()
        (latest / name).write_bytes(good)
    content = (latest / "state.json").read_text()
    (latest / "state.json").write_text(content.replace('"version": 1', '"version": 9'))
    assert "version 9 is not known" in refused()
    assert train(out, "--resume", "3", "--device", "cpu") == 0
    assert_same(tensors(out, 6), load_file(out / "model.safetensors") | tensors(out, 6))


def test_a_run_keeps_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--checkpoint-every", "2", "--keep-checkpoints", "5"]
    assert train(out, *SMALL, *flags, "--steps", "6") == 0
    assert train(out, "--resume", "--steps", "10", "--device", "cpu") == 0
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10)]
    capsys.readouterr()
    again = ["--resume", "--steps", "11", "--device", "cpu", "--preset"]
    assert train(out, *again, "small") == 1
    assert "--preset (=small) differs from that of the run (=demo)" in capsys.readouterr().err
    assert train(out, *again, "demo", "--keep-checkpoints", "1") == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000011"]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, *SMALL, "--steps", "4") == 0
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    capsys.readouterr()
    with file_size_limit(20_000):
        assert train(out, "--resume", "--steps", "8", "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert "the checkpoint of step 8 could not be written" in error
    assert "File too large" in error
    assert "Complete checkpoints there: 4." in error
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]
    assert_same(tensors(out, 4), tensors(whole, 4))
    assert_same(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))
    for path in (out, whole):
        assert train(path, "--resume", "--steps", "8", "--device", "cpu") == 0
    assert_same(tensors(out, 8), tensors(whole, 8))


def test_a_full_disk_stops_a_training_at_its_checkpoint_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with file_size_limit(8_000):
        flags = ["--steps", "100", "--log-every", "1", "--checkpoint-every", "0"]
        with pytest.warns(
            UserWarning, match=r"what SnapshotWriter \(logger 1\) logs of step .* training goes on"
        ):
            assert train(out, *SMALL, *flags) == 1
    error = capsys.readouterr().err
    assert "the checkpoint of step 100 could not be written" in error
    assert "File too large" in error


def test_a_text_known_by_heart_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = tmp_path / "noise.txt"
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=120)
    noise.write_text("".join(letters))
    flags = [*SMALL[: SMALL.index("--tasks")], "--lr", "0.02", "--dropout", "0", "--force"]
    flags += ["--held-out", "0.3", "--data", str(noise)]
    assert train(tmp_path / "run", *flags, "--steps", "2") == 0
    assert "by heart" not in capsys.readouterr().out
    assert train(tmp_path / "run", *flags, "--steps", "60") == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"The text that was trained on costs \d\.\d\d bits per byte, held-out text \d+\.\d\d: much "
        r"of it is known by heart\. Fewer --steps, more --dropout or more text help\.\n",
        shown,
    ), shown


def test_training_on_files_and_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text, lines = tmp_path / "run", tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("abcdefghijklmnopqrstuvwxyz" * 100)
    lines.write_text("".join(f'{{"question": "{c}?", "answer": "{c}!"}}\n' for c in "abcdefghij"))
    flags = [*SMALL[: SMALL.index("--tasks")], "--steps", "120", "--lr", "0.02", "--dropout", "0"]
    assert train(out, *flags, "--data", str(text), str(lines), "--held-out", "0.2") == 0
    shown = capsys.readouterr().out
    assert "text       bits per byte" in shown
    assert "questions    exact match" in shown
    assert main(["eval", str(out), "--data", str(text), "--device", "cpu"]) == 0
    assert "text  bits per byte" in capsys.readouterr().out
    assert main(["eval", str(out), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "text       bits per byte" in shown
    assert "questions    exact match" in shown
    assert "arithmetic" not in shown, "what it was trained on"
    write = ["generate", str(out), "--prompt", "abcdef", "--max-new-tokens", "5"]
    assert main([*write, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "abcdefghijk\n"
    assert main(["generate", str(out), "--prompt", "\udcff"]) == 1
    assert "--prompt must be text in UTF-8: 'utf-8' codec can't" in capsys.readouterr().err
    assert main([*write, "--seed", str(1 << 64)]) == 1
    assert "--seed (=18446744073709551616) must be in [0, 2**64)" in capsys.readouterr().err
    assert main(["generate", str(out), "--prompt", ""]) == 1
    assert "--prompt (='') must hold" in capsys.readouterr().err
    moved = text.rename(tmp_path / "moved.txt")
    assert main(["eval", str(out), "--device", "cpu"]) == 1
    assert f"was trained on {text}, which is not there any more" in capsys.readouterr().err
    moved.rename(text)
    text.write_text(text.read_text().upper())
    assert train(out, "--resume", "--device", "cpu", "--steps", "130") == 1
    assert "data (=" in capsys.readouterr().err
    text.unlink()
    assert train(out, "--resume", "--device", "cpu", "--steps", "130") == 1
    assert "No such file" in capsys.readouterr().err


def test_a_tokenizer_belongs_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([text.read_text()], vocab_size=270, show_progress=False)
    file = tmp_path / "words.json"
    made.save(str(file))
    flags = [*SMALL[: SMALL.index("--tasks")], "--steps", "4", "--tokenizer", str(file)]
    out = tmp_path / "run"
    assert train(out, *flags) == 1
    assert "goes with --data" in capsys.readouterr().err
    assert train(out, *flags, "--data", str(text)) == 0
    assert load_checkpoint(out).config.vocab_size == 270
    file.unlink()
    assert train(out, "--resume", "--steps", "6", "--device", "cpu") == 0
    assert main(["generate", str(out), "--prompt", "the quick", "--device", "cpu"]) == 0
    assert "the quick" in capsys.readouterr().out


def test_signals_ask_to_stop() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.exit_status == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_the_first_evaluation_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may take longer than a scheduler waits, and nothing is learned yet."""

    def measure(*_: object) -> float:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("goes on")

    monkeypatch.setattr(ArithmeticTask, "measure", measure)
    assert train(tmp_path / "run", *SMALL, "--tasks", "arithmetic", "--steps", "3") == 143
    assert "stopped at once; no checkpoint yet" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_other_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # else the environment that an earlier run of this process saw holds
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    flags = ["--steps", "5", "--tensorboard", "--wandb", "project"]
    assert train(out, *SMALL, *flags) == 0
    (events,) = (out / "tensorboard").iterdir()
    assert b"train/tokens_per_s" in events.read_bytes()
    assert any((out / "wandb").glob("offline-run-*"))


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path / "run", *SMALL, "--steps", "1", "--wandb", "project") == 1
    assert "pip install 'titanmac-integration[wandb]'" in capsys.readouterr().err
