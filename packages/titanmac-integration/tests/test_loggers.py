"""Loggers: JSON lines, and TensorBoard and Weights & Biases where they are installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from titanmac_integration import (
    JsonLinesLogger,
    MultiLogger,
    TensorBoardLogger,
    WandbLogger,
    make_logger,
)

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed"
)


def test_json_lines(tmp_path: Path) -> None:
    logger = JsonLinesLogger(tmp_path / "new" / "metrics.jsonl")
    logger.log({"a": 1.5, "b": torch.tensor(2.0), "c": float("nan"), "d": float("-inf")}, 3)
    logger.log({"a": 2.5}, 4)
    logger.close()
    lines = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[0]["metrics"] == {"a": 1.5, "b": 2.0, "c": "NaN", "d": "-Infinity"}
    assert lines[0]["time"] <= lines[1]["time"]


def test_several_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    logger = MultiLogger([JsonLinesLogger(path) for path in paths])
    logger.log({"x": 1.0}, 1)
    logger.close()
    assert all(json.loads(path.read_text())["metrics"] == {"x": 1.0} for path in paths)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_one_that_cannot_write_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    full, good = JsonLinesLogger("/dev/full"), JsonLinesLogger(tmp_path / "b.jsonl")
    logger = MultiLogger([full, good])
    with pytest.warns(UserWarning, match=r"what JsonLinesLogger \(logger 1\) logs .*No space"):
        logger.log({"x": 1.0}, 1)
    logger.log({"x": 1.0}, 2)  # warnings are errors: it is said once
    assert [json.loads(line)["step"] for line in good.path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda path: TensorBoardLogger(path), "torch.utils.tensorboard", "tensorboard"),
        (lambda path: WandbLogger(directory=path), "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    make: object, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes `import` fail as if not installed
    with pytest.raises(ImportError, match=rf"titanmac-integration\[{extra}\]"):
        make(tmp_path)  # type: ignore[operator]


def test_by_name(tmp_path: Path) -> None:
    assert isinstance(make_logger("jsonl", tmp_path), JsonLinesLogger)
    with pytest.raises(ValueError, match=r"logger \(='csv'\) must be one of jsonl, tensorboard"):
        make_logger("csv", tmp_path)


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    logger = make_logger("tensorboard", tmp_path)
    logger.log({"topology/swap_rate": 0.25, "note": "text"}, 7)  # type: ignore[dict-item]
    logger.log({"topology/swap_rate": torch.tensor(0.5)}, 8)  # type: ignore[dict-item]
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("topology/swap_rate")] == [
        (7, 0.25),
        (8, 0.5),
    ]
    assert events.Tags()["scalars"] == ["topology/swap_rate"]


@needs_wandb
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb").teardown()  # else an earlier run's writer of this process serves
    logger = WandbLogger("test", tmp_path, mode="offline", run_id="abc", config={"lr": 0.1})
    logger.log({"topology/swap_rate": 0.25, "note": "text"}, 7)  # type: ignore[dict-item]
    logger.close()
    records = list(tmp_path.glob("wandb/offline-run-*-abc/run-abc.wandb"))
    assert len(records) == 1
    # W&B writes in a process of its own, which may be behind when the machine is busy
    deadline = time.monotonic() + 60
    while b"topology/swap_rate" not in records[0].read_bytes():
        assert time.monotonic() < deadline, records[0].read_bytes()
        time.sleep(0.1)
