"""DriftController: how far the weights may drift, found by asking the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

START = 1e-5
"""First budget of relative drift: too small to do harm in any network seen."""
SMALLEST, LARGEST = 1e-8, 1.0
FAR = 0.1
"""Below this share of the target a measurement is far from it, and the budget may open fast."""


class DriftController:
    """Widens a drift budget while the old answers stay, and narrows it at once when they do not.

    After each measurement the budget is multiplied by sqrt(target / measured), at least `narrow`
    and at most `widen`, or `open` while the measurement is below a tenth of the target. The root,
    because a divergence is quadratic in the displacement near the consolidated weights and the
    budget is too: half of the correction at once is stable. A displacement that is projected into
    the narrower ellipsoid is closer to the old weights, so the answers come back; nothing is lost
    by having been too bold for a moment.

    What is multiplied is the budget or the drift that the weights really have, whichever is
    smaller: a budget that ran ahead of them would first have to come back before it held anything
    (the wind-up of integral controllers; Åström & Hägglund 2006, "Advanced PID Control", section
    3.5).

    All tensors: no host synchronisation.

    Args:
        target: divergence to aim at, nats.
        start: first budget.
        widen: largest growth of the budget per measurement.
        open: the same while the measurement is far below the target.
        narrow: largest shrinkage per measurement.
        smallest: the budget never falls below: where the answers do not respond to the budget, for
            lack of statistics on them, shrinking on would only stop all learning.
        device: of the measurements.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        target: float,
        *,
        start: float = START,
        widen: float = 1.1,
        open: float = 1.5,
        narrow: float = 0.3,
        smallest: float = SMALLEST,
        device: torch.device | str | None = None,
    ) -> None:
        if not target > 0:
            raise ValueError(f"target (={target}) must be greater than 0 nats.")
        if not 0 < smallest <= start <= LARGEST:
            raise ValueError(
                f"start (={start}) must be in [smallest, {LARGEST}] and smallest (={smallest}) "
                "greater than 0."
            )
        if not (widen > 1 and 0 < narrow < 1):
            raise ValueError(
                f"widen (={widen}) must be greater than 1 and narrow (={narrow}) in (0, 1)."
            )
        if not open >= widen:
            raise ValueError(f"open (={open}) must be at least widen (={widen}).")
        self.target, self.widen, self.open, self.narrow = target, widen, open, narrow
        self.start, self.smallest = start, smallest
        self.budget = torch.tensor(start, dtype=torch.float64, device=device)
        """0-d float64: the relative drift allowed now."""
        self.measured = torch.tensor(0.0, dtype=torch.float64, device=device)
        """0-d float64: the last measurement."""

    @torch.no_grad()
    def update(self, measured: Tensor, drift: Tensor | None = None) -> Tensor:
        """Take note of a divergence and return the new budget.

        Args:
            measured: 0-d, nats; not a number narrows.
            drift: 0-d, the largest relative drift of any weight matrix now; None: as large as the
                budget allows.
        """
        self.measured = measured.to(self.budget).nan_to_num(nan=torch.inf)
        used = self.budget
        if drift is not None:
            used = torch.minimum(used, drift.to(used).clamp(min=self.start))
        factor = (self.target / self.measured.clamp(min=1e-30)).sqrt().clamp(min=self.narrow)
        far = self.measured < FAR * self.target
        factor = torch.where(far, factor.clamp(max=self.open), factor.clamp(max=self.widen))
        self.budget = (used * factor).clamp(self.smallest, LARGEST)
        return self.budget

    def state_dict(self) -> dict[str, Tensor]:
        """Budget and last measurement."""
        return {"budget": self.budget, "measured": self.measured}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self.budget = state["budget"].to(self.budget).clone()
        self.measured = state["measured"].to(self.measured).clone()
