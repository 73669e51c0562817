"""Where the time goes, by a clock that the test turns."""

from collections.abc import Callable

import pytest

from titanmac_integration import (
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
)
from titanmac_integration._training import _clock
from titanmac_integration._training._clock import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_clock, "time", made)
    return made


def test_time_is_split_by_kind(clock: Clock) -> None:
    watch = Stopwatch({"training": 7.0})
    clock.now += 5.0
    with watch.doing("evaluation"):
        clock.now += 2.0
    with watch.doing("checkpoint"):
        clock.now += 1.0
    clock.now += 3.0
    assert watch.training_seconds == 15.0
    assert watch.spent == {"training": 15.0, "evaluation": 2.0, "checkpoint": 1.0}


def test_time_is_counted_when_an_evaluation_fails(clock: Clock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch.doing("evaluation"):
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1.0
    assert watch.training_seconds == 1.0


@pytest.mark.parametrize(("max_frac", "expected"), [(0.25, [2, 12, 18]), (1.0, range(2, 21, 2))])
def test_evaluations_keep_to_their_share(
    tiny_config: Callable[..., TitanMACConfig], clock: Clock, max_frac: float, expected: list[int]
) -> None:
    """Steps take a second, evaluations two: at most a quarter of the time after the first."""

    class Slow(ProseTask):
        def evaluate(self, model: object) -> float:
            clock.now += 2.0
            return 0.0

    class Steps:
        def on_step(self, trainer: Trainer, step: int) -> None:
            clock.now += 1.0

    class Log:
        def __init__(self) -> None:
            self.evaluated: list[int] = []

        def log(self, metrics: dict[str, float], step: int) -> None:
            if "eval/prose/bits_per_byte" in metrics:
                self.evaluated.append(step)

    log, task = Log(), Slow("some text to read " * 60)
    settings = TrainingConfig(batch_size=2, seq_len=8, eval_every=2, eval_max_frac=max_frac)
    options = {"eval_tasks": [task], "loggers": [log], "callbacks": [Steps()]}
    report = Trainer(create_titanmac_model(tiny_config()), settings, **options).fit(task, 20)
    assert log.evaluated == list(expected)
    assert report.seconds == 20.0
    assert report.eval_seconds == 2.0 * len(log.evaluated)
    assert report.tokens_per_second == report.tokens / 20.0
