"""Make the pictures of README and docs again: the app's tabs, and the growth benchmark's figure.

`make app`, and in another shell `python docs/screenshots.py`; CHROMIUM is the path of a Chromium, by default that
in PATH. The runs on the pictures are those that the app serves.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.growth import growth_lines

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
TEXT = "The kettle I ordered arrived with a cracked lid. Please send me a new one."


def opened(browser: Browser, address: str, **options: object) -> Page:
    """Open the app in a window of its own."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.set_default_timeout(300_000)  # models are loaded on first use
    page.goto(address)
    page.wait_for_selector("#comparison .card")
    return page


def compare(page: Page, name: str, *, full: bool) -> None:
    """Compare the three systems on one text, with DHRD's rationale."""
    page.get_by_label("text", exact=True).fill(TEXT)
    page.get_by_label("Show the reasoning head's rationale").check()
    for times in (1, 2):  # the first time models are loaded
        page.get_by_role("button", name="Compare", exact=True).click()
        page.wait_for_function(f"document.querySelector('#tally td:nth-child(2)')?.innerText === '{times}'")
    if not full:
        page.locator("#comparison").scroll_into_view_if_needed()
    page.screenshot(path=IMAGES / name, full_page=full)


def batch(page: Page) -> None:
    """Classify some test rows of support_triage."""
    lines = (ROOT / "dhrd_lib/data/support_triage/test.jsonl").read_text(encoding="utf-8").splitlines()[:25]
    rows = pd.DataFrame(map(json.loads, lines))[["text", "label"]].to_csv(index=False)
    page.get_by_role("tab", name="Batch").click()
    file = {"name": "rows.csv", "mimeType": "text/csv", "buffer": rows.encode()}
    page.locator("input[type=file]").set_input_files(file)
    page.wait_for_selector("#batch-status .notice")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.wait_for_selector("#batch-figures table")
    page.wait_for_selector(".js-plotly-plot .heatmaplayer image", state="attached")
    page.screenshot(path=IMAGES / "app-batch.png", full_page=True)


def stored_runs(page: Page) -> None:
    """Show the stored runs, their loss curves and ablations."""
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#model-card .model-card")
    page.wait_for_selector(".js-plotly-plot .scatterlayer", state="attached")
    page.wait_for_timeout(2_000)
    page.screenshot(path=IMAGES / "app-runs.png", full_page=True)


def main(address: str) -> None:
    """Write all pictures."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = opened(browser, address)
        compare(page, "app-compare.png", full=True)
        batch(page)
        stored_runs(page)
        narrow = opened(browser, address, viewport={"width": 390, "height": 860}, color_scheme="dark")
        compare(narrow, "app-narrow-dark.png", full=False)
        browser.close()
    results = ROOT / "benchmarks" / "results"
    points = json.loads((results / "growth.json").read_text(encoding="utf-8"))["points"]
    figure = growth_lines(pd.DataFrame(points)).update_layout(paper_bgcolor="white")
    figure.write_image(results / "growth.png", width=1400)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860")
