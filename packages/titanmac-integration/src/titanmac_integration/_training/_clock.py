"""Where the time of a training phase goes."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Splits wall time into training, evaluation and checkpoints; survives a resumption.

    Args:
        spent: seconds so far by kind, as :meth:`state_dict` returned them.
    """

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = {"training": 0.0, "evaluation": 0.0, "checkpoint": 0.0, **(spent or {})}
        """Seconds by kind, up to the last change of kind."""
        self.longest_evaluation = 0.0
        """Seconds of the longest evaluation of this process."""
        self._kind, self._since = "training", time.perf_counter()

    @property
    def training_seconds(self) -> float:
        """Seconds of training until now."""
        self._switch(self._kind)
        return self.spent["training"]

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Count the time inside as ``kind``, not as training."""
        self._switch(kind)
        before = self.spent[kind]
        try:
            yield
        finally:
            self._switch("training")
            if kind == "evaluation":
                took = self.spent[kind] - before
                self.longest_evaluation = max(self.longest_evaluation, took)

    def evaluation_fits(self, max_frac: float) -> bool:
        """Whether another evaluation keeps them within ``max_frac`` of the time; the first does."""
        if self.longest_evaluation == 0.0:
            return True
        evaluations = self.spent["evaluation"] + self.longest_evaluation
        return evaluations <= max_frac * (evaluations + self.training_seconds)

    def _switch(self, kind: str) -> None:
        now = time.perf_counter()
        self.spent[self._kind] += now - self._since
        self._kind, self._since = kind, now
