"""The events of a training."""

from typing import TYPE_CHECKING

from torch import Tensor

from titanmac_integration._data._tasks import Mixture, Task

from ._report import PhaseReport

if TYPE_CHECKING:
    from ._trainer import Trainer


class TrainerCallback:
    """What :class:`Trainer` tells its callbacks. Deriving from this class is not required."""

    def on_fit_start(self, trainer: "Trainer", task: Task | Mixture, steps: int) -> None:
        """Before the first of ``steps`` optimizer steps on ``task``."""

    def on_backward(self, trainer: "Trainer", loss: Tensor) -> None:
        """The gradients of a whole step are there, not yet clipped; they may be changed.

        ``loss`` is the step's loss, a scalar without graph.
        """

    def on_step(self, trainer: "Trainer", step: int) -> None:
        """After the optimizer and the topology; the gradients are still there."""

    def on_fit_end(self, trainer: "Trainer", report: PhaseReport) -> None:
        """After the last step on a task."""
