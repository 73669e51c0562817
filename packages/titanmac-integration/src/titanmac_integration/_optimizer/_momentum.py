"""Deep momentum: a small network, trained while it is used, in place of the moving average.

Legend: n coordinates, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._levels import adam_state

Weights = Mapping[str, Tensor]

_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class DeepMomentum:
    """Settings of deep momentum (DMGD, Behrouz et al. 2025, "Nested Learning", deep optimizers).

    There, momentum is an associative memory that learns to compress the gradients; its weights take
    one gradient-descent step of an inner objective per step of the outer optimizer,
    `m <- alpha m - eta grad L(m; u)`, and the parameters move along what the memory answers. Here
    the memory is one MLP per parameter group, shared by the group's coordinates:

        u = g / (sqrt(v) + eps),  a = m / (sqrt(v) + eps)     the gradient and Adam's momentum
        d(u, a) = a + w2 . tanh(w1 [u, a])                    the direction of the step

    with m, v Adam's bias-corrected moments. The inner objective is a regression: the memory's
    answer of the step before has to predict the gradient that then came, mean |d_{t-1} - u_t|^2 / 2
    over a sample of coordinates. w2 starts at zero, so training starts as AdamW and leaves it as
    the memory learns. Without biases, d(-u, -a) = -d(u, a).

    Raises:
        ValueError: a setting outside its range.
    """

    hidden: int = 8
    """Width H of the network."""
    lr: float = 0.1
    """Learning rate of the inner regression; 0 leaves the network to `meta_update` alone."""
    decay: float = 1e-3
    """Share of w2 that is forgotten per step (1 - alpha); pulls back to AdamW."""
    sample: int = 4096
    """Coordinates of a group that the regression looks at."""
    keep_length: bool = True
    """Rescale d per parameter to the length of a: the network turns the step and does not shrink
    it. A good prediction of a noisy gradient is short, and would only act as a lower lr."""
    seed: int = 0
    """Of the first weights."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("hidden", self.hidden >= 1, "at least 1"),
            ("lr", self.lr >= 0, "at least 0"),
            ("decay", 0 <= self.decay < 1, "in [0, 1)"),
            ("sample", self.sample >= 1, "at least 1"),
        ):
            if not holds:
                raise ValueError(f"deep_momentum.{name} (={getattr(self, name)}) must be {rule}.")


def initial_weights(config: DeepMomentum, group: int, like: Tensor) -> dict[str, Tensor]:
    """w1 [H, 2] normal, w2 [H] zero; float64 for float64 parameters, else float32."""
    generator = torch.Generator().manual_seed(config.seed * 1000 + group)
    w1 = torch.randn(config.hidden, 2, generator=generator)
    dtype = torch.promote_types(like.dtype, torch.float32)
    w1 = w1.to(like.device, dtype)
    return {"w1": w1.requires_grad_(), "w2": w1.new_zeros(config.hidden).requires_grad_()}


def direction(weights: Weights, u: Tensor, a: Tensor) -> Tensor:
    """What the memory answers: u, a [...] -> [...]; differentiable in everything."""
    w1, w2 = weights["w1"], weights["w2"]
    features = torch.stack((u, a), -1).to(w1.dtype)
    return (a.to(w1.dtype) + torch.tanh(features @ w1.t()) @ w2).to(a.dtype)


def with_length_of(d: Tensor, a: Tensor) -> Tensor:
    """d scaled to the Euclidean length of a."""
    tiny = torch.finfo(d.dtype).tiny
    return d * (a.norm() / d.norm().clamp(min=tiny))


