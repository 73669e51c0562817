"""Training on one task of a sequence, watched."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from torch import Tensor

from titanmac_integration._model._titanmac import TitanMAC
from titanmac_integration._optimizer._spikes import LossSpikeDetector
from titanmac_integration._training._trainer import PhaseReport, Trainer, TrainerCallback

from ._graphed import GraphedTrainer
from ._method import Method
from ._recording import Recording
from ._score import SPLITS, RetentionTask, Score
from ._settings import Setting

EARLY = (10, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500)
"""The damage is done early: steps after which old tasks are measured, besides every twelfth."""


class Scores(NamedTuple):
    """All tasks at one moment."""

    validation: list[Score]
    test: list[Score]


def score_all(model: TitanMAC, tasks: list[RetentionTask]) -> Scores:
    """Both held-out sets of every task."""
    return Scores(
        [task.score(model, "validation") for task in tasks],
        [task.score(model, "test") for task in tasks],
    )


class Watch(TrainerCallback):
    """Measures the tasks learned before, on their test sets, all along the training.

    At every twelfth of it also the new task, on both held-out sets: where it would best be stopped.

    Args:
        tasks: all of them.
        number: of the new one.
        steps: of its training.
    """

    def __init__(self, tasks: list[RetentionTask], number: int, steps: int) -> None:
        every = max(1, steps // 120 * 10 or steps // 12)
        self.old, self._new, self._first = tasks[:number], tasks[number], 0
        self._twelfths = {*range(every, steps, every), steps}
        self._when = {s for s in EARLY if s < steps} | self._twelfths
        self.path: list[dict[str, Any]] = []
        """Per measurement: step, value and nats of every old task."""
        self.curve: list[dict[str, Any]] = []
        """Per twelfth: step, nats of the new task on validation and on test data."""
        self.seconds = 0.0
        """Time that measuring took."""

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        self._first = trainer.step

    def on_step(self, trainer: Trainer, step: int) -> None:
        if step - self._first not in self._when or not self.old:
            return
        started = time.perf_counter()
        scores = [task.score(trainer.model) for task in self.old]
        self.path.append(
            {
                "step": step - self._first,
                "value": [s.value for s in scores],
                "nats": [s.nats for s in scores],
            }
        )
        if step - self._first in self._twelfths:
            validation, test = (self._new.score(trainer.model, s).nats for s in SPLITS)
            at = {"step": step - self._first, "validation_nats": validation, "nats": test}
            self.curve.append(at)
        if trainer.writer is not None:
            named = {
                f"eval/{t.name}/{t.metric}": s.value for t, s in zip(self.old, scores, strict=True)
            }
            trainer.writer.log(named, step)
        self.seconds += time.perf_counter() - started


class Decisions(TrainerCallback):
    """Looks at the training loss after every decision of the trainer's topology manager."""

    def __init__(self) -> None:
        self._spikes = LossSpikeDetector()
        self._first = 0

    @property
    def ratios(self) -> list[tuple[int, float]]:
        """Per decision: its step, and how far the loss rose; see ``LossSpikeDetector.ratios``."""
        self._spikes.flush()
        return self._spikes.ratios

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        self._first = trainer.step

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        self._loss = loss

    def on_step(self, trainer: Trainer, step: int) -> None:
        manager = trainer.manager
        if manager is None:
            return
        self._spikes.record(step - self._first, self._loss)
        last = manager.freeze_after
        if (last is None or step <= last) and 2 in manager.clock.due(manager.global_step):
            self._spikes.decided(step - self._first)


class Phase(NamedTuple):
    """What one training left behind, beside the model."""

    report: PhaseReport
    watch: Watch
    decisions: Decisions

    @property
    def seconds(self) -> float:
        """Training time, without measuring."""
        return self.report.seconds - self.watch.seconds


def train_phase(
    model: TitanMAC,
    setting: Setting,
    tasks: list[RetentionTask],
    number: int,
    seed: int,
    method: Method,
    *,
    progress: bool = False,
    recording: Recording | None = None,
) -> Phase:
    """Train ``model`` on task ``number`` with ``method`` and a fresh optimizer.

    Raises:
        NonFiniteLossError: the training broke down.
    """
    watch, decisions = Watch(tasks, number, setting.steps[number]), Decisions()
    config = setting.training_config(number, seed, method.learning_rate if number else None)
    method.plan(number, len(tasks))
    trainer = GraphedTrainer(
        model,
        config,
        writer=None if recording is None else recording.writer,
        callbacks=(method, watch, decisions, *([] if recording is None else [recording])),
        progress=progress,
        label=method.name if number else "",
    )
    if recording is not None:
        recording.attach(trainer)
    return Phase(trainer.fit(tasks[number], setting.steps[number]), watch, decisions)
