"""How long the steps of Adam and its kin are, by the number of steps that a block has seen.

Legend: B tile side, n blocks.

Each of them divides two moments by factors that depend on that number alone. So the step that a
parameter took can be told from the one that a block of another age should have taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = dict[str, Any]


class Parts(NamedTuple):
    """A step is -lr (gradient * g + mean * m) / (root * r + floor), all of these of its count.

    g is the gradient, m the first moment, r the root of the second one.
    """

    gradient: Tensor | None
    """None: the gradient takes no part beside m."""
    mean: Tensor
    root: Tensor | None
    """None: 1."""
    floor: Tensor


@dataclass(frozen=True)
class Rule:
    """One kind of optimizer.

    Args:
        parts: float64 steps of any shape, the group, and for NAdam the product of its momenta
            after these steps, or None to compute it.
        grown_up: the number of steps from which `parts` changes by less than 0.1%.
        second: name of the second moment in the optimizer's state.
        is_root: whether that is r already.
    """

    parts: Callable[[Tensor, Group, Tensor | None], Parts]
    grown_up: Callable[[Group], float]
    second: str = "exp_avg_sq"
    is_root: bool = False


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """The rule by which an optimizer's steps are corrected; None: it needs or has none."""
    return next((rule for kind, rule in _RULES.items() if isinstance(optimizer, kind)), None)


def grown_up(betas: tuple[float, float]) -> float:
    """Age in steps from which Adam's bias correction is below 0.1% and no longer worth its time."""
    slowest = max(betas)
    return math.log(1e-3) / math.log(slowest) if slowest > 0 else 0.0


def _adam(t: Tensor, group: Group, _: Tensor | None) -> Parts:
    """Kingma & Ba 2015, algorithm 1; numerator and denominator times the root of 1 - beta2^t."""
    beta1, beta2 = group["betas"]
    b2 = (1 - beta2**t).sqrt()
    return Parts(None, b2 / (1 - beta1**t), None, group["eps"] * b2)


def _nadam(t: Tensor, group: Group, product: Tensor | None) -> Parts:
    """Dozat 2016, algorithm 2, with the momenta mu_t that `torch.optim.NAdam` schedules."""
    (beta1, beta2), decay = group["betas"], group["momentum_decay"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (s * decay)) for s in (t, t + 1))
    if product is None:
        known = _momentum_products(float(beta1), float(decay), t.device)
        product = known[t.long().clamp(max=len(known) - 1)]
    product = product.to(t)
    b2 = (1 - beta2**t).sqrt()
    mean = mu_next / (1 - product * mu_next)
    return Parts((1 - mu) / (1 - product) * b2, mean * b2, None, group["eps"] * b2)


def _radam(t: Tensor, group: Group, _: Tensor | None) -> Parts:
    """Liu et al. 2020, algorithm 2: for the first steps no division by the second moment."""
    beta1, beta2 = group["betas"]
    b1, b2 = 1 - beta1**t, 1 - beta2**t
    most = 2 / (1 - beta2) - 1
    rho = most - 2 * t * beta2**t / b2
    normal = rho > 5
    squared = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
    mean = torch.where(normal, (squared.clamp(min=0) * b2).sqrt(), 1.0) / b1
    floor = torch.where(normal, torch.full_like(rho, group["eps"]), 1.0)
    return Parts(None, mean, normal.to(rho.dtype), floor)


def _adamax(t: Tensor, group: Group, _: Tensor | None) -> Parts:
    """Kingma & Ba 2015, algorithm 2, whose norm holds eps already."""
    mean = 1 / (1 - group["betas"][0] ** t)
    return Parts(None, mean, None, torch.zeros_like(mean))


