"""Methods that only touch the topology: freezing with growth, and swapping as RigL does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cms_topology import ScoringConfig, sparse_layers
from titanmac_integration._training._trainer import Trainer

from ._method import Method, Sampling
from ._plain import grow_at_random
from ._score import RetentionTask


class FreezeAndGrow(Method):
    """Freezes every block that is alive when a task ends, and grows others for the next one.

    Norms, biases, embedding and head go on learning. Blocks grow at random places, at zero.
    """

    name = "freeze-and-grow"
    dial_name = "none"
    arch = "spare"
    keeps = "blocks"

    def __init__(self, dial: float | None = None) -> None:
        super().__init__(dial)
        self._task, self._n_tasks = 0, 2
        self._frozen: list[tuple[nn.Parameter, torch.Tensor]] = []

    def plan(self, task: int, n_tasks: int) -> None:
        self._task, self._n_tasks = task, n_tasks

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        self.kept.append(None)

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        super().on_fit_start(trainer, task, steps)
        self._frozen = []
        for layer in sparse_layers(trainer.model).values():
            old = layer.values.detach()[:, : layer.num_live].clone()
            self._frozen.append((layer.values, old))
        grow_at_random(trainer, self._task, self._n_tasks)

    @torch.no_grad()
    def on_step(self, trainer: Trainer, step: int) -> None:
        for values, old in self._frozen:
            values[:, : old.shape[1]].copy_(old)


class RigL(Method):
    """Swaps blocks: drops the smallest weights, grows where the gradient is largest, at zero.

    Evci et al. 2020, "Rigging the lottery", on blocks. The dial is the share swapped per decision.
    """

    name = "rigl"
    dial_name = "share swapped"
    dials = (0.01, 0.05, 0.1, 0.3)
    default_dial = 0.1
    swaps = True

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        assert self.dial is not None
        for layer in sparse_layers(trainer.model).values():
            scorer: Any = layer.scorer
            scorer.config = ScoringConfig(
                keep_score="magnitude",
                candidate_score="gradient",
                swap_threshold=1.0,
                epsilon=0.0,
                max_swap_frac=self.dial,
                max_row_swap_frac=1.0,
                birth="zeros",
            )
