"""The steps that Adam makes with newborn blocks.

Legend: R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cms_topology._adam_rules import ADAM, NADAM, Rule, corrected, exact_kind, rule_of, step
from cms_topology._blocks import kernels_for
from cms_topology._newborn_launch import YoungLaunch

_MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"state1", "state2"})
"""Names of both moments in other optimizers like Adam; the second ones: bitsandbytes."""
_PIECE = 1 << 17
"""Elements that a CPU corrects at a time: what its caches hold."""


class _Known(NamedTuple):
    """What stays from step to step of a layer's `values`."""

    values: Tensor
    """[R, K, B, B]."""
    mean: Tensor
    """[R, K, B, B], Adam's first moment."""
    square: Tensor
    """[R, K, B, B], the second moment that it divides by."""
    step: Tensor
    """0-d, Adam's steps."""
    product: Tensor | None
    """0-d, the product of NAdam's momenta."""
    group: dict[str, Any]
    """The parameter group."""
    rule: Rule
    """The optimizer's."""
    by_kernel: bool
    """Whether the Triton kernel takes it."""
    alike: object
    """Equal for those that are corrected together."""


class _Aged(NamedTuple):
    """A layer whose young blocks are to be corrected."""

    known: _Known
    age: Tensor
    """int32 [R, K], optimizer steps."""
    live: int
    """Live slots per row."""


