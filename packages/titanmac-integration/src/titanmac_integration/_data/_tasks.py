"""What a task is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Input for one training step, on the CPU."""

    input_ids: Tensor
    """int64 [batch, sequence]."""
    labels: Tensor
    """int64 [batch, sequence]; -100 where a token does not count. Not shifted."""


class Task(ABC):
    """Data to train on and a measure of success on data that training never sees."""

    name: str
    """Short name, used in tables and metrics."""
    metric: str
    """Name of the measure."""
    higher_is_better: bool
    """Whether a larger value of the measure is better."""
    chance: float
    """Value of the measure without any learning."""
    min_vocab_size: int = 256
    """Smallest vocabulary that holds the task's tokens."""

    @property
    def fingerprint(self) -> str:
        """Tells one set of training data from another, so that a run is continued with its own."""
        return self.name

    @abstractmethod
    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """A training batch of sequences no longer than ``seq_len``, drawn from ``generator``."""

    @abstractmethod
    def measure(self, model: nn.Module, device: torch.device) -> float:
        """The measure on held-out data. The model is in eval mode and gradients are off."""

    def evaluate(self, model: nn.Module) -> float:
        """The measure on held-out data: deterministic, and the model's mode is put back."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self.measure(model, device)
        finally:
            model.train(training)


class Mixture:
    """Batches from several tasks in turn, each step from one drawn by the generator."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks (=[]) must name at least one task.")
        self.tasks = tuple(tasks)

    @property
    def name(self) -> str:
        """Names of the parts, joined by "+"."""
        return "+".join(task.name for task in self.tasks)

    @property
    def fingerprint(self) -> str:
        """Those of the parts, joined by "+"."""
        return "+".join(task.fingerprint for task in self.tasks)

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """A batch of one of the tasks."""
        index = 0
        if len(self.tasks) > 1:
            index = int(torch.randint(len(self.tasks), (), generator=generator))
        return self.tasks[index].batch(batch_size, seq_len, generator)
