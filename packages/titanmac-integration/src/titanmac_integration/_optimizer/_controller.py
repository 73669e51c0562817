"""The nested controller: a learning-rate factor per parameter group, learned while training.

Legend: G parameter groups, F statistics, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

NUM_STATISTICS = 4


@dataclass(frozen=True, kw_only=True)
class LearningRateController:
    """Settings of the nested controller.

    A small network maps log-scaled statistics of a group to a factor in [low, high] on the group's
    learning rate: `low (high / low)^sigmoid(z)`; it starts at 1 everywhere. It has its own inner
    objective and frequency: every `period` steps it descends the loss after the last step as a
    function of that step's factor. The derivative by log(factor) is -lr <g_t, d_{t-1}>, g_t the
    gradient now and d_{t-1} the direction taken (Baydin et al. 2018, "Online learning rate
    adaptation with hypergradient descent"); it is used normalised, as a cosine. `meta_update`
    trains it further, through unrolled steps.

    The statistics, as powers of ten: root mean square of the gradient, of the parameters, ratio of
    the lengths of Adam's momentum and of the root of its second moment (how much of the gradient is
    signal), and the group's steps.

    Raises:
        ValueError: a setting outside its range.
    """

    hidden: int = 8
    """Width H of the network."""
    lr: float = 0.5
    """Learning rate of the inner objective; 0 leaves the network to `meta_update` alone."""
    period: int = 10
    """Steps between two changes of the factors."""
    low: float = 0.1
    """Smallest factor, in [0.1, 1)."""
    high: float = 2.0
    """Largest factor, in (1, 2]."""
    seed: int = 0
    """Of the first weights."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("hidden", self.hidden >= 1, "at least 1"),
            ("lr", self.lr >= 0, "at least 0"),
            ("period", self.period >= 1, "at least 1"),
            ("low", 0.1 <= self.low < 1, "in [0.1, 1)"),
            ("high", 1 < self.high <= 2, "in (1, 2]"),
        ):
            if not holds:
                raise ValueError(f"controller.{name} (={getattr(self, name)}) must be {rule}.")


def initial_weights(config: LearningRateController, like: Tensor) -> dict[str, Tensor]:
    """w1 [H, F], b1 [H], w2 [H], b2 []: the factor is 1 whatever the statistics."""
    generator = torch.Generator().manual_seed(config.seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = (config.hidden, NUM_STATISTICS)
    w1 = torch.randn(shape, generator=generator).to(like.device, dtype) / NUM_STATISTICS**0.5
    share = math.log(1 / config.low) / math.log(config.high / config.low)
    weights = {
        "w1": w1,
        "b1": w1.new_zeros(config.hidden),
        "w2": w1.new_zeros(config.hidden),
        "b2": w1.new_tensor(math.log(share / (1 - share))),
    }
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def log_factors(config: LearningRateController, weights: Weights, statistics: Tensor) -> Tensor:
    """Logarithms of the factors: statistics [G, F] -> [G], in [log low, log high]."""
    hidden = torch.tanh(statistics @ weights["w1"].t() + weights["b1"])
    z = hidden @ weights["w2"] + weights["b2"]
    return math.log(config.low) + math.log(config.high / config.low) * torch.sigmoid(z)


def statistics(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: float,
) -> Tensor:
    """The F statistics of one group; differentiable in all tensors."""

    def total(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.sum().to(_wide(t)) for t in tensors]).sum()

    squares = [[t.square() for t in tensors] for tensors in (gradients, parameters, first)]
    count = sum(p.numel() for p in parameters)
    own, weights, along = map(total, squares)
    return _statistics(own, weights, along, total(second), count, steps)


