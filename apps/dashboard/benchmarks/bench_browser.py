"""Time the dashboard in a real browser: first chart, interactions, memory.

    python benchmarks/bench_browser.py [--snapshots 300] [--layers 16] [--json FILE]

Writes a made-up run into a temporary directory, serves it, and opens it in the system's Chromium.
A time is from the click to the changed title of the first chart. Needs playwright and chromium, and
Linux for the server's memory and processor time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_dashboard import long_layers, write_long_run
from playwright.sync_api import Page, sync_playwright

REPEATS = 10
WAIT_MS = 120_000


class Server:
    """`blockell-dashboard` in a process of its own, and what it costs."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-m", "blockell_dashboard", str(directory)]
        self.process = subprocess.Popen(
            [*command, "--headless", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
        )
        assert self.process.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in self.process.stdout)
        self.url = next(match[0] for match in found if match)

    def memory_mb(self) -> float:
        """Resident set."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def cpu_ms(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


def see(page: Page, title: str) -> None:
    """Wait until a chart with a title that begins so is drawn."""
    page.locator(".gtitle", has_text=re.compile(f"^{re.escape(title)}")).first.wait_for(
        timeout=WAIT_MS
    )


def repeated(server: Server, act: Callable[[int], None]) -> dict[str, float]:
    """Median and 80th percentile of the time until the page shows it, and the server's work."""
    times, before = [], server.cpu_ms()
    for index in range(REPEATS):
        start = time.perf_counter()
        act(index)
        times.append((time.perf_counter() - start) * 1e3)
    p50, p80 = np.percentile(times, [50, 80])
    work = (server.cpu_ms() - before) / REPEATS
    return {"p50_ms": round(p50), "p80_ms": round(p80), "server_cpu_ms": round(work)}


def measure(server: Server, page: Page, steps: list[int], layers: list[str]) -> dict[str, Any]:
    """Everything on one page, in this order."""
    results: dict[str, Any] = {"server_empty_mb": round(server.memory_mb())}
    for name in ("first_open", "second_open"):
        start, before = time.perf_counter(), server.cpu_ms()
        page.goto(server.url)
        see(page, f"Block age at step {steps[-1]:,}")
        results[f"{name}_ms"] = round((time.perf_counter() - start) * 1e3)
        results[f"{name}_server_cpu_ms"] = round(server.cpu_ms() - before)

    def previous(index: int) -> None:
        page.get_by_role("button", name="Previous").click()
        see(page, f"Block age at step {steps[-2 - index]:,}")

    def colour(index: int) -> None:
        label, title = (("Born, died, kept", "Born, died"), ("Age", "Block age"))[index % 2]
        page.locator(".st-key-colour").get_by_text(label, exact=True).click()
        see(page, title)

    def layer(index: int) -> None:
        page.locator("[data-testid=stSelectbox]", has_text="Layer").locator("input").click()
        page.get_by_role("option", name=layers[1 + index], exact=True).click()
        page.get_by_role("heading", name=layers[1 + index], exact=True).wait_for(timeout=WAIT_MS)
        swaps = page.locator(".st-key-chart-swaps .legendtext", has_text=layers[1 + index])
        swaps.wait_for(timeout=WAIT_MS)

    results["previous_step"] = repeated(server, previous)
    results["other_colour"] = repeated(server, colour)
    results["other_layer_first_time"] = repeated(server, layer)
    results["server_mb"] = round(server.memory_mb())
    results["page_heap_mb"] = round(page.evaluate("performance.memory.usedJSHeapSize") / 1e6)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=300)
    parser.add_argument("--layers", type=int, default=16, help="alternately 160 x 40 and 40 x 160")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    layers = long_layers(options.layers)
    labels = [f"Block {i // 2} · fc{i % 2 + 1}" for i in range(options.layers)]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        write_long_run(Path(directory) / "run", options.snapshots, layers)
        server = Server(Path(directory))
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        try:
            page = browser.new_page(viewport={"width": 1440, "height": 1800})
            steps = [10 * index for index in range(options.snapshots)]
            result = {
                "date": datetime.date.today().isoformat(),
                "snapshots": options.snapshots,
                "layers": options.layers,
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "load_before": round(os.getloadavg()[0], 1),
                **measure(server, page, steps, labels),
            }
        finally:
            browser.close()
            server.stop()
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
