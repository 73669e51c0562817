"""New blocks: their weights, and what the optimizer remembers about their slots.

Legend: R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def write_newborn_values(
    values: Tensor,
    swapped: Tensor,
    *,
    max_swaps: int,
    scale: float,
    fan_in: int,
    generator: torch.Generator,
) -> None:
    """Give swapped slots fresh weights, uniform in +-scale/sqrt(fan_in); in place.

    That is the distribution of a fresh `nn.Linear` (Kaiming uniform, He et al. 2015, with a =
    sqrt(5)) times `scale`. Draws `max_swaps` blocks whatever was swapped, so that the number of
    draws, and with it the generator's later stream, does not depend on the scores.

    Args:
        values: [R, K, B, B], changed in place in the swapped slots only.
        swapped: bool [R, k], k <= K.
        max_swaps: upper bound of the number of swapped slots.
        scale: 0 writes zeros and draws nothing.
        fan_in: inputs of one output.
        generator: source of the weights.
    """
    R, K, B, _ = values.shape
    k = swapped.shape[1]
    if max_swaps == 0:
        return
    if scale == 0.0:
        values[:, :k].masked_fill_(swapped[:, :, None, None], 0.0)
        return
    bound = scale / math.sqrt(fan_in)
    drawn = torch.empty(max_swaps, B, B, device=generator.device)
    drawn.uniform_(-bound, bound, generator=generator)
    # swapped slots first, in row-major order: a static shape without asking the host how many
    rows_slots = swapped.flatten().logical_not().argsort(stable=True)[:max_swaps]
    flat = (rows_slots // k) * K + rows_slots % k
    blocks = values.view(R * K, B, B)
    newborn = swapped.flatten()[rows_slots][:, None, None]
    fresh = torch.where(newborn, drawn.to(values, non_blocking=True), blocks[flat])
    blocks.index_copy_(0, flat, fresh)


def reset_optimizer_state(
    optimizers: Iterable[torch.optim.Optimizer], values: Tensor, swapped: Tensor
) -> None:
    """Zero the swapped slots of every per-element state the optimizers hold for `values`.

    Works for any optimizer whose state tensors have the parameter's shape (moments of Adam and
    its fused and multi-tensor forms, momentum of SGD). Survivors are not touched.

    Args:
        optimizers: those that may hold state of `values`.
        values: the parameter [R, K, B, B].
        swapped: bool [R, k], k <= K.
    """
    k = swapped.shape[1]
    mask = swapped[:, :, None, None]
    for optimizer in optimizers:
        # `state` is a defaultdict: reading an unknown parameter would create an entry
        if values not in optimizer.state:
            continue
        for entry in optimizer.state[values].values():
            if isinstance(entry, Tensor) and entry.shape == values.shape:
                entry[:, :k].masked_fill_(mask, 0.0)


class NewbornStepCorrection:
    """Makes Adam's first steps of a newborn block as long as those of a fresh parameter.

    Adam divides its moments by 1 - beta^t (Kingma & Ba 2015, algorithm 1) with one t for the whole
    parameter. For a block born late t is large, its zeroed moments stay uncorrected, and its first
    steps come out up to 6.6 times too long at the usual betas. After every optimizer step this
    replaces the block's update by the one with t = the block's own age. Blocks as old as the
    parameter are not changed by a bit.

    Knows `torch.optim.Adam` and `AdamW` (foreach, fused and capturable included). Others are left
    alone.
    """

    def __init__(self) -> None:
        self._last_step: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def apply(
        self, optimizer: torch.optim.Optimizer, values: Tensor, block_age: Tensor, live: int
    ) -> None:
        """Correct the step that `optimizer` has just taken.

        Args:
            optimizer: any; only Adam and AdamW are acted on.
            values: parameter [R, K, B, B].
            block_age: int32 [R, K], optimizer steps since birth, this one included.
            live: live slots per row.
        """
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
            return
        group = _group_of(optimizer, values)
        if group is None or not optimizer.state.get(values):
            return
        state = optimizer.state[values]
        t = state["step"].detach().to(values.device, torch.float32, non_blocking=True)
        last = self._last_step.get(values)
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        if _by_kernel(values, state["exp_avg"], second, block_age):
            from cms_topology._birth_kernels import correct_young

            if last is None:
                last = self._last_step[values] = torch.full_like(t, -1.0)
            correct_young(
                values, state["exp_avg"], second, block_age, live, t, last, group["lr"],
                group["betas"], group["eps"], _grown_up(group["betas"]),
            )  # fmt: skip
            last.copy_(t)
            return
        # a gradient scaler may have skipped the step: then there is nothing to correct
        moved = torch.ones_like(t, dtype=torch.bool) if last is None else t > last
        self._last_step[values] = t.clone()

        age = torch.minimum(block_age[:, :live].float(), t).clamp(min=1)
        young = (age < t.clamp(max=_grown_up(group["betas"]))) & moved
        blocks = (values[:, :live], state["exp_avg"][:, :live], second[:, :live])
        if values.device.type == "cpu":
            # asking which blocks are young costs nothing here, and they are few
            chosen = young.nonzero(as_tuple=True)
            w, m, v = (block[chosen] for block in blocks)
            blocks[0][chosen] = w + _lacking(m, v, t, age[chosen][:, None, None], group)
        else:
            w, m, v = blocks
            corrected = w + _lacking(m, v, t, age[:, :, None, None], group)
            w.copy_(torch.where(young[:, :, None, None], corrected, w))

    def state_dict(self, names: Mapping[Any, str]) -> dict[str, float]:
        """Optimizer steps seen per layer name."""
        return {names[p]: float(t) for p, t in self._last_step.items() if p in names}

    def load_state_dict(self, state: Mapping[str, float], parameters: Mapping[str, Tensor]) -> None:
        self._last_step = {
            parameters[name]: torch.tensor(t, device=parameters[name].device)
            for name, t in state.items()
            if name in parameters
        }


def _by_kernel(values: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernel corrects these."""
    if not values.is_cuda:
        return False
    try:
        from cms_topology._birth_kernels import takes
    except ImportError:  # no Triton on this platform
        return False
    *moments, age = others
    return takes(values, *moments) and age.is_contiguous() and age.dtype == torch.int32


def _lacking(m: Tensor, v: Tensor, t: Tensor, age: Tensor, group: dict[str, Any]) -> Tensor:
    """What a step corrected by `t` lacks to be one corrected by `age`."""
    beta1, beta2 = group["betas"]
    root = v.sqrt()
    made = (m / (1 - beta1**t)) / (root / (1 - beta2**t).sqrt() + group["eps"])
    meant = (m / (1 - beta1**age)) / (root / (1 - beta2**age).sqrt() + group["eps"])
    # with `maximize` Adam negates the gradient on its way into the moments: no sign here
    return group["lr"] * (made - meant)


def _grown_up(betas: tuple[float, float]) -> float:
    """Age in steps from which the bias correction is below 0.1% and no longer worth its time."""
    slowest = max(betas)
    return math.log(1e-3) / math.log(slowest) if slowest > 0 else 0.0


def _group_of(optimizer: torch.optim.Optimizer, values: Tensor) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        if any(p is values for p in group["params"]):
            return group
    return None
