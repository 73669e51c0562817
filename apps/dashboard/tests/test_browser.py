"""The page in a real browser: what Streamlit's test runner cannot see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockell_dashboard.example import EXAMPLE_LAYERS, write_example_run
from blockell_format.snapshots import SnapshotWriter, open_run

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: python -m pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs the browser chromium on PATH: apt-get install chromium"
    ),
]
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Start `blockell-dashboard` on a free port of this machine."""
    processes: list[subprocess.Popen[str]] = []

    def start(directory: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "blockell_dashboard", str(directory), "--headless", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
        )
        processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            match = re.search(r"http://127\.0\.0\.1:\d+", line)
            if match:
                return match[0]
        raise AssertionError("the server did not start")

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture
def open_page(browser: sync_api.Browser) -> Iterator[Callable[..., sync_api.Page]]:
    """Open a page on which every error, and every request to another host, fails the test."""
    complaints: list[str] = []
    contexts: list[sync_api.BrowserContext] = []

    def start(url: str, scheme: str = "light") -> sync_api.Page:
        context = browser.new_context(
            viewport={"width": 1300, "height": 1500}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on(
            "console",
            lambda line: (
                complaints.append(f"console: {line.text}") if line.type == "error" else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                None
                if re.match(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:", request.url)
                else complaints.append(f"request to {request.url}")
            ),
        )
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []


def see_title(page: sync_api.Page, title: str) -> None:
    """Wait until a chart with this title is drawn."""
    page.locator(".gtitle", has_text=re.compile(f"^{re.escape(title)}")).first.wait_for()


def choose_layer(page: sync_api.Page, label: str) -> None:
    page.locator("[data-testid=stSelectbox]", has_text="Layer").locator("input").click()
    page.get_by_role("option", name=label).click()


def test_slider_layer_and_link(
    good_run: Path, serve: Callable[[Path], str], open_page: Callable[..., sync_api.Page]
) -> None:
    page = open_page(serve(good_run))
    see_title(page, "Block age at step 275")
    sync_api.expect(page.locator("[data-testid=stPlotlyChart]")).to_have_count(5)
    assert page.locator("[data-testid=stException]").count() == 0

    page.get_by_role("slider", name=re.compile("^Step")).focus()
    for step in (250, 225):
        page.keyboard.press("ArrowLeft")
        see_title(page, f"Block age at step {step}")
    page.get_by_role("button", name="Next").click()
    see_title(page, "Block age at step 250")
    choose_layer(page, "Block 1 · fc2")
    page.get_by_role("heading", name="Block 1 · fc2").wait_for()
    page.get_by_text("Born, died, kept", exact=True).click()
    see_title(page, "Born, died and kept at step 250")
    page.wait_for_url(re.compile("colour=change"))
    for part in ("step=250", "layer=blocks.1.mlp.fc2", "run=good"):
        assert part in page.url

    other = open_page(page.url)
    see_title(other, "Born, died and kept at step 250")
    other.get_by_role("heading", name="Block 1 · fc2").wait_for()


def test_hover_and_download(
    good_run: Path, serve: Callable[[Path], str], open_page: Callable[..., sync_api.Page]
) -> None:
    page = open_page(serve(good_run))
    see_title(page, "Block age at step 275")
    plot = page.locator("[data-testid=stPlotlyChart]").first
    area = plot.locator(".nsewdrag").first.bounding_box()
    assert area is not None
    texts = set()
    for part in (0.15, 0.4, 0.62, 0.83):
        page.mouse.move(area["x"] + area["width"] * part, area["y"] + area["height"] * part)
        label = plot.locator(".hovertext text").first
        label.wait_for()
        texts.add(label.text_content())
        page.wait_for_timeout(150)
    assert len(texts) > 1
    for text in texts:
        pattern = r"row \d+, column \d+(no block|age [\d,]+ stepsscore [\d.]+)weight\[\d+:\d+, "
        assert re.match(pattern, text or ""), text

    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").first.click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert download.value.suggested_filename == "good_blocks.0.mlp.fc1_step-275_topology.csv"
    assert lines[0].startswith("row,column,slot,")
    assert len(lines) == 1 + 64 * 12


def test_a_dark_page_has_dark_charts(
    good_run: Path, serve: Callable[[Path], str], open_page: Callable[..., sync_api.Page]
) -> None:
    page = open_page(serve(good_run), "dark")
    see_title(page, "Block age at step 275")
    canvas = page.locator("[data-testid=stPlotlyChart] .main-svg").first
    assert "rgb(14, 17, 23)" in (canvas.get_attribute("style") or "")


def test_a_live_run_appears_and_grows(
    tmp_path: Path, serve: Callable[[Path], str], open_page: Callable[..., sync_api.Page]
) -> None:
    page = open_page(serve(tmp_path / "runs"))
    page.get_by_role("heading", name="No run to show yet").wait_for()
    path = write_example_run(tmp_path / "runs" / "live", layers=EXAMPLE_LAYERS[:2], decisions=2)
    see_title(page, "Block age at step 25")

    run = open_run(path)
    layers = {name: run.snapshot(25).layer(name) for name in run.layers}
    with SnapshotWriter(path, layers=EXAMPLE_LAYERS[:2], mode="resume") as writer:
        writer.write(
            50,
            layers,
            checksums={name: [name] for name in layers},
            swap_counts=dict.fromkeys(layers, 9),
        )
    see_title(page, "Block age at step 50")

    # Paused, it stays where it is.
    page.get_by_text("Live", exact=True).click()
    page.wait_for_timeout(1000)
    (path / "topology" / "junk.txt").write_text("x")
    page.wait_for_timeout(5000)
    problems = page.locator("[data-testid=stMetric]", has_text="Problems")
    assert problems.locator("[data-testid=stMetricValue]").inner_text().strip() == "0"
    page.get_by_text("Live", exact=True).click()
    page.get_by_text("junk.txt").first.wait_for(state="attached")


def test_an_exported_report_draws_offline(
    good_run: Path, tmp_path: Path, browser: sync_api.Browser
) -> None:
    from blockell_dashboard.export import export_report

    report = export_report(good_run, tmp_path / "report.html", layers=["blocks.0.mlp.fc2"])
    context = browser.new_context(offline=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(report.as_uri())
    see_title(page, "Block age at step 275")
    sync_api.expect(page.locator(".js-plotly-plot .main-svg .gtitle")).to_have_count(5)
    context.close()
    assert errors == []
