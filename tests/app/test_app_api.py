"""The named endpoints over HTTP: results, plain error messages, the bounded queue, login."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from app_runs import BASELINE, DHRD, REASONING, TASK, TEXTS, store_runs
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.app import build, launch
from app.backend import Backend
from app.settings import Settings


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


def test_endpoints_are_named(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/runs", "/classify", "/classify_rows", "/cot", "/rationale"}
    parameters = {name: [one["parameter_name"] for one in named[name]["parameters"]] for name in named}
    assert parameters["/classify"] == parameters["/rationale"] == ["run", "texts"]
    assert parameters["/classify_rows"] == ["run", "rows"]
    assert parameters["/cot"] == ["task", "texts", "run", "max_new_tokens", "beside"]


def test_runs_lists_stored_runs(client):
    runs = {run["run"]: run for run in client.predict(api_name="/runs")}
    assert set(runs) == {BASELINE, DHRD, REASONING}
    assert runs[DHRD]["setting"] == "DHRD"
    assert runs[DHRD]["labels"] == list(TASK.label_names)
    assert runs[DHRD]["splits"]["test"]["primary"] == 0.5
    assert runs[REASONING]["splits"] == {"dev": {}, "test": {}}


def test_classify_matches_backend(client, settings):
    actual = client.predict(DHRD, TEXTS, api_name="/classify")
    expected = Backend(settings).classify(DHRD, TEXTS)
    assert actual["label"] == expected.label
    assert actual["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert actual["latency_ms"] > 0
    assert (actual["tokens_read"], actual["tokens_written"], actual["tokens_cut"]) == (expected.tokens_read, 0, 0)
    assert client.predict(DHRD, TEXTS["text"], api_name="/classify")["label"] == expected.label
    rows = client.predict(DHRD, [TEXTS, {"text": "x"}], api_name="/classify_rows")
    assert set(rows) == {"labels", "probabilities", "seconds", "inputs_cut"}
    assert (rows["labels"][0], len(rows["labels"]), len(rows["probabilities"])) == (expected.label, 2, 2)


def test_cot_streams_and_ends_with_answer(client):
    job = client.submit("support_triage", TEXTS, REASONING, 12, api_name="/cot")
    assert set(job.result()["answer"]["probabilities"]) == set(TASK.label_names)
    assert len(job.outputs()) > 1
    assert set(job.outputs()[0]) == {"text", "tokens", "latency_ms", "answer"}


def test_cancelled_job_stops_computing(client):
    job = client.submit("support_triage", {"text": "x"}, "zero-shot", 500, api_name="/cot")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    started = time.perf_counter()
    client.predict(DHRD, TEXTS, api_name="/classify")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/classify", ("<b>'x'</b> & co", TEXTS), """There is no finished run "<b>'x'</b> & co" with a model"""),
        ("/classify", (DHRD, {"body": "x"}), "input 1 lacks 'text'; expected a dict with 'text'."),
        ("/classify", (DHRD, ["x"]), "input 1 is of the type list; expected a dict with 'text'."),
        ("/classify", (REASONING, TEXTS), "(beta = 0), so its classifier is untrained; expected CoT decoding"),
        ("/classify_rows", (REASONING, [TEXTS]), "Run 'tiny-reasoning' was trained without the class loss"),
        ("/classify_rows", (DHRD, [{"text": "<i>"}, {"text": ""}]), "input 2 has no text"),
        ("/rationale", ("<b>", TEXTS), "There is no finished run '<b>'"),
        ("/cot", ("a'task", TEXTS), """There is no task "a'task"; expected support_triage, everyday_nli"""),
        ("/cot", ("support_triage", TEXTS, "zero-shot", 501), "max_new_tokens is 501; expected 1 to 500."),
    ],
)
def test_error_is_plain_text(client, endpoint, arguments, message):
    with pytest.raises(AppError) as error:
        client.predict(*arguments, api_name=endpoint)
    assert message in str(error.value)


def test_full_queue_rejects_calls(address, client):
    def join(number: int) -> int:
        inputs = ["support_triage", TEXTS, "zero-shot", 500, None]
        body = {"data": inputs, "fn_index": number, "session_hash": "full"}
        return httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code

    endpoint = next(one for one in client.endpoints.values() if one.api_name == "/cot")
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(join, [endpoint.fn_index] * 60))
    assert set(codes) == {200, 503}


def test_login_is_needed_for_everything(settings):
    locked = Settings(runs=settings.runs, backbone="tiny", user="ada", password="a long secret")
    page = build(locked)
    address = launch(page, locked, prevent_thread_lock=True)[1].rstrip("/")
    try:
        refused = [
            httpx.post(f"{address}/gradio_api/upload", files={"files": ("rows.csv", b"text\nx\n")}),
            httpx.post(f"{address}/gradio_api/call/runs", json={"data": []}),
            httpx.post(f"{address}/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "s"}),
            httpx.post(f"{address}/gradio_api/run/predict", json={"data": [], "fn_index": 0, "session_hash": "s"}),
            httpx.get(f"{address}/gradio_api/info"),
            httpx.get(f"{address}/config"),
        ]
        assert [answer.status_code for answer in refused] == [401] * len(refused)
        assert all("a long secret" not in answer.text for answer in [*refused, httpx.get(address)])
        with pytest.raises(Exception, match=r"(?i)login|401|auth|credentials"):
            Client(address, verbose=False, auth=("ada", "wrong"))
        Client(address, verbose=False, auth=("ada", "a long secret"))
    finally:
        page.close()
