"""Methods that go on training on something of the old task: generated, kept, or all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cms_topology import Rehearsal
from titanmac_integration._training._trainer import Trainer

from ._graphed import GraphedTrainer
from ._method import Method, Sampling, device_of, task_batches, written_by
from ._score import RetentionTask

REAL_SHARE = 0.01


class RehearsingMethod(Method):
    """Every step adds dial * loss of 16 kept sequences per old task to the new task's loss."""

    dial_name = "weight"
    dials = (0.01, 0.03, 0.1, 0.3, 1.0)
    default_dial = 0.3

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        assert self.dial is not None
        self._rehearsal = Rehearsal(
            trainer.model, self.kept, weight=self.dial, generator=captured_generator(trainer)
        )

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        self._rehearsal.loss().backward()


def captured_generator(trainer: Trainer) -> torch.Generator:
    """A generator of the device, which a captured step may draw from."""
    generator = torch.Generator(trainer.device).manual_seed(trainer.config.seed)
    if isinstance(trainer, GraphedTrainer) and trainer.graphed:
        trainer.generators.append(generator)
    return generator


class SelfRehearsal(RehearsingMethod):
    """Rehearses sequences that the model itself wrote at the end of the old task; no data is kept.

    See ``written_by``.
    """

    name = "self-rehearsal"
    keeps = "generated"
    rows = 1024
    """Sequences written."""

    @torch.no_grad()
    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        batch = task_batches(task, sampling, 1, device_of(model))[0]
        tokens = written_by(model, batch, self.rows)
        self.kept.append({"input_ids": tokens, "labels": tokens})


class RealRehearsal(RehearsingMethod):
    """Rehearses one percent of the old task's training data, which is kept."""

    name = "real-rehearsal"
    keeps = "data"
    uses_old_data = True

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        rows = max(1, math.ceil(REAL_SHARE * task.train_tokens_total / sampling.seq_len))
        batch = task_batches(task, sampling._replace(batch_size=rows), 1, device_of(model))[0]
        self.kept.append(batch)


class Joint(Method):
    """Trains on all tasks together: a fresh batch of every old task per step. The upper bound."""

    name = "joint"
    dial_name = "weight"
    dials = (1.0,)
    default_dial = 1.0
    keeps = "task"
    uses_old_data = True

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        self.kept.append((task, sampling))

    @property
    def kept_bytes(self) -> int:
        """All training data, as bytes of text."""
        return sum(task.train_tokens_total for task, _ in self.kept)

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        self._now = [self._draw(kept[0], kept[1], trainer.device) for kept in self.kept]

    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        assert self.dial is not None
        for batch in self._now:
            (self.dial * trainer.model(**batch)["loss"]).backward()

    def on_step(self, trainer: Trainer, step: int) -> None:
        # in place, because a captured step reads from where it read first
        for batch, kept in zip(self._now, self.kept, strict=True):
            for name, tensor in self._draw(kept[0], kept[1], trainer.device).items():
                batch[name].copy_(tensor)

    @staticmethod
    def _draw(task: RetentionTask, sampling: Sampling, device: torch.device) -> dict[str, Tensor]:
        half = sampling._replace(batch_size=max(1, sampling.batch_size // 2))
        return task_batches(task, half, 1, device)[0]
