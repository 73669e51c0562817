"""New blocks: their weights, and what the optimizer remembers about their slots.

Legend: R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cms_topology._blocks import clear_blocks

_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def write_newborn_values(
    values: Sequence[Tensor],
    swapped: Tensor,
    *,
    max_swaps: int,
    scale: float,
    fan_in: int,
    generators: Sequence[torch.Generator],
) -> None:
    """Give swapped slots of L layers fresh weights, uniform in +-scale/sqrt(fan_in); in place.

    That is the distribution of a fresh `nn.Linear` (Kaiming uniform, He et al. 2015, with a =
    sqrt(5)) times `scale`. Draws `max_swaps` blocks whatever was swapped, so that the number of
    draws, and with it a generator's later stream, does not depend on the scores.

    Args:
        values: [R, K, B, B] each, changed in place in the swapped slots only.
        swapped: bool [L, R, k], k <= K.
        max_swaps: upper bound of the number of swapped slots of a layer.
        scale: 0 writes zeros and draws nothing.
        fan_in: inputs of one output.
        generators: source of each layer's weights.
    """
    R, K, B, _ = values[0].shape
    k = swapped.shape[2]
    if max_swaps == 0:
        return
    if scale == 0.0:
        clear_blocks(values, swapped.unbind())
        return
    bound = scale / math.sqrt(fan_in)
    # swapped slots first, in row-major order: a static shape without asking the host how many
    flat = swapped.flatten(1)
    slots = flat.logical_not().argsort(dim=1, stable=True)[:, :max_swaps]
    newborn = flat.gather(1, slots)[:, :, None, None]
    slots = (slots // k) * K + slots % k
    for layer, here, born, generator in zip(values, slots, newborn, generators, strict=True):
        drawn = torch.empty(max_swaps, B, B, dtype=torch.float32, device=generator.device)
        drawn.uniform_(-bound, bound, generator=generator)
        blocks = layer.view(R * K, B, B)
        fresh = torch.where(born, drawn.to(layer, non_blocking=True), blocks[here])
        blocks.index_copy_(0, here, fresh)


def reset_optimizer_state(
    optimizers: Iterable[torch.optim.Optimizer], values: Tensor, swapped: Tensor
) -> None:
    """Make the swapped slots of every per-element state the optimizers hold for `values` fresh.

    That is zero for any optimizer whose state tensors have the parameter's shape (moments of Adam
    and its fused and multi-tensor forms, momentum of SGD), but for Rprop's step sizes, Adagrad's
    sums and the second set of weights of schedule-free optimizers. Survivors are not touched, nor
    is state in integers, with a warning. LBFGS forgets its whole history, which is of one vector,
    if anything was swapped.

    Args:
        optimizers: those that may hold state of `values`.
        values: the parameter [R, K, B, B].
        swapped: bool [R, k], k <= K.
    """
    reset_optimizer_states(optimizers, {values: swapped})


def reset_optimizer_states(
    optimizers: Iterable[torch.optim.Optimizer], swapped: Mapping[Tensor, Tensor]
) -> None:
    """`reset_optimizer_state` for many parameters, each with its swapped slots, in one launch."""
    states, masks, fresh = [], [], []
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            if any(bool(mask.any()) for mask in swapped.values()):
                optimizer.state.clear()
            continue
        for values, mask in swapped.items():
            # `state` is a defaultdict: reading an unknown parameter would create an entry
            for name, entry in optimizer.state.get(values, {}).items():
                if not isinstance(entry, Tensor) or entry.shape != values.shape:
                    continue
                if not entry.is_floating_point():
                    _warn_of_codes(optimizer, name, entry.dtype)
                    continue
                start = _fresh_state(optimizer, values, name)
                if start is None:
                    states.append(entry)
                    masks.append(mask)
                else:
                    fresh.append((entry, mask, start))
    clear_blocks(states, masks)
    for entry, mask, start in fresh:
        live = entry[:, : mask.shape[1]]
        if isinstance(start, Tensor):
            start = start[:, : mask.shape[1]].to(entry)
        live.copy_(torch.where(mask[:, :, None, None], start, live))


def _warn_of_codes(optimizer: torch.optim.Optimizer, name: str, dtype: torch.dtype) -> None:
    """Say, once, that state in 8 bits is not reset: its zero may stand for any number."""
    if optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"the optimizer (={type(optimizer).__name__}) keeps {name!r} of its state in {dtype}, "
            "which is left as it is where blocks are replaced: newborn blocks begin with the "
            "momentum of those that left; let an optimizer with floating-point state train the "
            "values of CMSBlockLinear layers.",
            stacklevel=2,
        )


def _fresh_state(
    optimizer: torch.optim.Optimizer, values: Tensor, name: str
) -> Tensor | float | None:
    """What a fresh optimizer holds under a name, of the shape of `values` or one number.

    None: zeros.
    """
    if name not in ("step_size", "sum", "z"):
        return None
    owners = (g for g in optimizer.param_groups if any(p is values for p in g["params"]))
    group = next(owners, {})
    if name == "step_size" and isinstance(optimizer, torch.optim.Rprop):
        return float(group["lr"])
    if name == "sum" and isinstance(optimizer, torch.optim.Adagrad):
        return float(group["initial_accumulator_value"])
    if name == "z" and "weight_sum" in group:  # schedule-free: trains between z and their mean
        return values.detach()
    return None
