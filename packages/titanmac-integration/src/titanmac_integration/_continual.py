"""Tasks one after another: what was learned, and what was lost on the way."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ._data._tasks import Task
from ._metrics import relative_forgetting
from ._model._titanmac import TitanMAC
from ._training._trainer import PhaseReport, Trainer


@dataclass
class ContinualResult:
    """Figures of one model over a sequence of tasks."""

    model: str
    """Name of the model in tables."""
    parameters: int
    """Trainable values; blocks that are absent do not count."""
    tasks: list[str]
    """Names of the tasks in training order."""
    metrics: list[str]
    """Name of each task's measure."""
    chance: list[float]
    """Value of each task's measure without learning."""
    matrix: list[list[float]]
    """``matrix[i][j]``: measure of task j after training on i tasks; row 0 is untrained."""
    phases: list[PhaseReport]
    """Report of the training on each task."""
    column_entropy: float | None = None
    """Mean over the block-sparse layers at the end, in [0, 1]; None for a dense model."""
    density: float | None = None
    """Mean over the block-sparse layers; None for a dense model."""
    swap_rates: list[float] = field(default_factory=list)
    """Share of all live blocks swapped, per decision, over all tasks."""

    @property
    def seconds(self) -> float:
        """Training time over all tasks, without evaluation."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def topology_share(self) -> float:
        """Share of the training time that topology work took."""
        return sum(phase.topology_seconds for phase in self.phases) / self.seconds

    def after_learning(self, task: int) -> float:
        """Measure of a task directly after training on it."""
        return self.matrix[task + 1][task]

    def at_end(self, task: int) -> float:
        """Measure of a task after the whole sequence."""
        return self.matrix[-1][task]

    def forgetting(self, task: int) -> float | None:
        """Relative forgetting of a task over what came after it; None for the last one."""
        if task == len(self.tasks) - 1:
            return None
        return relative_forgetting(self.after_learning(task), self.at_end(task), self.chance[task])

    def to_dict(self) -> dict[str, Any]:
        """Everything above as JSON types."""
        return {
            **asdict(self),
            "seconds": self.seconds,
            "topology_share": self.topology_share,
            "relative_forgetting": [self.forgetting(i) for i in range(len(self.tasks))],
        }


def run_continual(
    trainer: Trainer,
    tasks: Sequence[Task],
    steps: Sequence[int],
    *,
    name: str = "model",
    between: Callable[[Trainer, int], None] | None = None,
) -> ContinualResult:
    """Train on ``tasks`` in turn and evaluate all of them before, between and after.

    Args:
        trainer: a fresh trainer.
        tasks: the sequence; no data of earlier tasks is used for later ones.
        steps: optimizer steps per task.
        name: name of the model in the result.
        between: called with the trainer and the number of the task just learned (from 0) before
            the next one begins: the moment to consolidate, grow and attach a ``RetentionGuard``.

    Raises:
        ValueError: as many tasks as step counts are needed, and at least one.
    """
    if not tasks or len(tasks) != len(steps):
        raise ValueError(
            f"steps (={list(steps)}) must have one entry per task (={[t.name for t in tasks]})."
        )
    model: TitanMAC = trainer.model
    matrix = [_measures(trainer, tasks)]
    phases = []
    for number, (task, count) in enumerate(zip(tasks, steps, strict=True)):
        if number and between is not None:
            between(trainer, number - 1)
        phases.append(trainer.fit(task, count))
        matrix.append(_measures(trainer, tasks))
    stats = [layer.get_topology_stats() for layer in model.block_sparse_layers.values()]
    return ContinualResult(
        model=name,
        parameters=model.num_parameters,
        tasks=[task.name for task in tasks],
        metrics=[task.metric for task in tasks],
        chance=[task.chance for task in tasks],
        matrix=matrix,
        phases=phases,
        column_entropy=sum(s.column_entropy for s in stats) / len(stats) if stats else None,
        density=sum(s.density for s in stats) / len(stats) if stats else None,
        swap_rates=[rate for phase in phases for rate in phase.swap_rates],
    )


def _measures(trainer: Trainer, tasks: Sequence[Task]) -> list[float]:
    measures = [task.evaluate(trainer.model) for task in tasks]
    named = {f"eval/{t.name}/{t.metric}": value for t, value in zip(tasks, measures, strict=True)}
    trainer.log(named)
    return measures
