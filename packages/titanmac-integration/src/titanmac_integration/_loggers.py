"""Loggers behind the protocol `log(metrics, step)`: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cms_topology import Logger, RecordKeeper

LOGGER_NAMES = ("jsonl", "tensorboard", "wandb")
_EXTRAS = {
    "tensorboard": ("torch.utils.tensorboard", "TensorBoardLogger"),
    "wandb": ("wandb", "WandbLogger"),
}


class JsonLinesLogger:
    """Appends one line per call to a file: `{"step": 100, "time": ..., "metrics": {...}}`.

    The form of a run directory's `metrics.jsonl`. The file is opened for each line, so that nothing
    is lost when the process is killed, and copies of the logger may write to it, too. Values that
    are not finite are written as the strings "NaN", "Infinity" and "-Infinity".

    Args:
        path: the file; its directory is made when the first line is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line."""
        record = {"step": int(step), "time": time.time(), "metrics": _plain(metrics)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing to do; the other loggers have something to close."""


class TensorBoardLogger:
    """Writes scalars for TensorBoard; needs the extra `titanmac-integration[tensorboard]`.

    Args:
        directory: where the event files go.

    Raises:
        ImportError: TensorBoard is not installed; the message names the extra.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        check_extra("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write every number as a scalar; other values are left out."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """Logs to Weights & Biases; needs the extra `titanmac-integration[wandb]`.

    Args:
        project: name of the project.
        directory: where the local files go.
        mode: "online", "offline" or "disabled"; None leaves it to wandb's own settings
            (environment variable WANDB_MODE).
        run_id: continue the run of this name if there is one.
        **settings: further arguments of `wandb.init` (name, config, tags, ...).

    Raises:
        ImportError: wandb is not installed; the message names the extra.
    """

    def __init__(
        self,
        project: str = "titanmac",
        directory: str | os.PathLike[str] | None = None,
        *,
        mode: str | None = None,
        run_id: str | None = None,
        **settings: Any,
    ) -> None:
        check_extra("wandb")
        import wandb

        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            settings["dir"] = str(directory)
        if run_id is not None:
            settings |= {"id": run_id, "resume": "allow"}
        self._run: Any = wandb.init(project=project, mode=mode, **settings)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log every number under its name; other values are left out."""
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MultiLogger:
    """Passes everything on to several loggers.

    One that cannot write, as on a full disk, is warned of (see `cms_topology.RecordKeeper`); the
    others are told all the same, and training goes on.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)
        self._keeper = RecordKeeper()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log to each, in order."""
        for number, logger in enumerate(self.loggers, start=1):
            what = f"what {type(logger).__name__} (logger {number}) logs"
            with self._keeper.writing(what, step):
                logger.log(metrics, step)

    def close(self) -> None:
        """Close those that can be closed."""
        for logger in self.loggers:
            close = getattr(logger, "close", None)
            if close is not None:
                close()


def make_logger(
    name: str, directory: str | os.PathLike[str]
) -> JsonLinesLogger | TensorBoardLogger | WandbLogger:
    """A logger by name: "jsonl" (the default everywhere), "tensorboard" or "wandb".

    Args:
        name: which.
        directory: where its files go.

    Raises:
        ValueError: another name.
        ImportError: the extra is not installed; the message names it.
    """
    if name == "jsonl":
        return JsonLinesLogger(Path(directory) / "optimizer.jsonl")
    if name == "tensorboard":
        return TensorBoardLogger(directory)
    if name == "wandb":
        return WandbLogger(directory=directory)
    raise ValueError(f"logger (={name!r}) must be one of {', '.join(LOGGER_NAMES)}.")


def check_extra(extra: str) -> None:
    """Raise ``ImportError`` unless the library of the extra "tensorboard" or "wandb" is there."""
    module, what = _EXTRAS[extra]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {extra}, which is not installed; "
            f"install it with: pip install 'titanmac-integration[{extra}]'"
        ) from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    plain = {name: _scalar(value) for name, value in metrics.items()}
    return {name: float(v) for name, v in plain.items() if isinstance(v, (int, float))}


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _json(_scalar(value)) for name, value in metrics.items()}


def _scalar(value: Any) -> Any:
    item = getattr(value, "item", None)  # scalars of numpy and torch
    return item() if callable(item) else value


def _json(value: Any) -> Any:
    if isinstance(value, float) and not abs(value) < float("inf"):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value
