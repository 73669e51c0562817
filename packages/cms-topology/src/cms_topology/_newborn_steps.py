"""The steps that Adam makes with newborn blocks.

Legend: R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cms_topology._blocks import kernels_for


class _Aged(NamedTuple):
    """A layer whose young blocks are to be corrected."""

    values: Tensor
    """[R, K, B, B]."""
    mean: Tensor
    """[R, K, B, B], Adam's first moment."""
    square: Tensor
    """[R, K, B, B], the second moment that it divides by."""
    age: Tensor
    """int32 [R, K], optimizer steps."""
    live: int
    """Live slots per row."""
    step: Tensor
    """0-d, Adam's steps."""
    group: dict[str, Any]
    """The parameter group."""


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
        self._joined: dict[int, tuple[list[Tensor], Tensor]] = {}  # of what one kernel corrects

    def apply(
        self, optimizer: torch.optim.Optimizer, values: Tensor, block_age: Tensor, live: int
    ) -> None:
        """Correct the step that `optimizer` has just taken with one layer's `values`.

        Args:
            optimizer: any; only Adam and AdamW are acted on.
            values: parameter [R, K, B, B].
            block_age: int32 [R, K], optimizer steps since birth, this one included.
            live: live slots per row.
        """
        self.apply_all(optimizer, [(values, block_age, live)])

    @torch.no_grad()
    def apply_all(
        self, optimizer: torch.optim.Optimizer, layers: Iterable[tuple[Tensor, Tensor, int]]
    ) -> None:
        """`apply` for (`values`, `block_age`, `live`) of many layers, on a GPU in one launch."""
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
            return
        owner = {p: group for group in optimizer.param_groups for p in group["params"]}
        launches: dict[object, list[_Aged]] = {}
        together: dict[object, list[_Aged]] = {}
        for values, block_age, live in layers:
            state = optimizer.state.get(values)
            if not state or values not in owner:
                continue
            group = owner[values]
            second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            aged = _Aged(values, state["exp_avg"], second, block_age, live, state["step"], group)
            if _by_kernel(values, aged.mean, second, block_age):
                kinds: object = (values.dtype, aged.mean.dtype, second.dtype, values.shape[-1])
                launches.setdefault((id(group), values.device, kinds), []).append(aged)
            elif values.device.type == "cpu":
                kinds = (values.dtype, values.shape[-1])
                together.setdefault((id(group), kinds), []).append(aged)
            else:
                self._correct(aged)
        for members in launches.values():
            self._correct_by_kernel(members)
        for members in together.values():
            for batch in _batches(members):
                self._correct_on_cpu(batch)

    def _correct_by_kernel(self, members: list[_Aged]) -> None:
        from cms_topology._birth_kernels import correct_young

        device, group = members[0].values.device, members[0].group
        steps = torch.stack([aged.step for aged in members])
        steps = steps.to(device, torch.float32, non_blocking=True)
        lasts = self._lasts([aged.values for aged in members], device)
        correct_young(
            [aged[:5] for aged in members], steps, lasts, group["lr"],
            group["betas"], group["eps"], _grown_up(group["betas"]),
        )  # fmt: skip
        lasts.copy_(steps)

    def _lasts(self, parameters: list[Tensor], device: torch.device) -> Tensor:
        """[L], the last steps of parameters that are corrected together, in one tensor."""
        joined = self._joined.get(id(parameters[0]))
        if joined is None or not _same(joined[0], parameters):
            known = [self._last_step.get(p) for p in parameters]
            start = [torch.full((), -1.0, device=device) if t is None else t for t in known]
            joined = (parameters, torch.stack(start))
            self._joined[id(parameters[0])] = joined
            self._last_step.update(zip(parameters, joined[1].unbind(), strict=True))
        return joined[1]

    def _correct_on_cpu(self, members: list[_Aged]) -> None:
        """Takes the young blocks out: asking which they are costs nothing here; they are few."""
        group = members[0].group
        counts = [len(aged.values) * aged.live for aged in members]
        steps = torch.stack([aged.step for aged in members]).float()
        lasts = [self._last_step.get(aged.values) for aged in members]
        moved = [last is None or bool(t > last) for t, last in zip(steps, lasts, strict=True)]
        self._last_step.update(zip([aged.values for aged in members], steps.clone(), strict=True))

        t = steps.repeat_interleave(torch.tensor(counts))
        age = torch.cat([aged.age[:, : aged.live].flatten() for aged in members]).float()
        age = torch.minimum(age, t).clamp(min=1)
        young = age < t.clamp(max=_grown_up(group["betas"]))
        if not young.any():
            return
        chosen, blocks, kept = [], [], []
        for aged, mask, ran in zip(members, young.split(counts), moved, strict=True):
            # a gradient scaler may have skipped the step: then there is nothing to correct
            mask = mask if ran else torch.zeros_like(mask)
            at = mask.view(-1, aged.live).nonzero(as_tuple=True)
            chosen.append((aged.values, at))
            blocks.append([x[at] for x in (aged.values, aged.mean, aged.square)])
            kept.append(mask)
        w, m, v = (torch.cat(of_layers) for of_layers in zip(*blocks, strict=True))
        born = torch.cat(kept)
        age, t = age[born][:, None, None], t[born][:, None, None]
        corrected = (w + _lacking(m, v, t, age, group)).to(w.dtype)
        sizes = [len(at[0]) for _, at in chosen]
        for (values, at), part in zip(chosen, corrected.split(sizes), strict=True):
            values[at] = part

    def _correct(self, aged: _Aged) -> None:
        """Computes a correction for every block, and waits for no device."""
        values, group, live = aged.values, aged.group, aged.live
        t = aged.step.detach().to(values.device, torch.float32, non_blocking=True)
        last = self._last_step.get(values)
        moved = torch.ones_like(t, dtype=torch.bool) if last is None else t > last
        self._last_step[values] = t.clone()
        age = torch.minimum(aged.age[:, :live].float(), t).clamp(min=1)
        young = (age < t.clamp(max=_grown_up(group["betas"]))) & moved
        w, m, v = (block[:, :live] for block in (values, aged.mean, aged.square))
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
        self._joined = {}


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _by_kernel(values: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernel corrects these."""
    *moments, age = others
    return kernels_for(values, *moments) and age.is_contiguous() and age.dtype == torch.int32


def _lacking(m: Tensor, v: Tensor, t: Tensor, age: Tensor, group: dict[str, Any]) -> Tensor:
    """What a step corrected by `t` lacks to be one corrected by `age`."""
    beta1, beta2 = group["betas"]
    root = v.sqrt()
    made = (m / _bias(beta1, t)) / (root / _bias(beta2, t).sqrt() + group["eps"])
    meant = (m / _bias(beta1, age)) / (root / _bias(beta2, age).sqrt() + group["eps"])
    # with `maximize` Adam negates the gradient on its way into the moments: no sign here
    return group["lr"] * (made - meant)


def _bias(beta: float, steps: Tensor) -> Tensor:
    # a CPU's powers in single precision depend on where in the tensor a number stands
    exact = steps.double() if steps.device.type == "cpu" else steps
    return (1 - beta**exact).float()


def _batches(members: Iterable[_Aged], elements: int = 1 << 20) -> Iterable[list[_Aged]]:
    """Together what is small: large layers gain nothing by it, and would need memory at once."""
    batch: list[_Aged] = []
    for aged in members:
        if batch and sum(x.values.numel() for x in batch) + aged.values.numel() > elements:
            yield batch
            batch = []
        batch.append(aged)
    if batch:
        yield batch


def _grown_up(betas: tuple[float, float]) -> float:
    """Age in steps from which the bias correction is below 0.1% and no longer worth its time."""
    slowest = max(betas)
    return math.log(1e-3) / math.log(slowest) if slowest > 0 else 0.0
