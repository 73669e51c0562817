"""How much drift is allowed at a step: a fixed budget, or one that is found by watching."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._controller import SMALLEST, START, DriftController
from cms_topology._retention._probes import LogitsFn, Probes, measure_divergences

NARROW_BELOW = 1e-4
"""Budgets below this are narrow: what TF32 leaks is some 1e-6 where a weight matrix has moved far
along directions that the old task never uses."""
WATCHED_NATS = 0.001
FORECAST_NATS = 0.01


class Budget(Protocol):
    """What the guard asks before and after a projection."""

    def begin(self, model: nn.Module) -> None:
        """Look at the model before its first step."""
        ...

    def now(self, steps: int) -> Tensor | float:
        """Relative drift allowed after so many optimizer steps."""
        ...

    def observe(self, model: nn.Module, steps: int, since: int, drift: Tensor) -> None:
        """Look at the model after a projection at `steps`; the one before was at `since`.

        `drift` is the largest relative drift of any weight matrix after it, 0-d.
        """
        ...

    @property
    def narrow(self) -> bool:
        """Whether it takes more than TF32 to keep to the budget."""
        ...

    def figures(self) -> dict[str, float]:
        """For a log."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FixedBudget:
    """A number, reached along a ramp: value * min(1, steps / ramp)^2."""

    def __init__(self, value: float, ramp: int) -> None:
        self.value, self.ramp = value, ramp
        self._steps = 0

    def begin(self, model: nn.Module) -> None:
        pass

    def now(self, steps: int) -> float:
        self._steps = steps
        if steps >= self.ramp:
            return self.value
        return self.value * (max(steps, 1) / self.ramp) ** 2

    def observe(self, model: nn.Module, steps: int, since: int, drift: Tensor) -> None:
        pass

    @property
    def narrow(self) -> bool:
        return self.value < NARROW_BELOW

    def figures(self) -> dict[str, float]:
        return {"retention/budget": self.now(self._steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "ramp": self.ramp}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.ramp = state["value"], state["ramp"]


class WatchedBudget:
    """A `DriftController` that is shown now and then how far the answers to the probes have moved.

    Moved since the guard was built: what earlier tasks have cost the older ones cannot be had back
    by a smaller budget, which only pulls the weights to where this guard began. Counted again, it
    would leave no room for a third task.
    """

    def __init__(
        self,
        controller: DriftController,
        probes: list[Probes],
        measure_every: int,
        logits_fn: LogitsFn,
    ) -> None:
        self.controller, self.probes = controller, probes
        self.measure_every, self.logits_fn = measure_every, logits_fn
        self.base = torch.zeros(len(probes), dtype=torch.float64, device=controller.budget.device)
        """float64 [tasks]: divergence of every task's answers when the guard was built."""
        self._budget = _OnHost(controller.budget)

    def begin(self, model: nn.Module) -> None:
        self.base = measure_divergences(model, self.probes, self.logits_fn)

    def now(self, steps: int) -> Tensor:
        return self.controller.budget

    def observe(self, model: nn.Module, steps: int, since: int, drift: Tensor) -> None:
        if steps // self.measure_every > since // self.measure_every:
            found = measure_divergences(model, self.probes, self.logits_fn)
            self.controller.update((found - self.base).max().clamp(min=0), drift)
            self._budget.follow(self.controller.budget)

    @property
    def narrow(self) -> bool:
        return self._budget.value < NARROW_BELOW

    def figures(self) -> dict[str, float]:
        return {
            "retention/budget": float(self.controller.budget),
            "retention/divergence": float(self.controller.measured),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**self.controller.state_dict(), "base": self.base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state)
        self.base = state["base"].to(self.base).clone()
        self._budget = _OnHost(self.controller.budget)


class _OnHost:
    """A number of the device, for the host to read some steps later without holding the device up.

    Every rank of a data-parallel run reads the same one: it is waited for, however late.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._held = tensor.detach().to("cpu", copy=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._held = self._held.pin_memory()
            self._copied = torch.cuda.Event()

    def follow(self, tensor: Tensor) -> None:
        self._held.copy_(tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    @property
    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._held)


def make_budget(
    drift: str | float | DriftController | None,
    memory: Consolidation,
    device: torch.device,
    *,
    tolerance: float | None,
    ramp: int,
    measure_every: int,
    logits_fn: LogitsFn,
) -> Budget | None:
    """The budget a `RetentionGuard` was asked for; see there."""
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance (={tolerance}) must be greater than 0 nats.")
    if ramp < 0:
        raise ValueError(f"ramp (={ramp}) must be 0 or more steps.")
    if measure_every < 1:
        raise ValueError(f"measure_every (={measure_every}) must be at least 1.")
    if drift is None or drift == math.inf:
        return None
    probes = [p.to(device) for p in memory.probes]
    if isinstance(drift, DriftController):
        if not probes:
            raise ValueError(
                "drift (=DriftController) needs probes to watch; pass probes=make_probes(...) to "
                "consolidate."
            )
        return WatchedBudget(drift, probes, measure_every, logits_fn)
    if isinstance(drift, str):
        if drift != "auto":
            raise ValueError(
                f"drift (={drift!r}) must be 'auto', a number, a DriftController or None."
            )
        forecast = memory.drift_at(tolerance or FORECAST_NATS)
        if probes:
            smallest = SMALLEST if forecast is None else min(START, 1e-5 * forecast)
            controller = DriftController(
                tolerance or WATCHED_NATS, smallest=smallest, device=device
            )
            return WatchedBudget(controller, probes, measure_every, logits_fn)
        if forecast is None:
            raise ValueError(
                "drift (='auto') needs probes, or a sensitivity measured at consolidation: pass "
                "consolidate probes=make_probes(...), or a loss and sensitivity_batches >= 1; or "
                "pass drift a number, or None with eps."
            )
        return FixedBudget(forecast, ramp)
    if not drift > 0:
        raise ValueError(f"drift (={drift}) must be greater than 0; for no drift at all use eps=0.")
    return FixedBudget(float(drift), ramp)
