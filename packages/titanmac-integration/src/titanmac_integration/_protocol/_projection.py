"""Our method: updates projected away from the old tasks' inputs, and growth for the new one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cms_topology import (
    Probes,
    RetentionGuard,
    consolidate,
    grow_for_task,
    make_probes,
    sparse_layers,
)
from titanmac_integration._training import PhaseReport, Trainer

from ._graphed import GraphedTrainer
from ._method import Method, Sampling, device_of, task_batches, written_by
from ._plain import density_after
from ._score import RetentionTask


class Projection(Method):
    """`cms_topology.RetentionGuard`, every ten steps; without a dial it finds its own strength.

    Args:
        dial: a fixed eps of the projection, and nothing else; None lets the drift budget, steered
            by the probes, choose the strength.
    """

    name = "ours"
    dial_name = "eps"
    dials = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1, 3e-1)
    keeps = "covariance"
    batches = 40
    """Training batches that the task is consolidated on."""
    probes = 32
    """Sequences the model writes itself, on which the drift is watched; 0 for an open loop."""
    consolidation: ClassVar[dict[str, Any]] = {}
    """Further arguments of ``consolidate``."""
    options: ClassVar[dict[str, Any]] = {"tolerance": 0.01, "every": 10}
    """Further arguments of ``RetentionGuard``."""

    def __init__(self, dial: float | None = None) -> None:
        super().__init__(dial)
        self._guard: RetentionGuard | None = None
        self._by_hand = False
        self._last: dict[str, float] = {}

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        batches = task_batches(task, sampling, self.batches, device_of(model))
        previous = self.kept[-1] if self.kept else None
        probes = self._make_probes(model, batches[0])
        memory = consolidate(
            model, batches, task=task.name, previous=previous, probes=probes, **self.consolidation
        )
        self.kept = [memory]

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        if not self.kept:
            return
        self._grow(trainer)
        how: dict[str, Any] = {} if self.dial is None else {"drift": None, "eps": self.dial}
        # the hook of an optimizer whose steps are captured in a graph would not be called
        self._by_hand = isinstance(trainer, GraphedTrainer) and trainer.graphed
        self._guard = RetentionGuard(
            trainer.model,
            None if self._by_hand else trainer.optimizer,
            self.kept[-1],
            **{**how, **self.options},
        )

    def on_step(self, trainer: Trainer, step: int) -> None:
        if self._guard is not None and self._by_hand:
            self._guard.step()

    def _make_probes(self, model: nn.Module, batch: dict[str, Tensor]) -> Probes | None:
        if not self.probes:
            return None
        written = written_by(model, batch, self.probes)
        try:
            return make_probes(model, written)
        except ValueError:  # hardly anything was learned: then all answers count
            return make_probes(model, written, confidence=0.0)

    def on_fit_end(self, trainer: Trainer, report: PhaseReport) -> None:
        if self._guard is not None:
            self._last = {key: float(value) for key, value in self._guard.metrics().items()}
            self._guard.remove()
            self._guard = None

    def metrics(self) -> dict[str, float]:
        return self._last

    def _grow(self, trainer: Trainer) -> None:
        """The static form grows nothing."""


class GrowingProjection(Projection):
    """The same, with blocks grown for every new task into capacity that was left free."""

    name = "ours-grown"
    arch = "spare"
    prefer = "energy"
    """Where to grow; see ``grow_for_task``."""

    def __init__(self, dial: float | None = None) -> None:
        super().__init__(dial)
        self._task, self._n_tasks = 0, 2

    def plan(self, task: int, n_tasks: int) -> None:
        self._task, self._n_tasks = task, n_tasks

    def _grow(self, trainer: Trainer) -> None:
        layer = next(iter(sparse_layers(trainer.model).values()))
        grow_for_task(
            trainer.model,
            self.kept[-1],
            density_after(layer, self._task, self._n_tasks),
            prefer=self.prefer,
            optimizers=[trainer.optimizer],
            generator=torch.Generator().manual_seed(trainer.config.seed),
        )


class DenseProjection(Projection):
    """Projection on a dense model of as many parameters (GPM, Saha 2021; Adam-NSCL, Wang 2021)."""

    name = "dense-projection"
    arch = "narrow"