def _statistics(
    gradients: Tensor, parameters: Tensor, first: Tensor, second: Tensor, count: int, steps: float
) -> Tensor:
    """The same from sums over the group: of squares, and of Adam's second moment."""
    ratio = (first + 1e-30) / (second + 1e-30)
    # the root, and a scale that suits tanh, in one factor
    logs = [0.25 * torch.log10(x + 1e-20) for x in (gradients / count, parameters / count, ratio)]
    return torch.stack([*logs, logs[0].new_tensor(0.25 * math.log10(1 + steps))])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class ControllerState:
    """The controller at work: its weights, the factors in force, and what they were made of."""

    def __init__(self, config: LearningRateController, groups: Sequence[dict[str, Any]]) -> None:
        self.config = config
        like = groups[0]["params"][0]
        self.weights = initial_weights(config, like)
        self.factors = [1.0] * len(groups)
        """Factor per group."""
        self._last: list[Tensor | None] = [None] * len(groups)
        """Statistics [F] that the factor in force was made of."""

    @torch.no_grad()
    def update(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Judge the last factors and make new ones; call it before the step's update."""
        device = self.weights["w1"].device
        cosines, rows, active = [], [], []
        for index, group in enumerate(groups):
            parameters = [p for p in group["params"] if p.grad is not None and state.get(p)]
            parameters = [p for p in parameters if float(state[p]["step"]) > 0]
            if not parameters:
                continue
            row, cosine = _observe(parameters, state, group)
            active.append(index)
            rows.append(row.to(device, self.weights["w1"].dtype))
            cosines.append(cosine.to(device, self.weights["w1"].dtype))
        if not active:
            return
        self._descend(active, torch.stack(cosines))
        factors = log_factors(self.config, self.weights, torch.stack(rows)).exp().tolist()
        for index, row, factor in zip(active, rows, factors, strict=True):
            self._last[index] = row
            # statistics that overflowed say nothing: keep the factor in force
            if math.isfinite(factor):
                self.factors[index] = min(max(factor, self.config.low), self.config.high)

    def _descend(self, active: Sequence[int], cosines: Tensor) -> None:
        known = [i for i, index in enumerate(active) if self._last[index] is not None]
        if self.config.lr == 0 or not known:
            return
        before = torch.stack([self._last[active[i]] for i in known])  # type: ignore[misc]
        with torch.enable_grad():
            loss = -(cosines[known] * log_factors(self.config, self.weights, before)).mean()
            slopes = torch.autograd.grad(loss, list(self.weights.values()))
        usable = torch.isfinite(loss.detach())
        for weight, slope in zip(self.weights.values(), slopes, strict=True):
            weight.sub_(torch.where(usable, self.config.lr * slope, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Weights, factors in force and their statistics."""
        return {
            "weights": {name: w.detach().clone() for name, w in self.weights.items()},
            "factors": list(self.factors),
            "last": [None if row is None else row.clone() for row in self._last],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        for name, weight in self.weights.items():
            if weight.shape != state["weights"][name].shape:
                theirs = state["weights"]["b1"].shape[0]
                raise ValueError(
                    f"controller.hidden (={self.config.hidden}) differs from the checkpoint's "
                    f"(={theirs}); build the optimizer with hidden={theirs}."
                )
            weight.copy_(state["weights"][name])
        self.factors = [float(factor) for factor in state["factors"]]
        like = self.weights["w1"]
        self._last = [
            None if row is None else row.to(like.device, like.dtype, copy=True)
            for row in state["last"]
        ]


def _observe(
    parameters: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]], group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Statistics [F] of a group, and the cosine of its gradient with the last direction taken."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    first = [state[p]["exp_avg"] for p in parameters]
    second = [state[p]["exp_avg_sq"] for p in parameters]
    steps = [float(state[p]["step"]) for p in parameters]
    # Adam's last direction up to a factor, which the cosine does not see
    taken = list(torch._foreach_sqrt(second))
    torch._foreach_div_(taken, [(1 - group["betas"][1] ** t) ** 0.5 for t in steps])
    torch._foreach_add_(taken, group["eps"])
    taken = list(torch._foreach_div(first, taken))

    def squares(tensors: Sequence[Tensor]) -> Tensor:
        return _stacked(torch._foreach_norm(list(tensors))).square().sum()

    own, along = squares(gradients), squares(taken)
    torch._foreach_mul_(taken, gradients)
    dot = _stacked([t.sum() for t in taken]).sum()
    sign = -1.0 if group["maximize"] else 1.0
    cosine = sign * dot / ((own * along).sqrt() + 1e-30)
    row = _statistics(
        own,
        squares(parameters),
        squares(first),
        _stacked(torch._foreach_norm(second, 1)).sum(),
        sum(p.numel() for p in parameters),
        steps[0],
    )
    return row, cosine


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([scalar.to(_wide(scalar)) for scalar in scalars])
