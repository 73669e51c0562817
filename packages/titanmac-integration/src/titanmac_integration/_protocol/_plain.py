"""Plain training on the new task: what every method is compared with."""

from __future__ import annotations

import torch

from cms_topology import CMSBlockLinear, sparse_layers
from titanmac_integration._training._trainer import Trainer

from ._method import Method


class FineTuning(Method):
    """Nothing protects the old task; the dial is the learning rate.

    Where capacity was left free, blocks grow at random places, at zero, so that it ends with as
    many weights as the methods that grow.
    """

    name = "fine-tuning"
    dial_name = "lr"
    dials: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3)

    def __init__(self, dial: float | None = None) -> None:
        super().__init__(dial)
        self._task, self._n_tasks = 0, 2

    @property
    def learning_rate(self) -> float | None:
        return self.rate if self.dial is None else self.dial

    def plan(self, task: int, n_tasks: int) -> None:
        self._task, self._n_tasks = task, n_tasks

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        grow_at_random(trainer, self._task, self._n_tasks)


class LowRate(FineTuning):
    """Fine-tuning at learning rates so low that little is forgotten, and little learned."""

    name = "low-rate"
    dials = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
    default_dial = 3e-5


def grow_at_random(trainer: Trainer, task: int, n_tasks: int) -> None:
    """Bring free capacity to life for task number ``task``, at random places, at zero."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    for layer in sparse_layers(trainer.model).values():
        layer.grow(density_after(layer, task, n_tasks), generator)


def density_after(layer: CMSBlockLinear, task: int, n_tasks: int) -> float:
    """Density that a layer grows to for task number ``task`` (from 1), all spare used by the last.

    Spare capacity is shared out evenly over the tasks that are still to come.
    """
    spare = layer.K - layer.num_live
    return (layer.num_live + round(spare / max(1, n_tasks - task))) / layer.C
