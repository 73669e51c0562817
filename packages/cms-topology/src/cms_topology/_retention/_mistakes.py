"""What would quietly undo a guard: noticed early, and said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cms_topology._retention._names import parameter_names


def check_optimizers(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that trains something else, and warn of one that keeps other weights.

    Raises:
        ValueError: there is none, or one holds none of the model's parameters.
    """
    own = {id(p) for p in model.parameters()}
    if not optimizers:
        raise ValueError("optimizer (=[]) must hold at least one, or be None.")
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer (={name}) must hold parameters of model (={type(model).__name__}); it "
                "holds none of them. Pass the optimizer that trains the model, or None and call "
                "guard.step() after every step."
            )
        if callable(getattr(optimizer, "eval", None)):
            warnings.warn(
                f"{name}.eval() puts other weights into the model than those that were guarded, as "
                "schedule-free optimizers do: call guard.step() after it, or the old tasks are "
                "lost there.",
                stacklevel=4,
            )


def warn_of_no_steps() -> None:
    """Warn that a guard has never acted."""
    warnings.warn(
        "the guard saw no optimizer step, so it has held nothing: pass the optimizer whose step() "
        "runs (of SAM the base optimizer), or call guard.step() after every step.",
        stacklevel=3,
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


ADDED = {
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "cat", "stack", "where",
    "mul", "mul_", "__mul__", "__rmul__", "lerp", "prelu", "layer_norm", "rms_norm", "group_norm",
    "instance_norm", "batch_norm",
}  # fmt: skip
"""Functions that add or scale by a parameter: that it stays is what the documentation says."""


def warn_of_still_weights(
    model: nn.Module, still: set[str], unseen: Mapping[str, str], usage_known: bool
) -> None:
    """Warn of weights that learn nothing, because what they multiply is not seen."""
    kinds: dict[str, list[str]] = {}
    for parameter, name in parameter_names(model).items():
        function = unseen.get(name, None if usage_known else "nothing that was seen")
        if function is None or function in ADDED or name not in still:
            continue
        if parameter.ndim >= 2 and parameter.numel() and parameter.requires_grad:
            kinds.setdefault(function, []).append(name)
    if kinds:
        named = "; ".join(
            f"{len(names)} used by {function} (first {names[0]!r})"
            for function, names in kinds.items()
        )
        warnings.warn(
            f"weights stay as they are: {named}. The inputs of the old tasks are not seen there, "
            "so nothing says which changes would harm. guard.still lists all that stays; train the "
            "new task on what is left, or multiply as linear, convolutional or recurrent layers "
            "or `x @ weight` do, by the parameter itself, and in one way only.",
            stacklevel=3,
        )
