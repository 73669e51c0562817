"""Names of a run's files, atomic writing, careful opening."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there, runs are not locked
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
TOPOLOGY_DIR = "topology"
LOCK_FILE = ".writer.lock"
TEMPORARY_PREFIX = ".tmp-"
MAX_STEP = 10**15

_SNAPSHOT_NAME = re.compile(r"step-([0-9]{8,16})(?:\.a([0-9]{1,9}))?\.safetensors")


def snapshot_name(step: int, attempt: int) -> str:
    """`step-00001200.safetensors`, from the second attempt on `step-00001200.a2.safetensors`."""
    suffix = "" if attempt == 1 else f".a{attempt}"
    return f"step-{step:08d}{suffix}.safetensors"


def parse_snapshot_name(name: str) -> tuple[int, int] | None:
    """Step and attempt of a canonical snapshot name, else None."""
    match = _SNAPSHOT_NAME.fullmatch(name)
    if match is None:
        return None
    step, attempt = int(match[1]), int(match[2] or 1)
    return (step, attempt) if name == snapshot_name(step, attempt) else None


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power failure, where the system can do that."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same directory, fsync, rename, fsync the directory."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[int]:
    """Open a regular file for reading and yield its descriptor; never blocks on a pipe.

    Raises:
        ValueError: it is something else than a regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a regular file")
        yield fd
    finally:
        os.close(fd)


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end of the file."""
    parts = []
    while size > 0:
        part = os.read(fd, min(size, 1 << 24))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The whole of a file that must be small.

    Raises:
        ValueError: not a regular file, or larger than `limit_bytes`.
        OSError: it cannot be read.
    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise ValueError(f"has {size} bytes; more than {limit_bytes} are not read")
        return read_exactly(fd, limit_bytes)


class DirectoryLock:
    """Keeps a second process from writing to the same run; released when the process ends.

    A POSIX record lock: forked children do not hold it, so a killed trainer's data loaders do
    not block its restart. Where the system or the file system has no locks, it does nothing.
    """

    def __init__(self, directory: Path) -> None:
        self._fd: int | None = None
        self.held = False
        if fcntl is None:
            return
        fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except (BlockingIOError, PermissionError):
            owner = os.read(fd, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise FileExistsError(
                f"another process (pid {owner}) is writing to {directory}; wait for it to end, "
                "or write to another directory."
            ) from None
        except OSError:  # a file system without locks
            os.close(fd)
            return
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
        self._fd = fd

    def release(self) -> None:
        """Let the next writer in."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
