"""What would quietly undo a guard: noticed early, and said."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that trains something else.

    Raises:
        ValueError: it holds none of the model's parameters.
    """
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer (={type(optimizer).__name__}) must hold parameters of model "
            f"(={type(model).__name__}); it holds none of them. Pass the optimizer that trains "
            "the model, or None and call guard.step() after every step."
        )


def warn_of_running_statistics(model: nn.Module) -> None:
    """Warn of norms whose running statistics follow the new task: no guard of weights helps."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats and module.training
    ]
    if names:
        warnings.warn(
            f"running statistics of {len(names)} norm layers (first {names[0]!r}) follow the new "
            "task's data in training mode, and change the old task's answers with them; put these "
            "layers in evaluation mode (module.eval()) while a RetentionGuard acts, or use "
            "LayerNorm, RMSNorm or GroupNorm.",
            stacklevel=3,
        )
