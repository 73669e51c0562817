"""How far the training on one task is; what a checkpoint must know of it."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from titanmac_integration._data._tasks import Mixture, Task

from ._clock import Stopwatch
from ._report import PhaseReport


class Phase:
    """A :meth:`Trainer.fit` under way.

    Args:
        task: what is trained on.
        steps: optimizer steps to take.
        window: losses are averaged over this many steps.
    """

    def __init__(self, task: Task | Mixture, steps: int, window: int) -> None:
        self.report = PhaseReport(task.name, steps, 0.0, 0.0, 0.0, 0, float("nan"))
        self.fingerprint = getattr(task, "fingerprint", task.name)
        self.done = 0
        """Optimizer steps taken."""
        self.recent: deque[float] = deque(maxlen=window)
        """Losses of the last steps."""
        self.watch = Stopwatch()
        self._logged_tokens, self._logged_seconds = 0, 0.0

    def count(self, loss: float, tokens: int) -> None:
        """Take note of an optimizer step."""
        self.done += 1
        self.recent.append(loss)
        self.report.tokens += tokens

    def tokens_per_second(self) -> float:
        """Since this was last asked; evaluations and checkpoints not counted."""
        tokens, seconds = self.report.tokens, self.watch.training_seconds
        rate = (tokens - self._logged_tokens) / max(seconds - self._logged_seconds, 1e-9)
        self._logged_tokens, self._logged_seconds = tokens, seconds
        return rate

    def update_report(self) -> PhaseReport:
        """The report as of now."""
        self.report.seconds = self.watch.training_seconds
        self.report.eval_seconds = self.watch.spent["evaluation"]
        self.report.checkpoint_seconds = self.watch.spent["checkpoint"]
        self.report.final_loss = fmean(self.recent) if self.recent else float("nan")
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`resumed` takes."""
        return {
            "report": asdict(self.update_report()),
            "fingerprint": self.fingerprint,
            "done": self.done,
            "recent": list(self.recent),
        }

    @classmethod
    def resumed(
        cls, state: Mapping[str, Any], task: Task | Mixture, steps: int, window: int
    ) -> "Phase":
        """The phase that ``state`` was taken from, to be continued.

        Raises:
            ValueError: another task, other data, or fewer steps than were taken already.
        """
        phase = cls(task, steps, window)
        for what, saved, mine in (
            ("task", state["report"]["task"], task.name),
            ("data", state["fingerprint"], phase.fingerprint),
        ):
            if saved != mine:
                raise ValueError(
                    f"{what} (={mine!r}) differs from that of the checkpoint (={saved!r}); "
                    "continue with what the training began with."
                )
        if steps < state["done"]:
            raise ValueError(
                f"steps (={steps}) must be at least {state['done']}, which the checkpoint has done."
            )
        phase.report = PhaseReport(**{**state["report"], "steps": steps})
        phase.done = state["done"]
        phase.recent.extend(state["recent"])
        report = phase.report
        phase.watch = Stopwatch(
            {
                "training": report.seconds,
                "evaluation": report.eval_seconds,
                "checkpoint": report.checkpoint_seconds,
            }
        )
        phase._logged_tokens, phase._logged_seconds = report.tokens, report.seconds
        return phase
