"""The steps of newborn blocks of many layers on a GPU, corrected by one kernel.

In a training that is not captured in a graph the host is what a step waits for. So what stays from
step to step is looked up once, and a step only compares identities.

Legend: L layers, R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cms_topology._adam_rules import grown_up


class YoungLaunch:
    """A launch that corrects layers of one parameter group; see `NewbornStepCorrection`.

    Args:
        layers: values [R, K, B, B], ages int32 [R, K] and live slots per row.
        states: Adam's of each layer's values.
        squares: the second moment that Adam divides by, [R, K, B, B] of each.
        lasts: float32 [L], Adam's steps when it last launched; kept.
        group: the parameter group.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor, int]],
        states: Sequence[dict[str, Any]],
        squares: Sequence[Tensor],
        lasts: Tensor,
        group: dict[str, Any],
    ) -> None:
        from cms_topology._birth_kernels import YoungBlocks

        means = [state["exp_avg"] for state in states]
        self._steps = [state["step"] for state in states]
        self._known = [
            (*layer, layer[0].data_ptr(), state, mean, step)
            for layer, state, mean, step in zip(layers, states, means, self._steps, strict=True)
        ]
        self._lasts, self._group = lasts, group
        self._young = YoungBlocks(
            [
                (values, mean, square, age, live)
                for (values, age, live), mean, square in zip(layers, means, squares, strict=True)
            ]
        )

    def holds(
        self, optimizer: torch.optim.Optimizer, layers: Sequence[tuple[Tensor, Tensor, int]]
    ) -> bool:
        """Whether it is for these layers, and all that it knows of them stands."""
        if len(layers) != len(self._known):
            return False
        states = optimizer.state
        for (values, age, live), known in zip(layers, self._known, strict=True):
            its, its_age, its_live, address, state, mean, step = known
            if (
                values is not its
                or age is not its_age
                or live != its_live
                or values.data_ptr() != address
                or states.get(values) is not state
                or state["exp_avg"] is not mean
                or state["step"] is not step
            ):
                return False
        return True

    def correct(self) -> None:
        """Launch, and remember the steps."""
        lasts, betas = self._lasts, self._group["betas"]
        steps = torch.stack(self._steps).to(lasts.device, torch.float32, non_blocking=True)
        self._young.correct(
            steps, lasts, self._group["lr"], betas, self._group["eps"], grown_up(betas)
        )
        lasts.copy_(steps)
