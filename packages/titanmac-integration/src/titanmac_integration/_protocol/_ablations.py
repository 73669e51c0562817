"""Our method with one part taken away or replaced, to see what the part is worth."""

from __future__ import annotations

from typing import Any, ClassVar

from cms_topology import TopologyManager
from titanmac_integration._training._trainer import Trainer

from ._projection import GrowingProjection, Projection


class OpenLoop(Projection):
    """No probes: the drift budget is the one forecast at consolidation."""

    name = "ours-open-loop"
    keeps = "covariance, no probes"
    probes = 0


class EveryStep(Projection):
    """Projects after every step, not after every tenth."""

    name = "ours-every-step"
    options: ClassVar[dict[str, Any]] = {"every": 1}


class Influence(Projection):
    """Inputs weigh as much as the answers depend on them."""

    name = "ours-influence"
    keeps = "covariance by influence"
    consolidation: ClassVar[dict[str, Any]] = {"influence": True}


class GrownAtRandom(GrowingProjection):
    """Grows at random places instead of where the old task has least energy."""

    name = "ours-grown-random"
    prefer = "random"


class Swapping(Projection):
    """Swaps blocks under retention: a block of an old task goes only for a price, compensated."""

    name = "ours-swapping"
    swaps = True
    swapping: ClassVar[dict[str, Any]] = {"drop_cost": 1e-4}

    def on_fit_start(self, trainer: Trainer, task: object, steps: int) -> None:
        if self.kept:
            trainer.manager = TopologyManager(
                trainer.model,
                trainer.optimizer,
                periods=trainer.config.level_periods,
                seed=trainer.config.seed,
                retention=self.kept[-1],
                **self.swapping,
            )
        super().on_fit_start(trainer, task, steps)


class GrownSwapping(Swapping, GrowingProjection):
    """Swaps blocks, and grows others for every new task."""

    name = "ours-grown-swapping"
    arch = "spare"


class SwappingUncompensated(Swapping):
    """The same without compensation of what a dropped block did."""

    name = "ours-swapping-uncompensated"
    swapping: ClassVar[dict[str, Any]] = {"drop_cost": 1e-4, "compensate": False}


class SwappingUnpriced(Swapping):
    """The same, any block may go, whatever it costs the old task."""

    name = "ours-swapping-unpriced"
    swapping: ClassVar[dict[str, Any]] = {"drop_cost": float("inf")}
