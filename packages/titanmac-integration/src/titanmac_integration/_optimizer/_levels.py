"""Slow levels: gradients are kept back and applied, as their mean, when the level is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ACCUMULATED = "cms_gradient"
"""Key in an optimizer's per-parameter state: sum of the gradients since the last update. It has the
parameter's shape, so `cms_topology.reset_optimizer_state` clears it for replaced blocks."""


@contextmanager
def only_due_levels(optimizer: torch.optim.Optimizer, step: int) -> Iterator[None]:
    """Inside, `.grad` is what the update at `step` may see: None for levels that are not due.

    A parameter without gradient is not touched by torch's optimizers: no decay, no momentum, no
    step count. Afterwards every `.grad` is the tensor that it was before.
    """
    before: list[tuple[Tensor, Tensor | None]] = []
    try:
        for group in optimizer.param_groups:
            if group["period"] > 1:
                before += [(p, p.grad) for p in group["params"]]
                _accumulate(optimizer, group)
                _present(optimizer, group, due=step % group["period"] == 0)
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def scaled_rates(
    groups: Sequence[dict[str, Any]], factors: Sequence[float] | None
) -> Iterator[None]:
    """Inside, `lr` of the groups includes `lr_scale` and their factors; schedulers never see it."""
    rates = [group["lr"] for group in groups]
    try:
        for index, group in enumerate(groups):
            factor = group["lr_scale"] * (factors[index] if factors is not None else 1.0)
            if factor != 1.0:  # else lr stays the same object, to the bit
                group["lr"] = group["lr"] * factor
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _accumulate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    sums, gradients = [], []
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise ValueError(
                "gradients (sparse) must be dense on slow levels; build the embedding with "
                "sparse=False or leave it on level 0."
            )
        state = adam_state(optimizer, group, parameter)
        if ACCUMULATED not in state:
            # in float32 at least: a hundred bfloat16 summands would lose the small ones
            state[ACCUMULATED] = parameter.grad.detach().to(_sum_dtype(parameter), copy=True)
        else:
            sums.append(state[ACCUMULATED])
            gradients.append(parameter.grad.detach().to(_sum_dtype(parameter)))
    if sums:
        torch._foreach_add_(sums, gradients)


def _present(optimizer: torch.optim.Optimizer, group: dict[str, Any], *, due: bool) -> None:
    for parameter in group["params"]:
        parameter.grad = None
        # reading the state of an unknown parameter would create an entry
        if due and parameter in optimizer.state:
            total = optimizer.state[parameter].pop(ACCUMULATED, None)
            if total is not None:
                parameter.grad = total.div_(group["period"]).to(parameter.dtype)


def adam_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
) -> dict[str, Any]:
    """State of one parameter, made as `torch.optim.Adam` makes it if there is none yet."""
    state = optimizer.state[parameter]
    if "step" not in state:
        on_device = group["capturable"] or group["fused"]
        device = parameter.device if on_device else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def restore_sums(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back the sums of a loaded state: torch casts them to the parameter's dtype."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        total = saved["state"].get(number, {}).get(ACCUMULATED)
        if total is not None:
            # a copy: the sum changes in place and the saved state shall not
            optimizer.state[parameter][ACCUMULATED] = total.to(
                parameter.device, _sum_dtype(parameter), copy=True
            )


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
