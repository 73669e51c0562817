"""What a method against forgetting is: a callback of the trainer that remembers between tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cms_topology import sample_tokens
from titanmac_integration._training._trainer import Trainer, TrainerCallback

from ._score import RetentionTask


class Sampling(NamedTuple):
    """How a method may draw data of the task that has just been learned."""

    batch_size: int
    """Sequences per batch."""
    seq_len: int
    """Tokens per sequence."""
    generator: torch.Generator
    """Source of randomness, on the CPU."""


class Method(TrainerCallback):
    """Base of all methods: does nothing.

    Between two tasks :meth:`remember` is called, the only moment at which the old task's data may
    be seen (methods that break this rule say so). While the next task is trained, the trainer's
    events are called. What is kept lies in ``kept``, never changed afterwards: cells that differ
    only in the dial share it.

    Args:
        dial: strength of the method; None takes ``default_dial``.
    """

    name = ""
    dial_name = ""
    """What the dial is."""
    default_dial: float | None = None
    dials: tuple[float, ...] = ()
    """Values of the dial that a sweep tries."""
    arch = "sparse"
    """Architecture the method runs on when none is asked for."""
    keeps = ""
    """What is kept after a task, the same for all methods that keep the same; "" for nothing."""
    swaps: bool = False
    """Whether the topology's decisions go on."""
    uses_old_data = False
    """Whether data of old tasks is used while a new one is trained."""

    def __init__(self, dial: float | None = None) -> None:
        self.dial = self.default_dial if dial is None else dial
        self.rate: float | None = None
        """Learning rate asked for, of the tasks after the first; None leaves the setting's."""
        self.kept: list[Any] = []
        """One entry per task learned."""

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the tasks after the first; None leaves the setting's."""
        return self.rate

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept between tasks, beside the model."""
        return sum(_bytes(entry) for entry in self.kept)

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        """Keep what the method needs of ``task``, which ``model`` has just learned."""

    def share(self, kept: list[Any]) -> None:
        """Take over what another cell kept of the same model and tasks."""
        self.kept = copy.copy(kept)

    def plan(self, task: int, n_tasks: int) -> None:
        """Training on task number ``task`` (from 0) out of ``n_tasks`` is about to begin."""

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        if self.swaps or trainer.manager is None:
            return
        if trainer.writer is None:
            trainer.manager = None
        else:
            trainer.manager.freeze_after = 0  # kept for its snapshots

    def metrics(self) -> dict[str, float]:
        """Figures of the method's own about the last task."""
        return {}


class FirstTask(Method):
    """Plain training, on the first task.

    Args:
        swaps: whether the topology's decisions go on, over the first four fifths of the steps;
            then what was swapped last can still be learned.
    """

    name = "first-task"

    def __init__(self, *, swaps: bool) -> None:
        super().__init__()
        self.swaps = swaps

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        if self.swaps and trainer.manager is not None:
            trainer.manager.freeze_after = trainer.step + 4 * steps // 5


def task_batches(
    task: RetentionTask, sampling: Sampling, n_batches: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Training batches of a task as keyword arguments of the model, on ``device``."""
    batches = []
    for _ in range(n_batches):
        batch = task.batch(sampling.batch_size, sampling.seq_len, sampling.generator)
        batches.append({"input_ids": batch.input_ids.to(device), "labels": batch.labels.to(device)})
    return batches


BEGINNING = 4
"""Symbols to let a model begin with that keeps several tasks. From the first symbol on it mostly
writes what it rehearses: one of twenty sequences was of a second task in the symbols of the first.
"""


def written_by(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    rows: int,
    beginning: int = 1,
    length: int | None = None,
) -> Tensor:
    """Sequences that the model writes itself: int64 [rows, length], as long as in ``batch``.

    Drawn token by token from its predictions, after the first ``beginning`` tokens of a sequence of
    the batch, and only from tokens that occur in the batch: what follows a token that the task
    never uses is no knowledge of it. Nothing else of the batch is used.
    """
    first = batch["input_ids"][:, :beginning].unique(dim=0)
    used = batch["input_ids"].unique()

    def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens)["logits"][:, -1:]  # the others are not drawn from
        allowed = torch.full_like(logits, -torch.inf)
        allowed[..., used] = logits[..., used]
        return allowed

    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(first), (rows,), generator=generator).to(first.device)
    training = model.training
    model.eval()
    try:
        length = batch["input_ids"].shape[1] if length is None else length
        return sample_tokens(model, first[chosen], length, logits_fn=logits_of, generator=generator)
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _bytes(entry: Any) -> int:
    if isinstance(entry, Tensor):
        return entry.numel() * entry.element_size()
    if isinstance(entry, dict):
        return sum(map(_bytes, entry.values()))
    if isinstance(entry, (list, tuple)):
        return sum(map(_bytes, entry))
    return int(getattr(entry, "num_bytes", 0))
