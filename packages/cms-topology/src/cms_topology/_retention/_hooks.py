"""Where a guard acts in a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Act = Callable[[], None]


def act_at_steps(
    optimizers: Sequence[torch.optim.Optimizer], before: Act | None, after: Act, after_others: Act
) -> list[RemovableHandle]:
    """Call `before` every step, when its gradients are there, and `after` it.

    Args:
        optimizers: of one model.
        before: None: nothing.
        after: called after steps of the first optimizer.
        after_others: called after steps of the others.
    """
    handles = []
    for optimizer in optimizers:
        if before is not None:
            handles.append(optimizer.register_step_pre_hook(_before(before)))
        act = after if optimizer is optimizers[0] else after_others
        handles.append(optimizer.register_step_post_hook(_after(act)))
    return handles


def _before(act: Act) -> Any:
    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        # a closure computes the gradients inside of the step, perhaps several times
        self, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            act()
            return None

        def with_act() -> Any:
            loss = closure()
            act()
            return loss

        return (self, with_act, *rest[1:]), {k: v for k, v in kwargs.items() if k != "closure"}

    return hook


def _after(act: Act) -> Any:
    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        act()
        if isinstance(optimizer, torch.optim.LBFGS):
            # its history is of a path that the projection has left: followed, it diverges
            optimizer.state.clear()

    return hook
