"""Newborn blocks take the steps of a fresh parameter, on slow levels, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cms_topology import CMSBlockLinear, NewbornStepCorrection

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


class NewbornSteps:
    """`cms_topology.NewbornStepCorrection` with ages counted in updates of the block's level.

    The manager counts a block's age in steps. A block on a slow level has lived through fewer
    updates than steps, and Adam's bias correction is about updates.

    Args:
        layers: the sparse layers by name.
        groups: the optimizer's parameter groups; layers whose `values` they lack are left alone.
    """

    def __init__(
        self, layers: Mapping[str, CMSBlockLinear], groups: Sequence[dict[str, Any]]
    ) -> None:
        owner = {p: group for group in groups for p in group["params"]}
        self._layers = {name: layer for name, layer in layers.items() if layer.values in owner}
        self._periods = {n: int(owner[x.values]["period"]) for n, x in self._layers.items()}
        self._correction = NewbornStepCorrection()
        # kept, because the correction looks up anew what is not the tensor of the step before
        self._ages: dict[str, Tensor] = {}

    def correct(self, optimizer: DeepNestedOptimizer, step: int) -> None:
        """Correct the update that `optimizer` has just made at `step`, before ages advance."""
        due = [name for name, period in self._periods.items() if step % period == 0]
        if not due:
            return
        corrected = []
        for name, age in zip(due, self._next_ages(due), strict=True):
            layer, period = self._layers[name], self._periods[name]
            if period > 1:
                born = torch.div(step - age, period, rounding_mode="floor")
                torch.sub(step // period, born, out=age)
            corrected.append((layer.values, age, layer.num_live))
        self._correction.apply_all(optimizer, corrected)

    def _next_ages(self, names: Sequence[str]) -> list[Tensor]:
        """int32 [R, K] of each layer: block ages in steps, this one included."""
        counted = [self._layers[name].scorer.block_age for name in names]
        for name, age in zip(names, counted, strict=True):
            if name not in self._ages or self._ages[name].device != age.device:
                self._ages[name] = torch.empty_like(age)
        ages = [self._ages[name] for name in names]
        torch._foreach_copy_(ages, counted)
        torch._foreach_add_(ages, 1)
        return ages

    def state_dict(self) -> dict[str, float]:
        """Updates seen per layer name."""
        return self._correction.state_dict({x.values: n for n, x in self._layers.items()})

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where `state` was taken."""
        parameters: dict[str, Tensor] = {n: x.values for n, x in self._layers.items()}
        self._correction.load_state_dict(state, parameters)
