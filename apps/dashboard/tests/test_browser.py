"""The page in a real browser: what Streamlit's test runner cannot see."""

from __future__ import annotations

import contextlib
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
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: sync_api.Browser) -> Iterator[sync_api.BrowserContext]:
    """One for all pages, so that Streamlit's own files are loaded only once."""
    context = browser.new_context(viewport={"width": 1300, "height": 1500})
    context.set_default_timeout(WAIT_MS)
    yield context
    context.close()


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    """`blockell-dashboard` on a free port of this machine."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blockell_dashboard", str(directory), "--headless", "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
    )
    try:
        assert process.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        yield next(match[0] for match in found if match)
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def good_url(good_run: Path) -> Iterator[str]:
    with serving(good_run) as url:
        yield url


@pytest.fixture
def open_page(context: sync_api.BrowserContext) -> Iterator[Callable[..., sync_api.Page]]:
    """Open a page on which every error, and every request to another host, fails the test."""
    complaints: list[str] = []
    pages: list[sync_api.Page] = []

    def start(url: str, scheme: str = "light") -> sync_api.Page:
        page = context.new_page()
        pages.append(page)
        page.emulate_media(color_scheme=scheme)
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on(
            "console",
            lambda line: complaints.append(line.text) if line.type == "error" else None,
        )
        page.on("request", lambda request: check_host(request.url))
        page.goto(url)
        return page

    def check_host(url: str) -> None:
        if not re.match(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:", url):
            complaints.append(f"request to {url}")

    yield start
    for page in pages:
        page.close()
    assert complaints == []


def see_title(page: sync_api.Page, title: str) -> None:
    """Wait until a chart with this title is drawn."""
    page.locator(".gtitle", has_text=re.compile(f"^{re.escape(title)}")).first.wait_for()


def choose_layer(page: sync_api.Page, label: str) -> None:
    page.locator("[data-testid=stSelectbox]", has_text="Layer").locator("input").click()
    page.get_by_role("option", name=label).click()


def test_slider_layer_and_link(good_url: str, open_page: Callable[..., sync_api.Page]) -> None:
    page = open_page(good_url)
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


def test_hover_and_download(good_url: str, open_page: Callable[..., sync_api.Page]) -> None:
    page = open_page(good_url)
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


def test_a_dark_narrow_page_has_dark_charts_and_whole_numbers(
    good_url: str, open_page: Callable[..., sync_api.Page]
) -> None:
    page = open_page(good_url, "dark")
    page.set_viewport_size({"width": 1024, "height": 900})
    see_title(page, "Block age at step 275")
    canvas = page.locator("[data-testid=stPlotlyChart] .main-svg").first
    assert "rgb(14, 17, 23)" in (canvas.get_attribute("style") or "")
    for part in ("stMetricLabel", "stMetricValue", "stMetricDelta"):
        cut = page.locator(f"[data-testid={part}] *").evaluate_all(
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"
            ".map(e => e.textContent)"
        )
        assert cut == [], part


def test_a_live_run_appears_and_grows(
    tmp_path: Path, open_page: Callable[..., sync_api.Page]
) -> None:
    with serving(tmp_path / "runs") as url:
        watch_a_live_run(tmp_path, open_page(url))


def watch_a_live_run(tmp_path: Path, page: sync_api.Page) -> None:
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


def test_the_retention_page_and_its_link(
    good_run: Path, tmp_path: Path, open_page: Callable[..., sync_api.Page]
) -> None:
    path = Path(shutil.copytree(good_run, tmp_path / "both"))
    results = Path(__file__).parent / "data" / "retention.jsonl"
    shutil.copy(results, path)
    with serving(path) as url:
        page = open_page(url)
        see_title(page, "Block age at step 275")
        page.get_by_text("Retention", exact=True).click()
        see_title(page, "Score matrix")
        page.get_by_text("Forgetting", exact=True).click()
        see_title(page, "Forgetting matrix")
        page.wait_for_url(re.compile("matrix=change"))
        sync_api.expect(page.locator("[data-testid=stPlotlyChart]")).to_have_count(4)
        assert page.locator("[data-testid=stException]").count() == 0
        with page.expect_download() as download:
            page.locator(".st-key-csv-tradeoff").get_by_role("button").first.click()
        lines = Path(download.value.path()).read_text().splitlines()
        assert lines[0].startswith("method,arch,dial,seed,new_task_nats,old_task_kept")
        assert len(lines) == 1 + 6

        other = open_page(page.url)
        see_title(other, "Forgetting matrix")
        with (path / "retention.jsonl").open("a") as file:
            file.write('{"version": 1, "id": "cut o')
        other.get_by_role("heading", name="Problems (1)").wait_for()
        for opened in (page, other):  # or they complain that the server is gone
            opened.close()


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
