"""What this machine offers to the kernels: `python -m blockell_kernels.env`.

Prints versions, devices and, for every backend, whether it can run and why not. Paste it into a
report of a problem.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from blockell_kernels import _tuning
from blockell_kernels._backends import BACKEND_NAMES, ENV_VAR, SPARSE_ON, unavailable


def cpu_name() -> str:
    """The processor's model and its number of usable cores, as "2-core AMD EPYC"."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass  # not Linux
    return f"{os.cpu_count()}-core {model}"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(distribution.replace("-", "_"))
        return "not installed, but importable" if found else None


def tuning(device: str) -> str:
    """Where a device's tuning cache lies, and what it holds."""
    path = _tuning.file_for(device)
    if path is None:
        return f"switched off by {_tuning.ENV_VAR}"
    table = _tuning.table_for(device)
    if table is None:
        return f"none at {path}"
    count = sum(len(rows) for rows in table.cells.values())
    return f"{count} measurements, {table.date}, {path}"


def diagnostics() -> list[tuple[str, str]]:
    """Label and value of everything that `python -m blockell_kernels.env` prints."""
    facts = [("python", platform.python_version()), ("platform", platform.platform())]
    for name in ("blockell-kernels", "blockell-format", "triton", "numpy"):
        facts.append((name, version_of(name) or "not installed"))
    facts.append(("torch", torch.__version__))
    facts.append(("cpu", cpu_name()))
    facts.append(("cpu capability", torch.backends.cpu.get_cpu_capability()))
    facts.append(("cpu threads", str(torch.get_num_threads())))
    facts.append(("cuda built for", torch.version.cuda or "no (a CPU build of torch)"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            facts.append(
                (
                    f"cuda:{i}",
                    f"{properties.name}, capability {properties.major}.{properties.minor}, "
                    f"{properties.total_memory / 2**30:.0f} GiB, "
                    f"{properties.multi_processor_count} multiprocessors",
                )
            )
    else:
        facts.append(("cuda devices", "none visible"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts.append((f"tuning cache cuda:{i}", tuning(torch.cuda.get_device_name(i))))
    facts.append((ENV_VAR, os.environ.get(ENV_VAR) or "not set (auto)"))
    for name in BACKEND_NAMES:
        if name != "auto":
            why_not = unavailable(name)
            facts.append((f"backend {name}", f"no: {why_not}" if why_not else "available"))
    chosen = ", ".join(f"{device}: {name}, else dense" for device, name in SPARSE_ON.items())
    facts.append(("backend auto", f"where it wins {chosen}"))
    return facts


def main() -> None:
    """Print the diagnostics, one line each."""
    facts = diagnostics()
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        print(f"{label:<{width}}  {value}")


if __name__ == "__main__":
    main()