class DeepMomentumStep:
    """The memories of all parameter groups, and the update made with them.

    Keeps Adam's state under Adam's names, so everything that knows Adam's state works on.
    """

    def __init__(self, config: DeepMomentum, groups: Sequence[dict[str, Any]]) -> None:
        self.config = config
        self.weights = [
            initial_weights(config, i, group["params"][0]) for i, group in enumerate(groups)
        ]
        self._features: list[Tensor | None] = [None] * len(groups)
        """Per group [samples, 2]: what the memory was asked at the group's last update."""
        self.inner_losses: list[Tensor | None] = [None] * len(groups)
        """Per group, the last value of the inner objective, on the group's device."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of every parameter that has a gradient."""
        for index, group in enumerate(optimizer.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None]
            self.update(index, group, [adam_state(optimizer, group, p) for p in parameters])

    @torch.no_grad()
    def update(self, index: int, group: dict[str, Any], states: Sequence[dict[str, Any]]) -> None:
        """One step of the parameters of a group that have a gradient; `states` in their order."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        if group["maximize"]:
            gradients = list(torch._foreach_neg(gradients))
        beta1, beta2 = group["betas"]
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1.0)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        corrections = []
        for state in states:
            t = state["step"].item()
            corrections.append((1 - beta1**t, (1 - beta2**t) ** 0.5))

        def normalised(i: int, part: slice) -> tuple[Tensor, Tensor]:
            one, two = corrections[i]
            root = second[i].reshape(-1)[part].sqrt().div_(two).add_(group["eps"])
            u = gradients[i].reshape(-1)[part] / root
            return u, first[i].reshape(-1)[part] / one / root

        self._learn(index, [normalised(i, s) for i, s in enumerate(self._strides(parameters))])
        for i, parameter in enumerate(parameters):
            wide = self.weights[index]["w1"].dtype
            step = torch.empty(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            squares = torch.zeros((), dtype=wide, device=parameter.device)
            for start in range(0, parameter.numel(), _CHUNK):
                part = slice(start, start + _CHUNK)
                u, a = normalised(i, part)
                step[part] = direction(self.weights[index], u, a)
                squares += a.to(wide).square().sum()
            if self.config.keep_length:
                length = step.to(wide).norm().clamp(min=torch.finfo(wide).tiny)
                step *= (squares.sqrt() / length).to(step.dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step.view_as(parameter) * -group["lr"])

    def _strides(self, parameters: Sequence[Tensor]) -> list[slice]:
        """Evenly spread coordinates of every parameter, about `sample` in all."""
        share = self.config.sample / sum(p.numel() for p in parameters)
        # odd, so that a stride does not walk down one column of a matrix
        return [slice(None, None, max(1, int(1 / min(1.0, share))) | 1) for _ in parameters]

    def _learn(self, index: int, sample: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The inner step: yesterday's answer against today's gradient."""
        weights = self.weights[index]
        u = torch.cat([pair[0] for pair in sample]).to(weights["w1"].dtype)
        a = torch.cat([pair[1] for pair in sample]).to(weights["w1"].dtype)
        before = self._features[index]
        # another set of parameters had gradients: nothing to compare with
        if self.config.lr > 0 and before is not None and len(before) == len(u):
            with torch.enable_grad():
                loss = 0.5 * (direction(weights, before[:, 0], before[:, 1]) - u).square().mean()
                slopes = torch.autograd.grad(loss, list(weights.values()))
            usable = torch.isfinite(loss.detach())
            weights["w2"].mul_(1 - self.config.decay)
            for weight, slope in zip(weights.values(), slopes, strict=True):
                weight.sub_(torch.where(usable, self.config.lr * slope, 0.0))
            self.inner_losses[index] = loss.detach()
        self._features[index] = torch.stack((u, a), 1).nan_to_num(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Weights and what they were asked last; tensors and numbers only."""
        return {
            "weights": [{k: w.detach().clone() for k, w in net.items()} for net in self.weights],
            "features": [None if f is None else f.clone() for f in self._features],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        for mine, saved in zip(self.weights, state["weights"], strict=True):
            for name, weight in mine.items():
                if weight.shape != saved[name].shape:
                    raise ValueError(
                        f"deep_momentum.hidden (={weight.shape[0]}) differs from the checkpoint's "
                        f"(={saved[name].shape[0]}); build the optimizer with hidden="
                        f"{saved[name].shape[0]}."
                    )
                weight.copy_(saved[name])
        self._features = [
            None if saved is None else saved.to(mine["w1"].device, mine["w1"].dtype, copy=True)
            for mine, saved in zip(self.weights, state["features"], strict=True)
        ]
