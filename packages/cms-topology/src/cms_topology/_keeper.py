"""Training goes on while its records cannot be written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class RecordKeeper:
    """Keeps a training alive that cannot write what people look at: snapshots, metrics.

    A full disk or a lost network drive costs such records, not the training: the `OSError` becomes
    a warning, one per outage. Checkpoints are no such records; whatever writes them should raise.

    ```python
    with keeper.writing("the metrics", step):
        logger.log(metrics, step)
    ```
    """

    def __init__(self) -> None:
        self._out: set[str] = set()

    @contextmanager
    def writing(self, what: str, step: int) -> Iterator[None]:
        """Around the writing of `what`, at an optimizer step; warns instead of an `OSError`.

        Raises:
            FileExistsError: no outage but a mistake, such as a second snapshot of one step.
        """
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            if what not in self._out:
                self._out.add(what)
                warnings.warn(
                    f"{what} of step {step} could not be written ({error}); training goes on "
                    "without. Free space or mend the directory: what comes then is written again. "
                    "Said once until that.",
                    stacklevel=4,
                )
        else:
            self._out.discard(what)
