"""The page in a real browser: predictions, streams, Stop, files up and down, no script of a visitor's."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from app_runs import TASK, store_runs

from app.app import build, launch
from app.settings import Settings
from dhrd_lib.cot import CoT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (set CHROMIUM to its path)"),
]
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ${1+1} {{2}}"
THREE_ANSWERS = "document.querySelectorAll('#comparison .verdict').length === 3"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def served(root: Path) -> Iterator[str]:
    settings = Settings(runs=root, results=root, backbone="tiny")
    page = build(settings)
    yield launch(page, settings, prevent_thread_lock=True)[1]
    page.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    yield from served(store_runs(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def empty_address(tmp_path_factory) -> Iterator[str]:
    yield from served(tmp_path_factory.mktemp("no-runs"))


def opened(browser, address: str, width: int = 1280):
    page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
    page.set_default_timeout(30_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#comparison .card")
    return page


@pytest.fixture
def page(browser, address) -> Iterator:
    page = opened(browser, address)
    yield page
    page.close()


def compare(page, text: str) -> None:
    page.get_by_label("text", exact=True).fill(text)
    page.get_by_role("button", name="Compare", exact=True).click()


def upload(page, name: str, content: str) -> None:
    page.get_by_role("tab", name="Batch").click()
    file = {"name": name, "mimeType": "text/csv", "buffer": content.encode()}
    page.locator("input[type=file]").set_input_files(file)


def test_compare_by_keyboard_shows_answers_latencies_and_tally(page):
    page.get_by_label("text", exact=True).focus()
    page.keyboard.type("My lamp broke.")
    page.keyboard.press("Shift+Enter")
    page.wait_for_function(THREE_ANSWERS)
    assert "Speed-up of DHRD over CoT" in page.inner_text("#comparison .words")
    page.wait_for_selector("#tally table")
    assert page.locator("#comparison .latency .bar-row").count() == 4


def test_example_has_gold_and_rationale_streams(page):
    page.get_by_label("Test example (gold label: text)").click()
    page.locator("ul[role=listbox] li").nth(2).click()
    page.wait_for_function("document.querySelector('textarea').value.length > 10")
    page.get_by_label("Show the reasoning head's rationale").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_selector("#comparison .mark")
    card = page.get_by_label("DHRD", exact=True)
    card.locator(".stream").wait_for()
    assert "does not depend on it" in card.inner_text()


@pytest.fixture
def slow_cot(monkeypatch) -> None:
    """The tiny backbone may have written its 500 tokens before a busy browser shows the first."""
    whole = CoT.stream

    def slow(self, *arguments) -> Iterator:
        with closing(whole(self, *arguments)) as steps:
            for step in steps:
                time.sleep(0.05)
                yield step

    monkeypatch.setattr(CoT, "stream", slow)


def test_stop_ends_cot_and_enables_compare(page, slow_cot):
    page.get_by_label("number input for CoT token budget").fill("500")
    page.keyboard.press("Tab")
    compare(page, "My lamp broke.")
    page.wait_for_selector("#comparison .cursor")
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.get_by_text("Stopped: no prediction.").wait_for()
    page.wait_for_function("!document.querySelector('#comparison .cursor')")
    sync_api.expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()


def test_script_tags_stay_text(page):
    upload(page, "rows.csv", 'text,label\n"' + EVIL.replace('"', "'") + '",<b>\n')
    page.wait_for_selector("#batch-status .notice")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.wait_for_selector("#batch-status .error")
    assert "the label '<b>'" in page.inner_text("#batch-status")
    page.get_by_label("Gold label column").click()
    page.get_by_role("option", name="(none)").click()
    page.get_by_role("button", name="Classify", exact=True).click()
    page.wait_for_selector("#batch-figures table")
    page.wait_for_function("document.querySelector('#batch-rows').innerText.includes('<script>window.hacked')")
    page.get_by_role("tab", name="Compare").click()
    compare(page, EVIL)
    page.wait_for_function(THREE_ANSWERS)
    assert page.evaluate("window.hacked") is None


def test_file_is_classified_filtered_and_downloaded(page, tmp_path):
    rows = [f"My {'lamp' if n % 2 else 'bill'} broke{' again' * n},{TASK.label_names[n % 5]}" for n in range(30)]
    upload(page, "rows.csv", "\n".join(["text,label", *rows]))
    page.get_by_role("button", name="Classify", exact=True).click()
    page.wait_for_selector("#batch-figures table")
    assert "[95% interval]" in page.inner_text("#batch-figures")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as JSONL").click()
    download.value.save_as(tmp_path / "actual.jsonl")
    actual = [json.loads(line) for line in (tmp_path / "actual.jsonl").read_text().splitlines()]
    differ = sum(row["agree"] == "no" for row in actual)
    assert len(actual) == 30
    assert 0 < differ < 30
    page.get_by_label("Only disagreements").check()
    page.get_by_text(f"{differ} rows", exact=True).first.wait_for()
    page.wait_for_selector(".js-plotly-plot")


def test_runs_tab_shows_table_card_and_curves_from_this_server_alone(page, address):
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#model-card .model-card")
    page.wait_for_selector(".js-plotly-plot")
    assert "tiny-dhrd" in page.inner_text("#runs-table")
    assert "No ablation's results" in page.inner_text("#ablation-status")
    assert [url for url in page.asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_no_tab_is_wider_than_window(browser, address, width):
    page = opened(browser, address, width)
    for tab in ("Compare", "Batch", "Runs"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_without_run_zero_shot_cot_answers(browser, empty_address):
    page = opened(browser, empty_address)
    assert "There is no trained run here yet" in page.inner_text("#training")
    sync_api.expect(page.get_by_role("button", name="Train the quick comparison")).to_be_enabled()
    compare(page, "My lamp broke.")
    page.get_by_label("CoT", exact=True).locator(".verdict").wait_for()
    assert "No trained run" in page.get_by_label("DHRD", exact=True).inner_text()
    page.close()


def test_closed_tab_stops_generation(browser, address, page):
    other = opened(browser, address)
    other.get_by_label("number input for CoT token budget").fill("500")
    other.keyboard.press("Tab")
    compare(other, "My lamp broke.")
    other.wait_for_selector("#comparison .cursor")
    other.close()
    compare(page, "My lamp broke.")
    page.wait_for_function(THREE_ANSWERS)
