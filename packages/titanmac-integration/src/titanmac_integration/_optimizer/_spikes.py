"""Loss spikes: does the loss jump when the topology changes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossSpike(NamedTuple):
    """A loss above the limit, soon after a decision."""

    step: int
    """Optimizer step whose loss it was."""
    decision: int
    """Step of the decision before it."""
    loss: float
    mean: float
    """Running mean of the losses up to the decision."""

    @property
    def ratio(self) -> float:
        """Loss over its running mean."""
        return self.loss / self.mean


@dataclass
class LossSpikeDetector:
    """Compares the losses just after every decision with the running mean before it.

    Losses on an accelerator are kept as tensors and read together when `flush` is called, so that
    watching costs no synchronisation per step.

    Args:
        factor: a loss above `factor` times the running mean is a spike.
        watch: how many steps after a decision are looked at.
        decay: of the running mean, which is corrected for its start like Adam's moments.
        history: how many spikes and ratios are kept, the latest ones.

    Raises:
        ValueError: a setting outside its range.
    """

    factor: float = 2.0
    watch: int = 10
    decay: float = 0.98
    history: int = 1000

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError(f"factor (={self.factor}) must be above 1.")
        if self.watch < 1:
            raise ValueError(f"watch (={self.watch}) must be at least 1 step.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay (={self.decay}) must be in [0, 1).")
        self.spikes: list[LossSpike] = []
        """Spikes so far."""
        self.ratios: list[tuple[int, float]] = []
        """Per decision that has been watched to its end: its step and the largest loss ratio."""
        self._pending: list[tuple[int, Tensor | float]] = []
        self._sum = self._weight = 0.0
        self._decisions: list[int] = []
        self._open: tuple[int, float, float] | None = None
        """The decision being watched: step, running mean at it, largest ratio so far."""

    def record(self, step: int, loss: Tensor | float) -> None:
        """Note the loss of `step`; it is looked at when `flush` is called."""
        self._pending.append((step, loss.detach() if isinstance(loss, Tensor) else float(loss)))

    def decided(self, step: int) -> None:
        """Note that the topology changed after `step`."""
        self._decisions = [*self._decisions, step][-self.history :]

    @property
    def running_mean(self) -> float | None:
        """Mean of the losses flushed so far, recent ones counting most; None before the first."""
        return self._sum / self._weight if self._weight else None

    def flush(self) -> list[LossSpike]:
        """Read the losses noted so far; returns the spikes among them."""
        if not self._pending:
            return []
        steps = [step for step, _ in self._pending]
        values = _read([loss for _, loss in self._pending])
        self._pending.clear()
        found = []
        for step, loss in zip(steps, values, strict=True):
            found += self._look(step, float(loss))
        self.spikes = (self.spikes + found)[-self.history :]
        return found

    def _look(self, step: int, loss: float) -> list[LossSpike]:
        # a decision follows the update of its step, so the next step's loss is the first to tell
        while self._decisions and self._decisions[0] < step:
            self._close()
            mean = self.running_mean
            decision = self._decisions.pop(0)
            if mean is not None and mean > 0:
                self._open = (decision, mean, 0.0)
        found = []
        if self._open is not None:
            decision, mean, worst = self._open
            if step - decision > self.watch:
                self._close()
            else:
                # a loss that is not finite is the worst of all
                ratio = loss / mean if loss == loss else float("inf")
                self._open = (decision, mean, max(worst, ratio))
                if ratio > self.factor:
                    found.append(LossSpike(step, decision, loss, mean))
        if abs(loss) < float("inf"):
            self._sum = self.decay * self._sum + (1 - self.decay) * loss
            self._weight = self.decay * self._weight + (1 - self.decay)
        return found

    def _close(self) -> None:
        if self._open is not None:
            self.ratios = [*self.ratios, (self._open[0], self._open[2])][-self.history :]
            self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Running mean, open decision, spikes and ratios; pending losses are flushed first."""
        self.flush()
        return {
            "sum": self._sum,
            "weight": self._weight,
            "decisions": list(self._decisions),
            "open": list(self._open) if self._open else None,
            "spikes": [list(spike) for spike in self.spikes],
            "ratios": [list(ratio) for ratio in self.ratios],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._pending.clear()
        self._sum, self._weight = state["sum"], state["weight"]
        self._decisions = list(state["decisions"])
        self._open = tuple(state["open"]) if state["open"] else None
        self.spikes = [LossSpike(*spike) for spike in state["spikes"]]
        self.ratios = [(int(step), float(ratio)) for step, ratio in state["ratios"]]


def _read(losses: list[Tensor | float]) -> list[float]:
    """The losses as numbers, with one wait for the device."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    if not tensors:
        return [float(loss) for loss in losses]
    device = tensors[0].device
    together = torch.stack(
        [torch.as_tensor(loss, device=device).reshape(()).double() for loss in losses]
    )
    return [float(value) for value in together.tolist()]
