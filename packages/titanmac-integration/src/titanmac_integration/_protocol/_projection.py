"""Our method: updates projected away from the old tasks' inputs, and growth for the new one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cms_topology import (
    Probes,
    Rehearsal,
    RetentionGuard,
    consolidate,
    grow_for_task,
    make_probes,
    sparse_layers,
    with_answers,
)
from titanmac_integration._training._trainer import PhaseReport, Trainer

from ._graphed import GraphedTrainer
from ._method import BEGINNING, Method, Sampling, device_of, task_batches, written_by
from ._plain import density_after
from ._rehearsal import SelfRehearsal, captured_generator
from ._score import RetentionTask


class Projection(Method):
    """`cms_topology.RetentionGuard`, every ten steps; it finds its strength by itself.

    Args:
        dial: nats of divergence that the answers to the probes may reach; None takes the guard's
            default.
    """

    name = "ours"
    dial_name = "tolerance"
    dials = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    may_be_zero: ClassVar[bool] = False
    """Whether the dial may be 0."""
    keeps = "covariance"
    batches = 40
    """Training batches that the task is consolidated on."""
    probes = 32
    """Sequences the model writes itself, on which the drift is watched; 0 for an open loop."""
    consolidation: ClassVar[dict[str, Any]] = {}
    """Further arguments of ``consolidate``."""
    options: ClassVar[dict[str, Any]] = {"every": 10}
    """Further arguments of ``RetentionGuard``."""

    def __init__(self, dial: float | None = None) -> None:
        super().__init__(dial)
        if dial is not None and not (dial > 0 or (dial == 0 and self.may_be_zero)):
            least = "0 or more" if self.may_be_zero else "greater than 0"
            raise ValueError(
                f"{self.dial_name} (={dial}) of method {self.name} must be {least}; leave it "
                f"out or give one of {', '.join(f'{d:g}' for d in self.dials)}."
            )
        self._guard: RetentionGuard | None = None
        self._by_hand = False
        self._last: dict[str, float] = {}

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        batches = task_batches(task, sampling, self.batches, device_of(model))
        previous = self.kept[0] if self.kept else None
        probes = self._make_probes(model, batches[0])
        memory = consolidate(
            model, batches, task=task.name, previous=previous, probes=probes, **self.consolidation
        )
        self.kept = [memory, *self.kept[1:]]

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        if not self.kept:
            return
        self._grow(trainer)
        # the hook of an optimizer whose steps are captured in a graph would not be called
        self._by_hand = isinstance(trainer, GraphedTrainer) and trainer.graphed
        self._guard = RetentionGuard(
            trainer.model,
            None if self._by_hand else trainer.optimizer,
            self.kept[0],
            **self._strength(),
            **self.options,
        )

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        if self._guard is not None and self._by_hand:
            self._guard.before_step()

    def on_step(self, trainer: Trainer, step: int) -> None:
        if self._guard is not None and self._by_hand:
            self._guard.step()

    def _strength(self) -> dict[str, Any]:
        """Arguments of ``RetentionGuard`` that the dial sets."""
        return {"tolerance": self.dial}

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
        layers = list(sparse_layers(trainer.model).values())
        if not layers:
            return  # a dense network has nothing to grow
        grow_for_task(
            trainer.model,
            self.kept[0],
            density_after(layers[0], self._task, self._n_tasks),
            prefer=self.prefer,
            optimizers=[trainer.optimizer],
            generator=torch.Generator().manual_seed(trainer.config.seed),
        )


class DampedProjection(GrowingProjection):
    """The growing form, with gradients damped, too, before the optimizer sees them.

    Then the weights move less between two projections, and learning rates may be higher.
    """

    name = "ours-damped"
    options: ClassVar[dict[str, Any]] = {"every": 10, "gradients": True}


class RehearsingProjection(GrowingProjection):
    """The growing form, which also rehearses what the model wrote after every old task.

    Updates are damped by a fixed eps, without a trust region: damping holds the old answers while
    the new task begins, where rehearsal alone loses them, and rehearsal repairs what leaks through
    later, so that the weights may go wherever both tasks allow. No data is kept.
    """

    name = "ours-rehearsing"
    dial_name = "eps"
    dials = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    default_dial = 1e-2
    keeps = "covariance and generated"
    probes = 0
    consolidation: ClassVar[dict[str, Any]] = {"usage": "none", "sensitivity_batches": 0}
    """Without a drift budget nothing asks how much drift the loss bears."""
    weight: ClassVar[float] = 0.3
    """Of the rehearsed loss, per old task."""

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        super().remember(model, task, sampling)
        batch = task_batches(task, sampling, 1, device_of(model))[0]
        self.kept = [*self.kept, self._write(model, batch, sampling.seq_len)]

    def _write(self, model: nn.Module, batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        tokens = written_by(model, batch, SelfRehearsal.rows)
        return {"input_ids": tokens, "labels": tokens}

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        self._rehearsal = Rehearsal(
            trainer.model,
            self.kept[1:],
            weight=self.weight,
            generator=captured_generator(trainer),
        )

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        self._rehearsal.loss().backward()
        super().on_backward(trainer, loss)

    def _strength(self) -> dict[str, Any]:
        return {"drift": None, "eps": self.dial}


class RecallingProjection(RehearsingProjection):
    """The same, going over the distributions that the model had, not the draws that it wrote.

    Where nothing has changed they have no gradient, so they may weigh more, and then the updates
    need less damping. Made for many tasks: each sequence begins with a few symbols of the task.
    """

    name = "ours-recalling"
    default_dial = 1e-1
    keeps = "covariance and answers"
    weight = 3.0

    def _write(self, model: nn.Module, batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        # of one length, so that all tasks are gone over in one pass
        tokens = written_by(model, batch, SelfRehearsal.rows, BEGINNING, length)
        return with_answers(model, {"input_ids": tokens})


class ReleasingProjection(RecallingProjection):
    """That with weak damping which lets go in the course of every task."""

    name = "ours-releasing"
    default_dial = 0.3

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        self._steps = steps
        super().on_fit_start(trainer, task, steps)

    def _strength(self) -> dict[str, Any]:
        return {**super()._strength(), "release": self._steps}


class FixedEps(Projection):
    """Every update is multiplied by eps (K + eps I)^-1 with one eps for all time, nothing else."""

    name = "ours-fixed-eps"
    dial_name = "eps"
    dials = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1, 3e-1)
    default_dial = 1e-2
    may_be_zero = True
    keeps = "covariance, no probes"
    probes = 0

    def _strength(self) -> dict[str, Any]:
        return {"drift": None, "eps": self.dial}


class DenseProjection(FixedEps):
    """That on a dense model of as many parameters (GPM, Saha 2021; Adam-NSCL, Wang 2021)."""

    name = "dense-projection"
    arch = "narrow"
