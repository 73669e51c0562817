"""What a step of the optimizer did."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cms_topology import StepReport, TopologyDecisionResult, TopologyManager

from ._spikes import LossSpike

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


@dataclass(frozen=True)
class OptimizerReport:
    """What one call of `DeepNestedOptimizer.step` did.

    Rates are computed when they are read for the first time: a report that nobody reads waits for
    no device.
    """

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
    spikes: tuple[LossSpike, ...] = ()
    """Loss spikes found at this step, among the losses recorded since the last look."""
    _manager: TopologyManager | None = field(default=None, repr=False)

    @property
    def swaps(self) -> dict[str, TopologyDecisionResult]:
        """Per layer, the outcome of the decision; empty when none was due."""
        return self.topology.swaps if self.topology is not None else {}

    @cached_property
    def swap_rate(self) -> float | None:
        """Share of all live blocks that this step swapped; None when no decision was due."""
        return self.topology.swap_rate if self.topology is not None else None

    @cached_property
    def rolling_swap_rate(self) -> float | None:
        """Mean of the last ten decisions' swap rates; None when no decision was due."""
        return self._manager.swap_rate if self._manager is not None and self.swaps else None


def make_report(
    optimizer: DeepNestedOptimizer, loss: Any, topology: StepReport | None
) -> OptimizerReport:
    """The report of the step just made; tells the spike detector of a decision."""
    due = optimizer.cms.due(optimizer.global_step)
    found = tuple(optimizer.spikes.flush()) if 1 in due else ()
    if topology is not None and topology.swaps:
        optimizer.spikes.decided(optimizer.global_step)
    controller = optimizer.controller
    return OptimizerReport(
        step=optimizer.global_step,
        due_levels=due,
        loss=loss,
        topology=topology,
        lr_factors=tuple(controller.factors) if controller is not None else None,
        spikes=found,
        _manager=optimizer.topology,
    )
