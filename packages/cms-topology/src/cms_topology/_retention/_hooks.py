"""Where a guard acts in a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Act = Callable[[], None]


def act_at_steps(
    optimizers: Sequence[torch.optim.Optimizer],
    begin: Act,
    before: Act | None,
    after: Act,
    after_others: Act,
) -> list[RemovableHandle]:
    """Call `begin` at the start of every step, `before` when its gradients are there, and `after`.

    Args:
        optimizers: of one model.
        begin: called before anything has moved.
        before: None: nothing.
        after: called after steps of the first optimizer.
        after_others: called after steps of the others.
    """
    handles = []
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(_before(begin, before)))
        act = after if optimizer is optimizers[0] else after_others
        handles.append(optimizer.register_step_post_hook(_after(act)))
    return handles


def _before(begin: Act, act: Act | None) -> Any:
    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        begin()
        if act is None:
            return None
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
