"""The named endpoints over HTTP: the same answers, errors in words, a bounded line, and no file but one's own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from app_runs import DHRD, REASONING, TASK, store_runs
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.app import build, launch
from app.backend import Backend
from app.settings import Settings

TEXTS = {"text": "My lamp broke on the second day."}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(runs=store_runs(tmp_path_factory.mktemp("runs")), backbone="tiny")


@pytest.fixture(scope="module")
def address(settings) -> str:
    page = build(settings)
    yield launch(page, settings, prevent_thread_lock=True)[1].rstrip("/")
    page.close()


@pytest.fixture(scope="module")
def client(address) -> Client:
    return Client(address, verbose=False)


def test_the_endpoints_are_named(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/runs", "/classify", "/classify_rows", "/cot", "/rationale"}


def test_runs_lists_what_is_stored(client):
    runs = {run["run"]: run for run in client.predict(api_name="/runs")}
    assert runs[DHRD]["setting"] == "DHRD"
    assert runs[DHRD]["labels"] == list(TASK.label_names)


def test_classify_is_the_backends(client, settings):
    found = client.predict(DHRD, TEXTS, api_name="/classify")
    expected = Backend(settings).classify(DHRD, TEXTS)
    assert found["label"] == expected.label
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert found["latency_ms"] > 0


def test_rows_come_back_in_their_order(client):
    rows = [{"text": f"{TEXTS['text']} {n}"} for n in range(20)]
    found = client.predict(DHRD, rows, api_name="/classify_rows")
    alone = [client.predict(DHRD, row, api_name="/classify")["label"] for row in rows[:3]]
    assert found["labels"][:3] == alone
    assert len(found["probabilities"]) == 20


def test_cot_streams_and_ends_with_an_answer(client):
    job = client.submit("support_triage", TEXTS, REASONING, 12, api_name="/cot")
    assert set(job.result()["answer"]["probabilities"]) == set(TASK.label_names)
    assert len(job.outputs()) > 1


def test_a_cancelled_job_stops_computing(client):
    job = client.submit("support_triage", {"text": "x"}, "zero-shot", 500, api_name="/cot")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    started = time.perf_counter()
    client.predict(DHRD, TEXTS, api_name="/classify")
    assert time.perf_counter() - started < 5


def test_an_error_is_a_sentence_and_not_html(client):
    with pytest.raises(AppError, match="There is no finished run &#x27;&lt;b&gt;&#x27;"):
        client.predict("<b>", TEXTS, api_name="/classify")


def test_when_the_line_is_full_the_next_is_told_so(address, client):
    """Held up by one long decoding, the line takes what it says it takes, and answers 503 to the rest."""

    def join(number: int) -> int:
        inputs = ["support_triage", TEXTS, "zero-shot", 500, None]
        body = {"data": inputs, "fn_index": number, "session_hash": "full"}
        return httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code

    endpoint = next(one for one in client.endpoints.values() if one.api_name == "/cot")
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(join, [endpoint.fn_index] * 60))
    assert set(codes) == {200, 503}


def test_no_file_but_an_upload_is_served(address, settings):
    for path in (settings.runs / DHRD / "config.json", "/etc/passwd", "README.md"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)


def test_with_a_user_nobody_else_gets_in(settings):
    locked = Settings(runs=settings.runs, backbone="tiny", user="ada", password="a long secret")
    page = build(locked)
    address = launch(page, locked, prevent_thread_lock=True)[1].rstrip("/")
    try:
        assert httpx.get(f"{address}/gradio_api/info").status_code == 401
        with pytest.raises(Exception, match=r"(?i)login|401|auth|credentials"):
            Client(address, verbose=False, auth=("ada", "wrong"))
        Client(address, verbose=False, auth=("ada", "a long secret"))
    finally:
        page.close()