@functools.lru_cache(maxsize=16)
def _momentum_products(beta1: float, decay: float, device: torch.device) -> Tensor:
    """float64 [n]: the product of the first 0, 1, ... momenta of NAdam, as far as not below 1e-9.

    float32 on devices that have no other.
    """
    products = [1.0]
    while products[-1] > 1e-9:
        mu = beta1 * (1 - 0.5 * 0.96 ** (len(products) * decay))
        products.append(products[-1] * mu)
    return torch.tensor(products, dtype=exact_kind(device), device=device)


def exact_kind(device: torch.device) -> torch.dtype:
    """float64 where a device has it: powers of numbers close to 1 lose a lot in float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _nadam_grown_up(group: Group) -> float:
    rate = -math.log(0.96) * group["momentum_decay"]
    schedule = math.log(1e3) / rate if rate > 0 else 0.0
    return max(grown_up(group["betas"]), schedule)


def _radam_grown_up(group: Group) -> float:
    beta1, beta2 = group["betas"]
    return _rectified(float(beta1), float(beta2))


@functools.lru_cache(maxsize=64)
def _rectified(beta1: float, beta2: float) -> float:
    age = max(8.0, grown_up((beta1, beta2)))
    most = 2 / (1 - beta2) - 1
    while 2 * age * beta2**age > 1e-3 * most:
        age *= 1.1
    return age


ADAM = Rule(_adam, lambda group: grown_up(group["betas"]))
NADAM = Rule(_nadam, _nadam_grown_up)
_RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,  # not a subclass of Adam in every torch
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: Rule(_radam, _radam_grown_up),
    torch.optim.Adamax: Rule(
        _adamax, lambda group: grown_up((group["betas"][0], 0.0)), "exp_inf", is_root=True
    ),
}


def step(tensors: Sequence[Tensor], parts: Parts, rule: Rule, group: Group) -> Tensor:
    """The step of `parts` at rate 1, made of both moments and, where it takes part, the gradient.

    Parts and tensors broadcast.
    """
    mean, square, *gradient = tensors
    kind = torch.promote_types(mean.dtype, torch.float32)
    root = square if rule.is_root else square.sqrt()
    made = mean * parts.mean.to(kind)
    if parts.gradient is not None:
        sign = -1 if group["maximize"] else 1
        made = made + gradient[0] * (sign * parts.gradient).to(kind)
    if parts.root is not None:
        root = root * parts.root.to(kind)
    return made / (root + parts.floor.to(kind))


def corrected(
    tensors: Sequence[Tensor],
    t: float,
    age: Tensor,
    rule: Rule,
    group: Group,
    product: Tensor | None,
) -> Tensor:
    """Weights that took the step of `t` as if they had taken that of their own age; on a CPU.

    The same as by `step`, in few passes.

    Args:
        tensors: weights, both moments and, where it takes part, the gradient, [n, B, B] each;
            changed.
        t: steps of the whole parameter.
        age: [n], steps of each block.
        rule, group, product: see `Rule`.
    """
    kind, kept = torch.promote_types(tensors[0].dtype, torch.float32), tensors[0].dtype
    w, m, root, *gradient = (x.to(kind) for x in tensors)
    lr, sign = float(group["lr"]), -1 if group["maximize"] else 1
    if not rule.is_root:
        root.sqrt_()
    made = rule.parts(torch.tensor(t, dtype=torch.float64), group, product)
    by = (root if made.root is None else root * made.root.to(kind)) + float(made.floor)
    if made.gradient is not None:
        w.addcdiv_(gradient[0], by, value=sign * lr * float(made.gradient))
    w.addcdiv_(m, by, value=lr * float(made.mean))
    # powers in single depend on where a number stands
    own = rule.parts(age.double()[:, None, None], group, None)
    m.mul_(own.mean.to(kind))
    if own.gradient is not None:
        m.addcmul_(gradient[0], own.gradient.to(kind), value=sign)
    if own.root is not None:
        root.mul_(own.root.to(kind))
    return w.addcdiv_(m, root.add_(own.floor.to(kind)), value=-lr).to(kept)
