"""The built-in tasks by name."""

from collections.abc import Callable

from ._arithmetic import ArithmeticTask
from ._prose import ProseTask
from ._tasks import Task

_MAKERS: dict[str, Callable[[], Task]] = {"arithmetic": ArithmeticTask, "prose": ProseTask}

TASK_NAMES = tuple(_MAKERS)
"""Names of the built-in tasks."""


def make_task(name: str) -> Task:
    """A built-in task: "arithmetic" or "prose".

    Raises:
        ValueError: another name.
    """
    if name not in _MAKERS:
        raise ValueError(f"task (={name!r}) must be one of {', '.join(TASK_NAMES)}.")
    return _MAKERS[name]()
