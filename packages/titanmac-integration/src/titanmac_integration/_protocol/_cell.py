"""One cell: a method with one dial on one seed, from the checkpoint after the first task on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from blockell_format.snapshots import write_atomically
from titanmac_integration._model._titanmac import TitanMAC, create_titanmac_model
from titanmac_integration._seeding import stream
from titanmac_integration._training._trainer import NonFiniteLossError

from ._method import FirstTask, Method, Sampling
from ._methods import Asked
from ._origin import origin
from ._overlap import block_overlap, usage_of, weights_of
from ._phase import Phase, Scores, score_all, train_phase
from ._recording import Recording
from ._records import record_id
from ._score import RetentionTask, Score
from ._settings import Setting


@dataclass
class Start:
    """The model after the first task; all methods of an architecture and seed begin here."""

    arch: str
    seed: int
    state: dict[str, Tensor]
    """Weights and topology, on the device."""
    untrained: Scores
    learned: Scores
    seconds: float
    """Time that learning the first task took."""
    kept: dict[str, list[Any]]
    """What methods kept of the first task, by what they keep."""


def learn_first(
    setting: Setting,
    tasks: list[RetentionTask],
    arch: str,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    *,
    progress: bool = False,
    recording: Recording | None = None,
) -> Start:
    """Train a fresh model on the first task, or load it from ``checkpoint`` if that exists.

    With a recording it is trained in any case.
    """
    model = create_titanmac_model(setting.config(arch), seed=seed, device=device)
    untrained = score_all(model, tasks)
    seconds = 0.0
    if recording is None and checkpoint is not None and checkpoint.exists():
        model.load_state_dict(load(checkpoint.read_bytes()))
    else:
        method = FirstTask(swaps=setting.first_swaps)
        phase = train_phase(
            model, setting, tasks, 0, seed, method, progress=progress, recording=recording
        )
        seconds = phase.seconds
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
            write_atomically(checkpoint, save(tensors))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Start(arch, seed, state, untrained, score_all(model, tasks), seconds, {})


def run_cell(
    setting: Setting,
    tasks: list[RetentionTask],
    asked: Asked,
    start: Start,
    device: torch.device,
    *,
    progress: bool = False,
    recording: Recording | None = None,
) -> dict[str, Any]:
    """Train on the second and all later tasks; returns the cell's record.

    A training that breaks down gives a record whose "failed" says why.
    """
    method = asked.make()
    model = create_titanmac_model(setting.config(asked.arch), seed=start.seed, device=device)
    model.load_state_dict(start.state)
    moments = [start.untrained, start.learned]
    phases: list[Phase] = []
    failed = None
    watch = _Overlap(setting, tasks, model, start)
    try:
        for number in range(1, len(tasks)):
            _remember(method, model, setting, tasks, number - 1, start)
            phase = train_phase(
                model,
                setting,
                tasks,
                number,
                start.seed,
                method,
                progress=progress,
                recording=recording,
            )
            phases.append(phase)
            moments.append(score_all(model, tasks))
    except NonFiniteLossError as error:
        failed = str(error)
    return {
        "id": record_id(setting.key, asked, start.seed),
        "setting": setting.name,
        "setting_key": setting.key,
        "method": asked.method,
        "arch": asked.arch,
        "dial": method.dial if asked.dial is None else asked.dial,
        "dial_name": method.dial_name,
        "rate": asked.rate,
        "seed": start.seed,
        "failed": failed,
        "uses_old_data": method.uses_old_data,
        "lr": [
            setting.training_config(i, 0, method.learning_rate if i else None).lr
            for i in range(len(tasks))
        ],
        **_about(setting, tasks),
        **_figures(moments, phases),
        "kept_bytes": method.kept_bytes,
        "first_task_seconds": start.seconds,
        "parameters": model.num_parameters,
        "method_metrics": method.metrics(),
        "overlap": None if failed else watch.measure(model),
        "settings": asdict(setting),
        **origin(device),
    }


class _Overlap:
    """Remembers what the first task uses, to compare with the second."""

    def __init__(
        self, setting: Setting, tasks: list[RetentionTask], model: TitanMAC, start: Start
    ) -> None:
        self._task = tasks[1]
        self._sampling = Sampling(
            setting.batch_size[1], setting.seq_len, stream(start.seed, "overlap")
        )
        self._before = weights_of(model)
        if self._before and "usage" not in start.kept:
            first = self._sampling._replace(batch_size=setting.batch_size[0])
            start.kept["usage"] = [usage_of(model, tasks[0], first)]
        self._first = start.kept.get("usage", [None])[0]

    def measure(self, model: TitanMAC) -> dict[str, Any] | None:
        """None for a dense model."""
        if not self._before:
            return None
        second = usage_of(model, self._task, self._sampling)
        return block_overlap(model, self._first, second, self._before)


def _remember(
    method: Method,
    model: TitanMAC,
    setting: Setting,
    tasks: list[RetentionTask],
    number: int,
    start: Start,
) -> None:
    generator = stream(start.seed, f"remember/{number}")
    sampling = Sampling(setting.batch_size[number], setting.seq_len, generator)
    if number == 0 and method.keeps in start.kept:
        method.share(start.kept[method.keeps])
        return
    method.remember(model, tasks[number], sampling)
    if number == 0:
        start.kept[method.keeps] = list(method.kept)


def _about(setting: Setting, tasks: list[RetentionTask]) -> dict[str, Any]:
    return {
        "tasks": [task.name for task in tasks],
        "metrics": [task.metric for task in tasks],
        "chance": [task.chance for task in tasks],
        "perfect": [task.perfect for task in tasks],
        "tested_on": [_answers(task) for task in tasks],
        "steps": list(setting.steps),
        "tokens_per_step": [size * setting.seq_len for size in setting.batch_size],
    }


def _answers(task: RetentionTask) -> int:
    """Answers, or windows of text, of the test set."""
    rows = task.rows("test")
    if task.metric == "exact_match":
        return int(rows.answers.max()) + 1
    return len(rows.input_ids)


def _figures(moments: list[Scores], phases: list[Phase]) -> dict[str, Any]:
    def table(split: str, part: str) -> list[list[float]]:
        rows: list[list[Score]] = [getattr(moment, split) for moment in moments]
        return [[getattr(score, part) for score in row] for row in rows]

    return {
        "matrix": table("test", "value"),
        "nats": table("test", "nats"),
        "validation_matrix": table("validation", "value"),
        "validation_nats": table("validation", "nats"),
        "path": [phase.watch.path for phase in phases],
        "curve": [phase.watch.curve for phase in phases],
        "seconds": [phase.seconds for phase in phases],
        "swap_rates": [phase.report.swap_rates for phase in phases],
        "loss_ratios": [phase.decisions.ratios for phase in phases],
        "peak_bytes": max((phase.report.peak_memory_bytes for phase in phases), default=None),
    }
