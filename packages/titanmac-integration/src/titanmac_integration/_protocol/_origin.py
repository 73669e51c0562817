"""Where a record comes from: code, versions, machine and time."""

from __future__ import annotations

import functools
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("titanmac-integration", "cms-topology", "blockell-kernels", "blockell-format")


def origin(device: torch.device) -> dict[str, Any]:
    """What must be known to make a record again, as JSON types."""
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "tf32": device.type == "cuda" and _tf32(),
    }


@functools.cache
def commit() -> str | None:
    """Of the checkout that this code is run from, "-dirty" if it was changed; None outside of one.

    An installed package may lie in somebody else's checkout, which does not know this file.
    """
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7")


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    # without locks: a training must not stand in the way of somebody who commits
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout, nothing installed
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where `platform` knows the architecture only
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)