class NewbornStepCorrection:
    """Makes Adam's first steps of a newborn block as long as those of a fresh parameter.

    Adam divides its moments by 1 - beta^t (Kingma & Ba 2015, algorithm 1) with one t for the whole
    parameter. For a block born late t is large, its zeroed moments stay uncorrected, and its first
    steps come out up to 6.6 times too long at the usual betas. After every optimizer step this
    replaces the block's update by the one with t = the block's own age. Blocks as old as the
    parameter are not changed by a bit.

    Knows `torch.optim.Adam`, `AdamW`, `NAdam`, `RAdam` and `Adamax` (foreach, fused and capturable
    included). Others are left alone, with a warning if they keep Adam's moments. So is NAdam where
    a weight decay that is not decoupled goes into its gradients: they cannot be told afterwards.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._strangers: set[int] = set()  # ids of optimizers that are not known
        self._last_step: dict[Tensor, Tensor | float] = {}  # a float on a CPU
        self._joined: dict[int, tuple[list[Tensor], Tensor]] = {}  # of what one kernel corrects
        self._known: dict[Tensor, _Known] = {}
        self._groups: dict[int, list[Any]] = {}
        self._kept: dict[int, YoungLaunch] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy; what was looked up is looked up again."""
        found: dict[str, Any] = {
            "_kept": {},
            "_known": {},
            "_groups": {},
            "_joined": {},
            "_strangers": set(),
        }
        return {**self.__dict__, **found}

    def apply(
        self, optimizer: torch.optim.Optimizer, values: Tensor, block_age: Tensor, live: int
    ) -> None:
        """Correct the step that `optimizer` has just taken with one layer's `values`.

        Args:
            optimizer: any; only Adam and its kin are acted on.
            values: parameter [R, K, B, B], with the gradient that the step was made of (of which
                NAdam's need it).
            block_age: int32 [R, K], optimizer steps since birth, this one included.
            live: live slots per row.
        """
        self.apply_all(optimizer, [(values, block_age, live)])

    @torch.no_grad()
    def apply_all(
        self, optimizer: torch.optim.Optimizer, layers: Iterable[tuple[Tensor, Tensor, int]]
    ) -> None:
        """`apply` for (`values`, `block_age`, `live`) of many layers, on a GPU in one launch."""
        rule = rule_of(optimizer)
        if rule is None:
            self._warn_of_moments(optimizer)
            return
        self._notice_groups(optimizer)
        layers = list(layers)
        kept = self._kept.get(id(optimizer))
        if kept is not None and kept.holds(optimizer, layers):
            kept.correct()
            return
        launches: dict[object, list[_Aged]] = {}
        together: dict[tuple[object, float], list[_Aged]] = {}
        for values, block_age, live in layers:
            state = optimizer.state.get(values)
            if not state:
                continue
            known = self._known.get(values)
            if (
                known is None
                or known.mean is not state["exp_avg"]
                or known.step is not state["step"]
            ):
                known = self._look_up(optimizer, rule, values)
            if known is None or (rule is NADAM and not self._has_gradient(known)):
                continue
            aged = _Aged(known, block_age, live)
            if known.by_kernel and block_age.is_contiguous():
                launches.setdefault(known.alike, []).append(aged)
            elif values.is_cpu and values.is_contiguous():
                t, last = float(known.step), self._last_step.get(values)
                self._last_step[values] = t
                # a gradient scaler may have skipped the step: then there is nothing to correct
                if last is None or t > last:
                    together.setdefault((known.alike, t), []).append(aged)
            else:
                self._correct(aged)
        for members in launches.values():
            launch = self._launch(members, optimizer)
            launch.correct()
            if len(members) == len(layers):
                self._kept[id(optimizer)] = launch
        for (_, t), members in together.items():
            self._correct_on_cpu(members, t)

    def _notice_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget what was known when the optimizer's groups change."""
        groups = [*optimizer.param_groups, *(g["params"] for g in optimizer.param_groups)]
        if not _same(self._groups.get(id(optimizer), []), groups):
            self._groups[id(optimizer)] = groups
            self._known.clear()
            self._kept.clear()

    def _has_gradient(self, known: _Known) -> bool:
        """Whether the gradient that NAdam's step was made of is at hand."""
        group = known.group
        if group["weight_decay"] and not group.get("decoupled_weight_decay", False):
            self._warn_once(
                f"NAdam with weight_decay (={group['weight_decay']}) adds it to the gradients, so "
                "the first steps of newborn blocks cannot be corrected and come out too long; "
                "pass decoupled_weight_decay=True, or correct_newborn_steps=False to "
                "TopologyManager."
            )
            return False
        return known.values.grad is not None

    def _warn_of_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn, once, of an optimizer that has Adam's moments but is not known."""
        if id(optimizer) in self._strangers or not optimizer.state:
            return
        self._strangers.add(id(optimizer))
        if any(held.keys() >= names for held in optimizer.state.values() for names in _MOMENTS):
            self._warn_once(
                f"the optimizer (={type(optimizer).__name__}) keeps Adam's moments, but is none of "
                "torch.optim's Adam, AdamW, NAdam, RAdam and Adamax: the first steps of newborn "
                "blocks may come out several times too long; pass correct_newborn_steps=False to "
                "TopologyManager if they do not."
            )

    def _warn_once(self, said: str) -> None:
        if said not in self._said:
            self._said.add(said)
            warnings.warn(said, stacklevel=5)

    def _look_up(
        self, optimizer: torch.optim.Optimizer, rule: Rule, values: Tensor
    ) -> _Known | None:
        owners = (g for g in optimizer.param_groups if any(p is values for p in g["params"]))
        group = next(owners, None)
        if group is None:
            return None
        state = optimizer.state[values]
        mean = state["exp_avg"]
        square = state["max_exp_avg_sq" if group.get("amsgrad") else rule.second]
        kinds = (values.dtype, mean.dtype, square.dtype, values.shape[-1])
        by_kernel = rule is ADAM and _by_kernel(values, mean, square)
        alike = (id(group), values.device, kinds)
        step, product = state["step"], state.get("mu_product")
        known = _Known(values, mean, square, step, product, group, rule, by_kernel, alike)
        self._known[values] = known
        return known

    def _launch(self, members: list[_Aged], optimizer: torch.optim.Optimizer) -> YoungLaunch:
        layers = [(aged.known.values, aged.age, aged.live) for aged in members]
        states = [optimizer.state[values] for values, _, _ in layers]
        squares = [aged.known.square for aged in members]
        lasts = self._lasts([values for values, _, _ in layers])
        return YoungLaunch(layers, states, squares, lasts, members[0].known.group)

    def _lasts(self, parameters: list[Tensor]) -> Tensor:
        """[L], the last steps of parameters that are corrected together, in one tensor."""
        joined = self._joined.get(id(parameters[0]))
        if joined is None or not _same(joined[0], parameters):
            known = [self._last_step.get(p, -1.0) for p in parameters]
            device = parameters[0].device
            start = [torch.as_tensor(t, dtype=torch.float32, device=device) for t in known]
            joined = (parameters, torch.stack(start))
            self._joined[id(parameters[0])] = joined
            self._last_step.update(zip(parameters, joined[1].unbind(), strict=True))
            self._kept.clear()
        return joined[1]

    def _correct_on_cpu(self, members: list[_Aged], t: float) -> None:
        """Takes the young blocks out: asking which they are costs nothing here; they are few."""
        known = members[0].known
        limit = min(t, known.rule.grown_up(known.group))
        ages = [aged.age[:, : aged.live].reshape(-1) for aged in members]
        counts = [len(its) for its in ages]
        young = torch.cat(ages) < limit
        if limit <= 1 or not young.any():
            return
        pieces = []
        for aged, mask, its in zip(members, young.split(counts), ages, strict=True):
            flat = [x.flatten(0, 1) for x in _tensors(aged.known)]
            slots = mask.nonzero().squeeze(1)
            its = its[slots].clamp_(min=1)
            if aged.live < aged.age.shape[1]:  # behind the live ones there are spare ones
                slots += slots // aged.live * (aged.age.shape[1] - aged.live)
            size = max(1, _PIECE // flat[0][0].numel())
            pieces += [(flat, *of) for of in zip(slots.split(size), its.split(size), strict=True)]
        # what is small is corrected together
        few = sum(slots.numel() * flat[0][0].numel() for flat, slots, _ in pieces) <= _PIECE
        for together in [pieces] if few else [[piece] for piece in pieces]:
            taken = [[x.index_select(0, at) for x in flat] for flat, at, _ in together]
            tensors = list(map(torch.cat, zip(*taken, strict=True))) if few else taken[0]
            age = torch.cat([its for _, _, its in together])
            meant = corrected(tensors, t, age, known.rule, known.group, known.product)
            parts = meant.split([len(at) for _, at, _ in together])
            for ((values, *_), at, _), part in zip(together, parts, strict=True):
                values.index_copy_(0, at, part)

    def _correct(self, aged: _Aged) -> None:
        """Computes a correction for every block, and waits for no device."""
        known, live = aged.known, aged.live
        values, rule, group = known.values, known.rule, known.group
        exact = exact_kind(values.device)
        t = known.step.detach().to(values.device, exact, non_blocking=True)
        moved = t > self._last_step.get(values, -1.0)
        self._last_step[values] = t.to(torch.float32, copy=True)
        age = torch.minimum(aged.age[:, :live].to(exact), t).clamp(min=1)
        young = (age < t.clamp(max=rule.grown_up(group))) & moved
        w, *rest = (x[:, :live] for x in _tensors(known))
        made = step(rest, rule.parts(t, group, known.product), rule, group)
        own = rule.parts(age[:, :, None, None], group, None)
        lacking = group["lr"] * (made - step(rest, own, rule, group))
        w.copy_(torch.where(young[:, :, None, None], w + lacking, w))

    def state_dict(self, names: Mapping[Any, str]) -> dict[str, float]:
        """Optimizer steps seen per layer name."""
        return {names[p]: float(t) for p, t in self._last_step.items() if p in names}

    def load_state_dict(self, state: Mapping[str, float], parameters: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned, given the layers' `values` by name."""
        self._last_step = {
            parameters[name]: torch.tensor(t, dtype=torch.float32, device=parameters[name].device)
            for name, t in state.items()
            if name in parameters
        }
        self._joined, self._kept = {}, {}


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _by_kernel(values: Tensor, *moments: Tensor) -> bool:
    """Whether the Triton kernel corrects these."""
    return kernels_for(values, *moments)


def _tensors(known: _Known) -> list[Tensor]:
    """Values, both moments and, where the step is made of it, the gradient: [R, K, B, B] each."""
    found = [known.values, known.mean, known.square]
    if known.rule is NADAM:
        assert known.values.grad is not None
        found.append(known.values.grad)
    return found
