"""Render the README's picture from a demo run: python docs/images/render.py runs/demo

Needs the dashboard, playwright and a Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from blockell_dashboard import figures
from blockell_format.snapshots import open_run

LAYER = "blocks.1.mlp.fc2"


def main() -> None:
    run = open_run(sys.argv[1])
    step = run.steps[-1]
    figure = figures.topology_heatmap(
        run.snapshot(step).layer(LAYER), run.layers[LAYER], colour="age", step=step, height=360
    )
    page_html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
    target = Path(__file__).parent / "topology.png"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 960, "height": 380}, device_scale_factor=1.5)
        page.set_content(page_html)
        page.wait_for_selector(".plotly .heatmaplayer, .plotly .main-svg")
        page.wait_for_timeout(500)
        page.screenshot(path=str(target))
        browser.close()
    print(f"wrote {target.name} from step {step} of {LAYER}")


if __name__ == "__main__":
    main()
