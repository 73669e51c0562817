"""Tasks that are scored on two held-out sets: one to choose dials on, one to report.

Legend: N sequences, T tokens.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from titanmac_integration._data._tasks import Task
from titanmac_integration._labels import IGNORE_INDEX

SPLITS = ("validation", "test")
EVAL_BATCH = 512


class Score(NamedTuple):
    """How well a model does a task."""

    value: float
    """The task's measure."""
    nats: float
    """Mean negative log-likelihood of the tokens that count."""


class EvalRows(NamedTuple):
    """Held-out sequences, on the CPU."""

    input_ids: Tensor
    """int64 [N, T]."""
    labels: Tensor
    """int64 [N, T]; -100 where a token does not count. Not shifted."""
    answers: Tensor
    """int64 [N, T]: number of the answer a token belongs to, -1 where it does not count."""


class RetentionTask(Task):
    """A task of the protocol: validation and test data, and how much training data it has.

    ``metric`` is "exact_match" (share of answers right in every token) or "bits_per_byte".
    """

    perfect: float
    """Value of the measure for a perfect model."""
    train_tokens_total: int
    """Tokens of the training data."""

    @abstractmethod
    def rows(self, split: str) -> EvalRows:
        """Held-out sequences of "validation" or "test"."""

    def score(self, model: nn.Module, split: str = "test") -> Score:
        """Measure and loss on a held-out set; deterministic, one forward pass per sequence.

        A token is right when it is the most probable one after the true tokens before it. For a
        whole answer that is exactly what greedy generation measures: it is right in every token if
        and only if each one is the most probable after the (then identical) true ones.
        """
        if split not in SPLITS:
            raise ValueError(f"split (={split!r}) must be one of {', '.join(SPLITS)}.")
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return _score(model, self.rows(split), self.metric)
        finally:
            model.train(training)

    def measure(self, model: nn.Module, device: torch.device) -> float:
        """The measure on the test set."""
        return _score(model, self.rows("test"), self.metric).value

    def normalised(self, value: float) -> float:
        """``value`` on the scale where chance is 0 and perfect is 1."""
        return (value - self.chance) / (self.perfect - self.chance)


def _score(model: nn.Module, rows: EvalRows, metric: str) -> Score:
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    wrong = torch.zeros(int(rows.answers.max()) + 1, device=device)
    for input_ids, labels, answers in zip(*(x.split(EVAL_BATCH) for x in rows), strict=True):
        logits = model(input_ids.to(device))["logits"][:, :-1].float()
        targets, groups = labels[:, 1:].to(device), answers[:, 1:].to(device)
        nats += functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        ).double()
        counts = targets != IGNORE_INDEX
        count += counts.sum()
        missed = (logits.argmax(-1) != targets)[counts].float()
        wrong.index_add_(0, groups[counts], missed)
    mean = (nats / count).item()
    if metric == "exact_match":
        return Score((wrong == 0).double().mean().item(), mean)
    return Score(mean / torch.log(torch.tensor(2.0)).item(), mean)
