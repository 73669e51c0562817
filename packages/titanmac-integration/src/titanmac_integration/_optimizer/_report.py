"""What a step of the optimizer did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cms_topology import StepReport, TopologyDecisionResult

from ._spikes import LossSpike


@dataclass(frozen=True)
class OptimizerReport:
    """What one call of `DeepNestedOptimizer.step` did."""

    step: int
    """Optimizer steps so far, this one included."""
    due_levels: tuple[int, ...]
    """Levels of the clock that were due: parameters of these levels moved; for the topology, 0
    accumulates, 1 scores, 2 decides."""
    loss: Any = None
    """What the closure returned; None without one."""
    topology: StepReport | None = None
    """What the topology did; None when the optimizer drives none."""
    lr_factors: tuple[float, ...] | None = None
    """The controller's factor per parameter group; None without a controller."""
    rolling_swap_rate: float | None = None
    """Mean share of blocks swapped per decision, over the last ten; None before the first."""
    spikes: tuple[LossSpike, ...] = ()
    """Loss spikes found at this step, among the losses recorded since the last look."""

    @property
    def swaps(self) -> dict[str, TopologyDecisionResult]:
        """Per layer, the outcome of the decision; empty when none was due."""
        return self.topology.swaps if self.topology is not None else {}

    @property
    def swap_rate(self) -> float | None:
        """Share of all live blocks that this step swapped; None when no decision was due."""
        return self.topology.swap_rate if self.topology is not None else None
