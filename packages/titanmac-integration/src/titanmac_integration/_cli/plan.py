"""What ``titanmac train`` is to do: from flags, or from the checkpoint it continues."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._data._files import load_data
from titanmac_integration._data._registry import make_task
from titanmac_integration._data._tasks import Task
from titanmac_integration._data._tokenizer import BYTES, make_tokenizer
from titanmac_integration._presets import RUN_PRESETS
from titanmac_integration._run_dir import TOKENIZER_FILE
from titanmac_integration._training._checkpoint import (
    CHECKPOINTS_DIR,
    CheckpointStore,
    read_training_info,
)
from titanmac_integration._training._config import TrainingConfig

from .flags import given_fields, model_changes, model_config, training_config

LATEST = "latest"
OPTIONS: Mapping[str, Any] = {
    "preset": "demo",
    "checkpoint_every": 500,
    "keep_checkpoints": 2,
    "tensorboard": False,
    "wandb": None,
}
"""Flags that are part of a run like its settings, with their defaults."""


@dataclass(frozen=True)
class TrainPlan:
    """A training, all settings known and checked."""

    model: TitanMACConfig
    training: TrainingConfig
    tasks: Sequence[Task]
    steps: int
    source: dict[str, Any]
    """What the tasks are made of, for JSON: ``tasks``, ``data``, ``tokenizer``, ``held_out``."""
    options: dict[str, Any]
    """A value for each of ``OPTIONS``."""
    resume: Path | None = None
    """The checkpoint to continue from."""
    before: dict[str, float] = field(default_factory=dict)
    """Measures of the untrained model, if the checkpoint has them."""


def make_plan(arguments: argparse.Namespace) -> TrainPlan:
    """Read the flags and, with ``--resume``, the checkpoint."""
    return _resumed(arguments) if arguments.resume is not None else _new(arguments)


def _new(arguments: argparse.Namespace) -> TrainPlan:
    options = _options(arguments, {})
    preset = RUN_PRESETS[options["preset"]]
    model = model_config(arguments, options["preset"])
    training = training_config(arguments, options["preset"])
    data = [str(path.resolve()) for path in arguments.data or ()]
    if arguments.held_out is not None and not data:
        raise ValueError(
            f"--held-out (={arguments.held_out}) goes with --data; the built-in tasks have their "
            "own."
        )
    names = arguments.tasks or (() if data else preset.tasks[:1])
    source = {
        "tasks": list(dict.fromkeys(names)),
        "data": data,
        "tokenizer": arguments.tokenizer or BYTES,
        "held_out": 0.1 if arguments.held_out is None else arguments.held_out,
    }
    tasks, vocab_size = make_tasks(source, eval_length=training.seq_len - 1)
    if "vocab_size" not in given_fields(arguments, TitanMACConfig):
        model = model.replace(vocab_size=max(model.vocab_size, vocab_size))
    steps = preset.steps[0] if arguments.steps is None else arguments.steps
    return TrainPlan(model, training, tasks, _checked_steps(steps), source, options)


def _resumed(arguments: argparse.Namespace) -> TrainPlan:
    store = CheckpointStore(arguments.out / CHECKPOINTS_DIR)
    path = store.path(None if arguments.resume == LATEST else int(arguments.resume))
    info = read_training_info(path)
    options = _options(arguments, info)
    if options["preset"] != info.get("preset", options["preset"]):
        raise ValueError(
            f"--preset (={options['preset']}) differs from that of the run (={info['preset']}); "
            "leave it out, all settings are the run's."
        )
    # what the flags change is compared, field by field, when the checkpoint is loaded
    changes = model_changes(arguments)
    model = TitanMACConfig.from_dict({**info["model"], **changes})
    training = {**info["training"], **given_fields(arguments, TrainingConfig)}
    source = dict(info["source"])
    if arguments.data:
        source["data"] = [str(data.resolve()) for data in arguments.data]
    if arguments.tasks:
        source["tasks"] = list(dict.fromkeys(arguments.tasks))
    if arguments.held_out is not None:
        source["held_out"] = arguments.held_out
    source["tokenizer"] = arguments.tokenizer or stored_tokenizer(arguments.out)
    config = TrainingConfig.from_dict(training)
    tasks, _ = make_tasks(source, eval_length=config.seq_len - 1)
    steps = info["steps"] if arguments.steps is None else arguments.steps
    before = dict(info.get("before", {}))
    return TrainPlan(model, config, tasks, _checked_steps(steps), source, options, path, before)


def make_tasks(source: dict[str, Any], *, eval_length: int) -> tuple[list[Task], int]:
    """The tasks of a plan's source, and how large a vocabulary they need."""
    tokenizer = make_tokenizer(source["tokenizer"])
    if source["tasks"] and source["tokenizer"] != BYTES:
        raise ValueError(
            f"--tokenizer (={source['tokenizer']}) goes with --data; the built-in tasks "
            f"(={' '.join(source['tasks'])}) are made of bytes."
        )
    tasks = [make_task(name) for name in source["tasks"]]
    if source["data"]:
        tasks += load_data(
            source["data"], tokenizer, held_out=source["held_out"], eval_length=eval_length
        )
    return tasks, max(tokenizer.vocab_size, *(task.min_vocab_size for task in tasks))


def stored_tokenizer(run_dir: Path) -> str:
    """The tokenizer of a run: its own copy of the file, or bytes."""
    path = run_dir / TOKENIZER_FILE
    return str(path) if path.exists() else BYTES


def _options(arguments: argparse.Namespace, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, else what the run has."""
    options = {name: saved.get(name, default) for name, default in OPTIONS.items()}
    given = {name: getattr(arguments, name) for name in OPTIONS}
    return options | {name: value for name, value in given.items() if value is not None}


def _checked_steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"--steps (={steps}) must be at least 1.")
    return steps
