"""metrics.jsonl, read from where the last reading stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from ._files import MAX_STEP, open_regular
from ._json import from_plain, loads
from ._manifest import integer
from ._problems import Problem, describe

MAX_LINE_BYTES = 1 << 20
MAX_LISTED = 100
"""Bad lines listed one by one; more are counted."""
SETTLE_SECONDS = 10.0
"""A last line without an end that is older than this is a problem, not a line being written."""
_CHUNK_BYTES = 4 << 20
_MARK_BYTES = 256
"""How much of what was read last is compared, to notice that the file is another one."""


class Record(NamedTuple):
    """One good line."""

    attempt: int
    metrics: dict[str, Any]
    """Flat, with the step as first entry."""

    @property
    def step(self) -> int:
        """Step of the line."""
        step: int = self.metrics["step"]
        return step


def parse_record(line: bytes) -> Record:
    """Parse one line.

    Raises:
        ValueError: it is not a metrics record.
    """
    content = loads(line)
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise ValueError('is not an object with "step" and "metrics"')
    step = integer(content, "step", 0, MAX_STEP)
    attempt = integer(content, "attempt", 1, MAX_STEP) if "attempt" in content else 1
    flat = {"step": step, **from_plain(content["metrics"])}
    flat["step"] = step  # a metric called "step" gives way to the step of the line
    return Record(attempt, flat)


class MetricsReader:
    """Follows one metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.restarts = 0
        """How often the file was replaced and reading began anew."""
        self._reset()

    def _reset(self) -> None:
        self.records = []
        self._offset = 0
        self._line_number = 1
        self._tail = b""
        self._skipping = False
        self._mark = b""
        self._seen = (-1, -1)
        self._modified = 0.0
        self._bad: list[Problem] = []
        self._bad_count = 0
        self._unreadable: Problem | None = None

    @property
    def problems(self) -> list[Problem]:
        """Bad lines by number, and a last line that stays unfinished."""
        result = list(self._bad)
        if self._bad_count > len(self._bad):
            more = self._bad_count - len(self._bad)
            result.append(Problem(self.path, f"{more} more bad lines dropped"))
        if (self._tail or self._skipping) and time.time() - self._modified > SETTLE_SECONDS:
            reason = f"line {self._line_number} has no end and is not read"
            result.append(Problem(self.path, reason))
        if self._unreadable is not None:
            result.append(self._unreadable)
        return result

    def update(self) -> bool:
        """Read what is new; True when there are new records or the file was replaced."""
        before = len(self.records), self.restarts
        self._unreadable = None
        try:
            with open_regular(self.path) as fd:
                status = os.fstat(fd)
                seen = status.st_mtime_ns, status.st_size
                if seen != self._seen:
                    self._follow(fd, status.st_size)
                self._seen, self._modified = seen, status.st_mtime
        except FileNotFoundError:
            pass  # nothing was logged yet
        except (ValueError, OSError) as error:
            self._unreadable = Problem(self.path, describe(error))
        return before != (len(self.records), self.restarts)

    def _follow(self, fd: int, size: int) -> None:
        """Read from where the last reading stopped, or anew if it is another file."""
        os.lseek(fd, max(0, self._offset - len(self._mark)), os.SEEK_SET)
        if size < self._offset or os.read(fd, len(self._mark)) != self._mark:
            self._reset()
            self.restarts += 1
            os.lseek(fd, 0, os.SEEK_SET)
        while chunk := os.read(fd, _CHUNK_BYTES):
            self._offset += len(chunk)
            self._mark = (self._mark + chunk)[-_MARK_BYTES:]
            self._take(chunk)

    def _take(self, chunk: bytes) -> None:
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        for line in lines:
            if self._skipping:
                self._skipping = False
            elif len(line) > MAX_LINE_BYTES:
                self._complain("is too long")
            elif line.strip():
                self._parse(line)
            self._line_number += 1
        if len(self._tail) > MAX_LINE_BYTES:  # do not collect a line without an end in memory
            if not self._skipping:
                self._complain("is too long")
            self._skipping = True
            self._tail = b""

    def _parse(self, line: bytes) -> None:
        try:
            self.records.append(parse_record(line))
        except ValueError as error:
            self._complain(describe(error))

    def _complain(self, reason: str) -> None:
        self._bad_count += 1
        if len(self._bad) < MAX_LISTED:
            self._bad.append(Problem(self.path, f"line {self._line_number} dropped: {reason}"))
