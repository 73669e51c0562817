"""Ctrl-C and the signals of job schedulers: asked to stop, a training saves first."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from titanmac_integration._training._processes import launched_by_torchrun


class StopSignals:
    """Notes SIGINT and SIGTERM while it is entered; calling it tells whether one has come.

    A second SIGINT stops at once, as Python does, and so does the first signal while nothing would
    be lost by it (:meth:`at_once`); except under torchrun: there it is torchrun that passes the
    first one on a second time, and other processes wait.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """The first signal that came."""
        self._previous: dict[signal.Signals, Any] = {}
        self._at_once = False

    def __call__(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """What shells report for the signal: 130 after Ctrl-C."""
        return 128 + (self.signal_number or signal.SIGINT)

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: then nobody sends us signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that a signal may break off: raises ``KeyboardInterrupt`` inside of it."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal_number is not None
        self.signal_number = self.signal_number or number
        if launched_by_torchrun():
            return
        if self._at_once or (again and number == signal.SIGINT):
            raise KeyboardInterrupt


class TerminationInterrupts:
    """Lets SIGTERM raise ``KeyboardInterrupt``, as Ctrl-C does, while it is entered.

    Only the first one does, so that a scheduler that repeats it does not cut the saving off.
    """

    def __init__(self) -> None:
        self._came = False
        self._previous: Any = None
        self._installed = False

    @property
    def exit_status(self) -> int:
        """What shells report for the signal that interrupted: 130 after Ctrl-C, 143."""
        return 128 + (signal.SIGTERM if self._came else signal.SIGINT)

    def __enter__(self) -> "TerminationInterrupts":
        with contextlib.suppress(ValueError):  # not in the main thread: nobody sends us signals
            self._previous = signal.signal(signal.SIGTERM, self._interrupt)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._came:
            self._came = True
            raise KeyboardInterrupt
