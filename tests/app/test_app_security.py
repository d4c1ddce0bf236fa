"""What crafted requests can't do: read files, fetch addresses, run scripts, call from other sites, see keys."""

from __future__ import annotations

import http.server
import json
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
from app_runs import BASELINE, store_runs

from app.app import build, launch
from app.settings import MAX_FIELDS, MAX_FILE_MIB, Settings

KEY = "sk-a-key-that-must-stay-where-it-is-0123456789"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("app")
    (folder / "private.csv").write_text("text,label\n" + "secret one,a\nsecret two,b\n" * 10)
    return Settings(runs=store_runs(folder / "runs", BASELINE), backbone="tiny")


@pytest.fixture(scope="module")
def page(settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield build(settings)


@pytest.fixture(scope="module")
def address(page, settings) -> str:
    yield launch(page, settings, prevent_thread_lock=True)[1].rstrip("/")
    page.close()


def number_of(page, function: str) -> int:
    """Return the number of a private event by its function's qualified name."""
    return next(number for number, one in page.fns.items() if getattr(one.fn, "__qualname__", "") == function)


def call(page, address: str, function: str, *data: object) -> httpx.Response:
    """Call a private event as the page's script does, with data that the page would never send."""
    body = {"data": list(data), "fn_index": number_of(page, function), "session_hash": "crafted"}
    return httpx.post(f"{address}/gradio_api/run/predict", json=body)


def streamed(address: str, number: int, *data: object) -> list:
    """Return what a queued event gives at its end."""
    body = {"data": list(data), "fn_index": number, "session_hash": "crafted"}
    httpx.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
    url = f"{address}/gradio_api/queue/data?session_hash=crafted"
    with httpx.stream("GET", url, timeout=60) as answer:
        for line in filter(None, answer.iter_lines()):
            message = json.loads(line.removeprefix("data: "))
            if message["msg"] == "process_completed":
                return message["output"]["data"]
    pytest.fail("the stream ended early")


def file_data(path: object, **more: str) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def test_path_that_was_not_uploaded_is_not_read(page, address, settings):
    for path in (settings.runs.parent / "private.csv", settings.runs / BASELINE / "predictions_test.jsonl"):
        answer = call(page, address, "BatchTab._on_file", file_data(path), "support_triage", None, None)
        assert answer.status_code == 500
        assert "was not uploaded" in answer.text
        assert "secret" not in answer.text
    for path in (settings.runs / BASELINE / "config.json", "/etc/passwd", "README.md"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)


def test_path_in_place_of_task_is_not_read(page, address, settings):
    path = str(settings.runs.parent / "private.csv")
    for function, *more in (("CompareTab._on_example", 0, None, None, None), ("CompareTab._on_task",)):
        answer = call(page, address, function, path, *more)
        assert answer.status_code == 500
        assert "secret" not in answer.text


def test_app_fetches_nothing_for_a_visitor(page, address):
    asked = []

    class Inside(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        do_HEAD = do_GET

    server = http.server.HTTPServer(("127.0.0.1", 0), Inside)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/rows.csv"
    try:
        for data in (file_data(url), file_data("rows.csv", url=url)):
            answer = call(page, address, "BatchTab._on_file", data, "support_triage", None, None)
            assert answer.status_code == 500
        for path in (f"proxy={url}", f"file={url}"):
            assert httpx.get(f"{address}/gradio_api/{path}").status_code in (400, 403, 404)
    finally:
        server.shutdown()
    assert asked == []


def test_upload_stays_in_its_folder_and_is_no_page(address):
    files = {"files": ("../../../../outside.html", b"<script>alert(1)</script>")}
    (path,) = httpx.post(f"{address}/gradio_api/upload", files=files).json()
    assert ".." not in path
    assert Path(path).name == "outside.html"
    answer = httpx.get(f"{address}/gradio_api/file={path}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "html" not in answer.headers["content-type"]


def test_large_upload_is_refused(address):
    files = {"files": ("rows.csv", bytes(MAX_FILE_MIB * 2**20 + 1))}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).status_code == 413


def test_downloads_lie_in_the_apps_cache_alone(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page = build(settings)
    address = launch(page, settings, prevent_thread_lock=True)[1].rstrip("/")
    try:
        files = {"files": ("rows.csv", b"text,label\nMy lamp broke.,fix\n")}
        (path,) = httpx.post(f"{address}/gradio_api/upload", files=files).json()
        answer = call(page, address, "BatchTab._on_file", file_data(path), "support_triage", None, None)
        assert answer.status_code == 200
        run = number_of(page, "BatchTab._on_run")
        streamed(address, run - 1, None)  # the session's start, which comes before it
        mapping = ["text", *[None] * (MAX_FIELDS - 1), "label"]
        csv = streamed(address, run, None, None, "support_triage", BASELINE, None, *mapping)[4]
        assert "My lamp broke." in httpx.get(csv["url"]).text
        left = list(tmp_path.rglob("predictions.*"))
        assert len(left) == 2
        assert {file.relative_to(tmp_path).parts[0] for file in left} == {"gradio"}
    finally:
        page.close()


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "null"])
def test_other_sites_page_may_not_call(address, origin):
    url, headers = f"{address}/gradio_api/call/runs", {"Origin": origin}
    asked = httpx.options(url, headers={**headers, "Access-Control-Request-Method": "POST"})
    # Without asking first, a browser sends another site's JSON as plain text only.
    sent = httpx.post(url, headers={**headers, "Content-Type": "text/plain"}, content='{"data": []}')
    assert sent.status_code == 422
    assert "access-control-allow-origin" not in {**asked.headers, **sent.headers}


def test_no_key_is_on_the_page(page, address):
    for path in ("", "/config", "/gradio_api/info", "/gradio_api/startup-events"):
        assert KEY not in httpx.get(f"{address}{path}").text
    assert KEY not in json.dumps(page.get_config_file(), default=str)
