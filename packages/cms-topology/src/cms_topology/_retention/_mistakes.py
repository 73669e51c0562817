"""What would quietly undo a guard: noticed early, and said."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cms_topology._retention._names import plain_name


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


def warn_of_still_weights(model: nn.Module, still: set[str]) -> None:
    """Warn of torch's layers that learn nothing, because what reaches their weights is not seen."""
    kinds: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.ndim >= 2 and parameter.requires_grad and plain_name(name) in still:
                kinds.setdefault(type(module).__name__, plain_name(name))
    if kinds:
        named = ", ".join(f"{kind} (first {name!r})" for kind, name in kinds.items())
        warnings.warn(
            f"weights of {named} stay as they are: the inputs of the old tasks are seen where "
            "linear layers, embeddings and convolutions without groups multiply, not there, so "
            "nothing says which changes would harm. guard.still lists all that stays; train the "
            "new task on what is left, or make these layers linear ones.",
            stacklevel=3,
        )
