"""The optimizers that train a model's sparse layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def listed(given: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None) -> list[Any]:
    """The optimizers, as they were given.

    Raises:
        ValueError: something else was given.
    """
    if given is None:
        return []
    single = hasattr(given, "param_groups") or not isinstance(given, Iterable)
    found: list[Any] = [given] if single else list(given)  # type: ignore[arg-type]
    for optimizer in found:
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(
                f"optimizer (={type(optimizer).__name__}) must be a torch.optim.Optimizer, or "
                "several of them; it has no param_groups."
            )
    return found


def unwrapped(optimizer: Any) -> Any:
    """Accelerate's wrapper hides what kind of optimizer it is, by which newborns are corrected."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def accumulates(given: Any) -> bool:
    """Whether a step of Accelerate's wrapper was none: gradients are still being accumulated."""
    state = getattr(given, "gradient_state", None)
    return not getattr(state, "sync_gradients", True)


def trained_by(optimizers: Iterable[Any]) -> set[int]:
    """Ids of the parameters that they hold now."""
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


def holding_state(optimizer: Any) -> Any:
    """What has the state of the parameters: ZeroRedundancyOptimizer's rank keeps its share inside.

    Only for that: of steps that such an optimizer makes, not every rank knows the state.
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def refuse_strangers(optimizers: list[Any], model: nn.Module, values: Iterable[Any]) -> None:
    """Refuse optimizers of another model: state of replaced blocks would stay behind.

    Raises:
        ValueError: they hold none of `values`.
    """
    held = trained_by(optimizers)
    if optimizers and not any(id(v) in held for v in values):
        raise ValueError(
            f"optimizer (={', '.join(type(o).__name__ for o in optimizers)}) must hold "
            f"the values of model's (={type(model).__name__}) CMSBlockLinear layers; it holds "
            "none of them. Pass the optimizer that trains them, made after sparsify()."
        )
