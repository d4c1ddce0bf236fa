"""Rationales: protocol, teachers, store, filters, review and corruptions, against servers that are really there."""

import json
import logging
import multiprocessing
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Value
from fault_server import FaultServer, good_reply, job, run_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dhrd_lib.__main__ import app
from dhrd_lib.backbones import EMBEDDED, load_backbone
from dhrd_lib.config import ConfigError, TeacherConfig
from dhrd_lib.rationales import teachers
from dhrd_lib.rationales.generate import (
    FLAGS,
    Filters,
    drop_share,
    export,
    flags,
    generate,
    names_label,
    replace_share,
    report_on,
    review,
    select,
    store_for,
    truncate_rationales,
)
from dhrd_lib.rationales.store import RationaleStore, Record, StoreError
from dhrd_lib.rationales.teachers import (
    SENTINEL,
    LocalTeacher,
    OpenAITeacher,
    TeacherError,
    load_teacher,
    make_prompt,
    read_answer,
    split_reply,
    teacher_name,
    teacher_parameters,
)
from dhrd_lib.sequences import SequenceFormat
from dhrd_lib.studies.plots import compare_reports
from dhrd_lib.tasks import TASKS, Task, load_task
from dhrd_lib.widgets import ReviewPanel

KEY = "sk-canary-5f2b91c7d3e84a06"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Tests see no server, key or rationales but their own; backing off takes no time."""
    names = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DHRD_TEACHER_MODEL", "DHRD_RATIONALES_DIR", "DHRD_DATA_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture(scope="module")
def triage():
    task, data = load_task("support_triage")
    return task, data["train"]


@pytest.fixture
def rows(triage):
    return triage[1].select(range(12))


def served(server, **fields):
    return TeacherConfig(kind="openai", model="fixed", base_url=server.base_url, **fields)


def record(rationale="It burst.", **fields):
    values = {"idx": "0", "prompt_hash": "h", "teacher": "t", "parameters": {"protocol": "gold"}}
    return Record(**{**values, "rationale": rationale, "agreed": True, **fields})


def made(words, labels=None):
    """A split with the columns that `load_task` gives."""
    features = Features(
        {
            "text": Value("string"),
            "idx": Value("string"),
            "input_text": Value("string"),
            "label": ClassLabel(names=["fix", "refund", "explain"]),
            "rationale": Value("string"),
        }
    )
    n = len(words)
    return Dataset.from_dict(
        {
            "text": [f"text {i}" for i in range(n)],
            "idx": [str(i) for i in range(n)],
            "input_text": [f"Customer: text {i}\nWhat must happen next?" for i in range(n)],
            "label": labels or [i % 3 for i in range(n)],
            "rationale": words,
        },
        features=features,
    )


# --- prompts and answers -----------------------------------------------------------------------------


def test_the_gold_prompt_shows_input_labels_gold_and_sentinel(triage, rows):
    task, row = triage[0], rows[0]
    prompt = make_prompt(task, row, TeacherConfig())
    assert row["input_text"] in prompt
    assert ", ".join(task.verbalizers) in prompt
    assert f"Answer: {task.verbalizers[row['label']]}" in prompt
    assert SENTINEL in prompt
    assert "Let's think step by step" in prompt


def test_the_rejection_prompt_is_the_same_whatever_the_gold_label(triage, rows):
    config = TeacherConfig(protocol="rejection", temperature=0.7)
    prompts = {make_prompt(triage[0], {**rows[0], "label": label}, config) for label in range(5)}
    assert len(prompts) == 1


def test_a_prompt_of_ones_own_reads_the_tasks_fields(triage, rows):
    config = TeacherConfig(prompt="Why {label}? {text} [{labels}] {sentinel}")
    assert make_prompt(triage[0], rows[0], config).startswith("Why replace? Ordered the notched card")


@pytest.mark.parametrize(
    ("prompt", "protocol", "expected"),
    [
        ("{input} {label} {rationale}", "gold", "prompt reads 'rationale'; expected one of"),
        ("{input} {sentinel}", "gold", "doesn't give the label in the gold protocol"),
        ("{input} {label}", "rejection", "gives the label in the rejection protocol"),
        ("Say {label}.", "gold", "leaves the input out"),
    ],
)
def test_a_prompt_that_breaks_its_protocol_is_refused(triage, rows, prompt, protocol, expected):
    config = TeacherConfig(prompt=prompt, protocol=protocol, temperature=0.5)
    with pytest.raises(ConfigError, match=expected):
        make_prompt(triage[0], rows[0], config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"It burst. {SENTINEL} replace", ("It burst.", "replace")),
        (f"It burst.\n\n{SENTINEL}\n\nreplace\nbecause", ("It burst.", "replace")),
        ("It burst.", ("It burst.", "")),
        (f"{SENTINEL}", ("", "")),
        (f"<think>It burst? {SENTINEL} fix</think>\nYes. {SENTINEL} replace", ("Yes.", "replace")),
        ("<think>It never ends", ("", "")),
        ("", ("", "")),
    ],
)
def test_the_sentinel_parts_rationale_and_answer(text, expected):
    assert split_reply(text) == expected


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("support_triage", "Replace.", 1),
        ("support_triage", "The answer is **fix**", 2),
        ("support_triage", "fix or replace", None),
        ("support_triage", "fixture", None),
        ("support_triage", "", None),
        ("rte", "not entailment", 1),
        ("rte", "not_entailment", 1),
        ("rte", "Entailment", 0),
        ("boolq", "No, it isn't.", 0),
        ("boolq", "nobody knows", None),
        ("copa", "choice2", 1),
        ("copa", "The first", 0),
    ],
)
def test_an_answer_is_read_as_the_one_label_it_names(task, answer, expected):
    assert read_answer(answer, TASKS[task]) == expected


# --- configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "oracle"}, "kind is 'oracle'"),
        ({"protocol": "rejection"}, "temperature is 0 with protocol='rejection'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"concurrency": True}, "concurrency is True"),
        ({"model": " "}, "model is ' '"),
        ({"base_url": "localhost:8000"}, "base_url isn't an address"),
        ({"base_url": "http://[::1/v1"}, "base_url isn't an address"),
        ({"usd_per_million_tokens_in": float("nan")}, "usd_per_million_tokens_in is nan"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_refused_when_it_is_configured(fields, expected):
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        TeacherConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key_env": KEY},
        {"base_url": f"https://user:{KEY}@127.0.0.1/v1"},
        {"base_url": f"https://127.0.0.1/v1?key={KEY}"},
    ],
)
def test_a_key_in_the_configuration_is_refused_without_being_repeated(fields):
    with pytest.raises(ConfigError) as caught:
        TeacherConfig(**fields)
    assert KEY not in str(caught.value)


def test_a_teachers_file_is_read_and_its_typos_are_refused(tmp_path):
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps({"kind": "openai", "model": "m", "max_tokens": 99}))
    assert TeacherConfig.load(path).max_tokens == 99
    path.write_text(json.dumps({"maximum": 1}))
    with pytest.raises(ConfigError, match="maximum is not a field"):
        TeacherConfig.load(path)


def test_model_address_and_key_may_come_from_the_environment(monkeypatch, rows, triage, tmp_path):
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("DHRD_TEACHER_MODEL", "named-outside")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        done = generate(triage[0], rows.select([0]), TeacherConfig(kind="openai"), tmp_path, progress=False)
    assert done.stored == 1
    assert server.bodies[0]["model"] == "named-outside"


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(TeacherError, match="DHRD_TEACHER_MODEL"):
        load_teacher(TeacherConfig(kind="openai"))
    with pytest.raises(TeacherError, match="MY_KEY is empty"):
        load_teacher(TeacherConfig(kind="openai", model="m", api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", f"{KEY}\nnext line")
    with pytest.raises(TeacherError, match="MY_KEY holds no key") as caught:
        load_teacher(TeacherConfig(kind="openai", model="m", api_key_env="MY_KEY"))
    assert KEY not in str(caught.value)


# --- the store ---------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_added(tmp_path):
    store = RationaleStore(tmp_path / "deep" / "store.jsonl")
    there = [record(f"line\n{i} \u2028 ümlaut", idx=str(i), agreed=[True, False, None][i]) for i in range(3)]
    for one in there:
        store.append(one)
    assert store.read() == there
    assert store.path.read_bytes().count(b"\n") == 3


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.builds(
            Record,
            idx=st.text(),
            prompt_hash=st.text(),
            teacher=st.text(),
            parameters=st.dictionaries(st.text(), st.none() | st.integers(-9, 9) | st.text()),
            rationale=st.text(),
            answer=st.text(),
            agreed=st.none() | st.booleans(),
            tokens_in=st.none() | st.integers(0, 10**6),
            seconds=st.floats(0, 1e6),
            review=st.none() | st.just("edit"),
            original=st.none() | st.text(),
        ),
        max_size=4,
    )
)
def test_a_store_goes_to_a_dataset_and_back_unchanged(tmp_path, there):
    folder = tmp_path / str(time.monotonic_ns())
    store = RationaleStore(folder / "a.jsonl")
    for one in there:
        store.append(one)
    again = RationaleStore.from_dataset(store.to_dataset(), folder / "b.jsonl")
    assert again.read() == store.read() == there
    if there:
        with pytest.raises(StoreError, match="expected a new file"):
            RationaleStore.from_dataset(store.to_dataset(), folder / "b.jsonl")


def test_a_torn_last_line_is_moved_aside_wherever_it_was_cut(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    first, second = record("erst é"), record("zweit é", idx="1")
    store.append(first)
    start = store.path.stat().st_size
    store.append(second)
    whole = store.path.read_bytes()
    for cut in range(start + 1, len(whole) - 1):
        store.path.write_bytes(whole[:cut])
        shutil.rmtree(f"{store.path}.torn", ignore_errors=True)
        Path(f"{store.path}.torn").unlink(missing_ok=True)
        with pytest.warns(UserWarning, match="torn record"):
            assert store.read() == [first]
        assert Path(f"{store.path}.torn").read_bytes() == whole[start:cut] + b"\n"
        assert store.path.read_bytes() == whole[:start]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    store.append(record())
    store.path.write_bytes(store.path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.append(record(idx="1"))
    assert [one.idx for one in store.read()] == ["0", "1"]


def test_an_addition_after_a_torn_line_does_not_run_into_it(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    store.append(record())
    with store.path.open("ab") as file:
        file.write(b'{"idx": "1", "prom')
    with pytest.warns(UserWarning, match="torn record of 18 bytes"):
        store.append(record(idx="2"))
    assert [one.idx for one in store.read()] == ["0", "2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"idx": "1", "prom', "Unterminated string"),
        (b"[1]", "it is a list"),
        (b'{"idx": 1}', "its 'idx' isn't a str"),
        (b'{"idx": "1", "surprise": 2}', "unknown field 'surprise'"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_torn_line_in_the_middle_is_an_error_that_names_file_and_line(tmp_path, line, reason):
    store = RationaleStore(tmp_path / "store.jsonl")
    store.append(record())
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(StoreError, match=f"store.jsonl, line 2 isn't a whole record.*{reason}"):
        store.read()
    assert store.path.read_bytes() == whole + line + b"\n" + whole


def add_many(path, writer, count):
    store = RationaleStore(path)
    for i in range(count):
        store.append(record("x" * 3000, idx=f"{writer}-{i}"))


def test_processes_that_add_to_one_store_at_a_time_lose_nothing(tmp_path):
    path = tmp_path / "store.jsonl"
    together = [_spawn(add_many, path, writer, 60) for writer in range(3)]
    for process in together:
        process.join(60)
        assert process.exitcode == 0
    found = [one.idx for one in RationaleStore(path).read()]
    assert sorted(found) == sorted(f"{writer}-{i}" for writer in range(3) for i in range(60))


# --- asking a server ---------------------------------------------------------------------------------


def test_every_row_is_asked_once_and_a_second_run_asks_nothing(triage, rows, tmp_path):
    task = triage[0]
    with FaultServer(delay_s=0.05) as server:
        config = served(server, concurrency=3, usd_per_million_tokens_in=2.0, usd_per_million_tokens_out=10.0)
        first = generate(task, rows, config, tmp_path, progress=False)
        second = generate(task, rows, config, tmp_path, progress=False)
    assert set(server.asked.values()) == {1}
    assert server.most_at_once == 3
    assert (first.stored, first.replies, first.failed) == (12, 12, {})
    assert (first.tokens_in, first.tokens_out) == (1200, 240)
    assert first.usd == pytest.approx((1200 * 2 + 240 * 10) / 1e6)
    assert "12 rows: 0 stored before, 12 stored now, 0 failed" in str(first)
    assert "1200 tokens in, 240 tokens out, 0.0048 USD" in str(first)
    assert (second.stored_before, second.stored, second.replies) == (12, 0, 0)
    found = select(store_for(task, config, tmp_path), task, rows, config)
    assert [one.idx for one in found] == list(rows["idx"])
    for row, one in zip(rows, found, strict=True):
        assert good_reply(make_prompt(task, row, config), 0).startswith(one.rationale)
        assert (one.agreed, one.finish_reason, one.tokens_in, one.tokens_out) == (True, "stop", 100, 20)
        assert one.answer == task.verbalizers[row["label"]]


def test_a_change_of_prompt_teacher_or_parameters_starts_anew_in_the_same_store(triage, rows, tmp_path):
    task = triage[0]
    with FaultServer() as server:
        config = served(server)
        changes = [
            {},
            {"prompt": "{input}\nAnswer: {label}\nWhy? {sentinel}"},
            {"temperature": 0.5},
            {"max_tokens": 99},
            {"seed": 3},
        ]
        for number, change in enumerate(changes, 1):
            changed = served(server, **change)
            assert generate(task, rows, changed, tmp_path, progress=False).stored == 12
            store = store_for(task, changed, tmp_path)
            assert len(store.read()) == 12 * number
            hashes = {one.prompt_hash for one in select(store, task, rows, changed)}
            assert len(hashes) == 12
        # What doesn't change the words isn't a change.
        same = served(server, concurrency=1, timeout_s=5.0, max_retries=1, api_key_env="OTHER")
        assert generate(task, rows, same, tmp_path, progress=False).stored == 0
        relabelled = rows.map(lambda row: {"label": (row["label"] + 1) % 5})
        assert generate(task, relabelled, config, tmp_path, progress=False).stored == 12
    other = TeacherConfig(kind="openai", model="Fixed", base_url="http://127.0.0.1:1/v1")
    assert store_for(task, other, tmp_path).path == store.path
    assert select(store, task, rows, other) == [None] * 12


FAULTS = [
    "429",
    "500",
    "hang",
    "drop",
    "drop_midway",
    "broken_json",
    "html",
    "no_choices",
    "null_content",
    "cut_off",
    "400",
    "ok",
]


def test_faults_that_pass_are_retried_and_the_others_are_listed_and_asked_again(triage, rows, tmp_path):
    """Each row meets its fault at its first request; retries and the next run meet none."""
    task = triage[0]
    config = TeacherConfig(kind="openai", model="fixed", base_url="http://127.0.0.1:9/v1")
    fault = {make_prompt(task, row, config): kind for row, kind in zip(rows, FAULTS, strict=True)}
    with FaultServer(lambda prompt, nth: fault[prompt] if nth == 0 else "ok") as server:
        config = served(server, timeout_s=0.5, max_retries=2)
        first = generate(task, rows, config, tmp_path, progress=False)
        asked = {fault[prompt]: count for prompt, count in server.asked.items()}
        second = generate(task, rows, config, tmp_path, progress=False)
        third = generate(task, rows, config, tmp_path, progress=False)
    reasons = {FAULTS[int(idx)]: reason for idx, reason in first.failed.items()}
    assert reasons == {
        "broken_json": "the reply isn't JSON",
        "html": "the reply isn't a chat completion",
        "no_choices": "the reply isn't a chat completion",
        "400": reasons["400"],
    }
    assert reasons["400"].startswith("HTTP 400: ")
    assert all(asked[kind] == 2 for kind in ("429", "500", "hang", "drop", "drop_midway"))
    assert (first.stored, second.stored, second.failed, third.replies) == (8, 4, {}, 0)
    found = select(store_for(task, config, tmp_path), task, rows, config)
    by_fault = dict(zip(FAULTS, found, strict=True))
    assert by_fault["cut_off"].finish_reason == "length"
    assert by_fault["null_content"].rationale == ""
    assert Counter(one.idx for one in store_for(task, config, tmp_path).read()) == Counter(rows["idx"])
    report = report_on(task, rows, found)
    flagged = {idx: marks for idx, marks in zip(rows["idx"], report.rows["flags"], strict=True) if marks}
    assert flagged[str(FAULTS.index("cut_off"))] == ("no_answer", "cut_off")
    assert flagged[str(FAULTS.index("null_content"))] == ("no_answer", "empty")
    assert len(report.kept) == 10


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("429", "HTTP 429: ", 3),
        ("500", "HTTP 500: ", 3),
        ("hang", "no reply within 0.3 s, asked 3 times", 3),
        ("drop", "the connection failed (", 3),
        ("drop_midway", "the connection failed (", 3),
    ],
)
def test_a_fault_that_stays_fails_the_row_after_the_retries(triage, rows, tmp_path, fault, reason, requests):
    with FaultServer(lambda prompt, nth: fault) as server:
        config = served(server, timeout_s=0.3, max_retries=2)
        done = generate(triage[0], rows.select([0]), config, tmp_path, progress=False)
    assert done.stored == 0
    assert done.failed["0"].startswith(reason)
    assert sum(server.asked.values()) == requests


def test_retry_after_is_waited_for(triage, rows, tmp_path):
    with FaultServer(lambda prompt, nth: "429" if nth == 0 else "ok", retry_after="1") as server:
        start = time.monotonic()
        done = generate(triage[0], rows.select([0]), served(server), tmp_path, progress=False)
    assert done.stored == 1
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize("fault", ["401", "404"])
def test_a_refusal_that_holds_for_all_rows_ends_the_asking(triage, rows, tmp_path, fault):
    with FaultServer(lambda prompt, nth: fault) as server:
        done = generate(triage[0], rows, served(server, concurrency=1), tmp_path, progress=False)
    assert sum(server.asked.values()) == 1
    assert len(done.failed) == 12
    assert f"HTTP {fault}" in done.failed["11"]
    assert "not asked" in done.failed["11"]


def test_a_server_that_is_not_there_fails_every_row_with_a_reason(triage, rows, tmp_path):
    config = TeacherConfig(kind="openai", model="m", base_url=f"http://127.0.0.1:{_free_port()}/v1", max_retries=0)
    done = generate(triage[0], rows.select([0, 1]), config, tmp_path, progress=False)
    assert set(done.failed.values()) == {"the connection failed (ConnectError)"}


def test_a_server_that_counts_no_tokens_is_reported_as_such(triage, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(OpenAITeacher, "_one", lambda self, prompt, attempt: teachers.Reply("Why.", "stop"))
    config = TeacherConfig(kind="openai", model="m", base_url="http://127.0.0.1:9/v1")
    assert "(12 replies without)" in str(generate(triage[0], rows, config, tmp_path, progress=False))


def test_the_key_is_in_no_store_log_error_or_output(triage, rows, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    plans = ["echo_key", "echo_key_500", "401", "400", "hang", "broken_json", "ok"]
    said = []
    for plan in plans:
        with FaultServer(lambda prompt, nth, plan=plan: plan) as server:
            config = served(server, max_retries=1, timeout_s=0.3)
            done = generate(triage[0], rows.select([0]), config, tmp_path, progress=False)
            said += [repr(config), repr(load_teacher(config).__dict__["_config"]), repr(done), str(done)]
            assert plan not in ("echo_key", "ok") or done.stored == 1
    stores = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"***" in stores
    assert KEY.encode() not in stores
    everything = "\n".join([*said, caplog.text, *capfd.readouterr()])
    assert "HTTP 401" in everything
    assert KEY not in everything


def test_a_key_that_is_a_plain_word_does_not_black_out_the_text(triage, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "facts")
    with FaultServer() as server:
        config = served(server)
        generate(triage[0], rows.select([0]), config, tmp_path, progress=False)
    assert (
        "facts" in select(store_for(triage[0], config, tmp_path), triage[0], rows.select([0]), config)[0].rationale
    )


# --- rejection sampling and human rationales ---------------------------------------------------------


def test_rejection_keeps_the_first_answer_that_agrees_and_stops_there(triage, rows, tmp_path):
    task = triage[0]
    gold = {row["input_text"]: task.verbalizers[row["label"]] for row in rows}

    def reply(prompt, nth):
        right = next(label for text, label in gold.items() if text in prompt)
        wrong = "fix" if right != "fix" else "refund"
        agrees_at = {"replace": 0, "fix": 1, "explain": 2}.get(right, 99)
        return f"Try {nth}. {SENTINEL} {right if nth >= agrees_at else wrong}"

    with FaultServer(reply=reply) as server:
        config = served(server, protocol="rejection", tries=3, temperature=0.8, seed=5)
        generate(task, rows, config, tmp_path, progress=False)
        found = select(store_for(task, config, tmp_path), task, rows, config)
        for row, one in zip(rows, found, strict=True):
            tries = server.asked[make_prompt(task, row, config)]
            label = task.verbalizers[row["label"]]
            assert tries == {"replace": 1, "fix": 2, "explain": 3}.get(label, 3)
            assert one.agreed is (label in ("replace", "fix", "explain"))
            assert one.rationale == f"Try {tries - 1}."
        assert {body["seed"] for body in server.bodies} == {5, 6, 7}
        kept = report_on(task, rows, found).kept
        assert set(kept) == {one.idx for one in found if one.agreed}
        before = sum(server.asked.values())
        assert generate(task, rows, config, tmp_path, progress=False).replies == 0
        # One try more goes on from those that were made.
        more = served(server, protocol="rejection", tries=4, temperature=0.8, seed=5)
        again = generate(task, rows, more, tmp_path, progress=False)
        assert again.replies == sum(one.agreed is False for one in found)
        assert sum(server.asked.values()) == before + again.replies


def test_human_rationales_are_taken_from_the_data(tmp_path, task):
    data = made(["Because.", None, "Since."])
    config = TeacherConfig(protocol="human")
    done = generate(task, data, config, tmp_path)
    assert (done.stored, done.failed) == (2, {"1": "the data brings no rationale"})
    found = select(store_for(task, config, tmp_path), task, data, config)
    assert [one and one.rationale for one in found] == ["Because.", None, "Since."]
    assert store_for(task, config, tmp_path).path.name == "human.jsonl"
    assert report_on(task, data, found).kept == {"0": "Because.", "2": "Since."}
    changed = made(["Because of it.", None, "Since."])
    assert generate(task, changed, config, tmp_path).stored == 1


def test_exported_rationales_are_joined_by_load_task(triage, tmp_path, monkeypatch):
    export({"0": "Eins é", "3": "Drei"}, tmp_path / "support_triage.jsonl")
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(tmp_path))
    train = load_task("support_triage")[1]["train"]
    assert (train[0]["rationale"], train[3]["rationale"]) == ("Eins é", "Drei")
    assert train[1]["rationale"] == triage[1][1]["rationale"]


# --- kills and processes -----------------------------------------------------------------------------


_CONTEXT = multiprocessing.get_context("forkserver")


def _spawn(target, *arguments):
    """A process from a server that has imported the library, so that it is at work within moments."""
    _CONTEXT.set_forkserver_preload(["pytest", "dhrd_lib.rationales.generate"])
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _without_time(records):
    return sorted((one.key, one.rationale, one.answer, one.agreed, one.finish_reason) for one in records)


def _lines(store):
    return store.path.read_bytes().count(b"\n") if store.path.exists() else 0


def _kill_at_a_random_moment(process, ready, store, generator):
    """Kill a job while it sets out, or some moments after its store has grown by some records."""
    assert ready.wait(60)
    wanted, until = _lines(store) + generator.randint(0, 8), time.monotonic() + 30
    while _lines(store) < wanted and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 0.06))
    alive = process.is_alive()
    process.kill()
    process.join(30)
    assert alive, "the job was done before it could be killed"


@pytest.mark.timeout(300)
def test_a_job_killed_twenty_times_ends_with_each_row_once_as_if_unkilled(tmp_path):
    n_rows, generator, growth = 200, random.Random(0), []
    task, dataset = job(n_rows)
    with FaultServer(delay_s=0.05) as server:
        run_job(server.base_url, tmp_path / "unkilled", task, dataset)
        server.asked.clear()
        store = RationaleStore(tmp_path / "killed" / "support_triage" / "fixed.jsonl")
        for _ in range(20):
            before, ready = len(store.read()), _CONTEXT.Event()
            process = _spawn(run_job, server.base_url, tmp_path / "killed", task, dataset, ready)
            _kill_at_a_random_moment(process, ready, store, generator)
            growth.append(len(store.read()) - before)
        done = run_job(server.base_url, tmp_path / "killed", task, dataset)
    assert sum(grown > 0 for grown in growth) >= 10, f"too few kills met a job at work: {growth}"
    assert (done.stored_before, done.failed) == (sum(growth), {})
    assert done.stored == n_rows - sum(growth) > 0
    found = store.read()
    assert Counter(one.idx for one in found) == Counter(dataset["idx"])
    unkilled = RationaleStore(tmp_path / "unkilled" / "support_triage" / "fixed.jsonl").read()
    assert _without_time(found) == _without_time(unkilled)
    # A kill costs the requests in flight at most, and there are four of them.
    assert sum(server.asked.values()) <= n_rows + 4 * len(growth)


def test_two_processes_with_the_same_job_ask_for_no_row_twice(tmp_path):
    with FaultServer(delay_s=0.02) as server:
        both = [_spawn(run_job, server.base_url, tmp_path, *job(60)) for _ in range(2)]
        for process in both:
            process.join(60)
            assert process.exitcode == 0
    assert set(server.asked.values()) == {1}
    found = RationaleStore(tmp_path / "support_triage" / "fixed.jsonl").read()
    assert Counter(one.idx for one in found) == Counter(str(i) for i in range(60))


# --- local teachers ----------------------------------------------------------------------------------


def test_a_local_teacher_says_the_same_in_a_batch_as_alone(triage, rows):
    prompts = [make_prompt(triage[0], row, TeacherConfig())[-60 - 20 * i :] for i, row in enumerate(rows)]
    said = {}
    for batch_size in (1, 5):
        teacher = LocalTeacher(TeacherConfig(model="tiny", device="cpu", max_tokens=12, batch_size=batch_size))
        replies = dict(teacher.ask(prompts))
        said[batch_size] = [(replies[i].text, replies[i].tokens_in, replies[i].tokens_out) for i in range(12)]
        lengths = [len(teacher._backbone.tokenizer(f"{prompt}\n").input_ids) for prompt in prompts]
        assert [counts for _, counts, _ in said[batch_size]] == lengths
    assert said[1] == said[5]


def test_a_local_teachers_sampling_is_seeded_and_differs_between_tries(rows, triage):
    config = TeacherConfig(model="tiny", device="cpu", max_tokens=12, temperature=1.0, seed=1)
    prompts = [make_prompt(triage[0], row, config)[:80] for row in rows.select(range(3))]
    teacher = LocalTeacher(config)
    state = torch.get_rng_state()
    said = [[reply.text for _, reply in teacher.ask(prompts, attempt)] for attempt in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    assert torch.equal(state, torch.get_rng_state())


def test_a_local_row_ends_once_the_answer_after_the_sentinel_stands():
    tiny = load_backbone("tiny", device="cpu")
    ended = teachers._Ended(tiny.tokenizer, tiny.model.generation_config, 2, 2)
    texts = [f"So it is. {SENTINEL} fix\nAnd", "So it is, and it goes on and on" * 9]
    ids = [[1, 2, *tiny.tokenizer(text).input_ids] for text in texts]
    length = min(map(len, ids))
    stopped = [ended(torch.tensor([row[:n] for row in ids]), None).tolist() for n in range(3, length + 1)]
    text = tiny.tokenizer.decode(ids[0][2 : 2 + int(ended.places[0])])
    assert split_reply(text) == ("So it is.", "fix")
    assert text.endswith("fix\n")
    assert stopped[-1] == [True, False]
    assert ended(torch.tensor([[1, 2, 5], [1, 2, tiny.tokenizer.eos_token_id]]), None).tolist() == [True, True]


def test_a_prompt_beyond_the_context_fails_its_row_alone(triage, tmp_path):
    task, data = triage
    rows = data.select(range(2)).map(
        lambda row: {"input_text": row["input_text"] * (40 if row["idx"] == "0" else 1)}
    )
    config = TeacherConfig(model="tiny", device="cpu", max_tokens=4, prompt="{input} {label}")
    done = generate(task, rows, config, tmp_path, progress=False)
    assert done.stored == 1
    assert done.failed["0"].startswith("prompt and max_tokens take ")
    assert done.failed["0"].endswith(" tokens of 2048")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """`transformers serve` with the embedded backbone: its address, and what it calls the model."""
    folder = load_backbone(EMBEDDED, device="cpu").source
    port, log = _free_port(), tmp_path_factory.mktemp("serve") / "log.txt"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _wait_for(address, process, log):
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve didn't come up:\n{log.read_text(errors='replace')[-2000:]}")


@pytest.mark.timeout(400)
def test_transformers_serve_writes_rationales_for_twenty_rows(real_server, triage, tmp_path):
    task, data = triage
    rows = data.select(range(20))
    base_url, model = real_server
    config = TeacherConfig(kind="openai", model=model, base_url=base_url, max_tokens=16, concurrency=2)
    done = generate(task, rows, config, tmp_path, progress=False)
    assert (done.stored, done.failed, done.replies_without_usage) == (20, {}, 0)
    assert done.tokens_in > 20 * 100
    found = select(store_for(task, config, tmp_path), task, rows, config)
    assert [one.idx for one in found] == list(rows["idx"])
    assert all(one.rationale and one.finish_reason in ("stop", "length") for one in found)
    assert all(one.tokens_out <= 16 and one.seconds > 0 for one in found)
    assert generate(task, rows, config, tmp_path, progress=False).replies == 0
    # The same model asked directly, in one batch, sees the same prompts and says the same.
    direct = TeacherConfig(model=EMBEDDED, device="cpu", max_tokens=16, batch_size=3)
    generate(task, rows.select(range(3)), direct, tmp_path, progress=False)
    local = select(store_for(task, direct, tmp_path), task, rows.select(range(3)), direct)
    assert [one.tokens_in for one in local] == [one.tokens_in for one in found[:3]]
    assert [one.rationale for one in local] == [one.rationale for one in found[:3]]


# --- filters and report ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verbalizer", "expected"),
    [
        ("Give a refund.", "refund", True),
        ("It was Refunded, twice.", "refund", True),
        ("Refunding is due", "refund", True),
        ("The money goes back.", "refund", False),
        ("That entails it.", "entailment", True),
        ("It is entailed", "entailment", True),
        ("The tail is long.", "entailment", False),
        ("This contradicts that", "contradiction", True),
        ("a contradictory claim", "contradiction", True),
        ("It explains itself", "explain", True),
        ("An explained fee", "explain", True),
        ("a plain fee", "explain", False),
        ("Fixing it", "fix", True),
        ("the fixture", "fix", False),
        ("prefix", "fix", False),
        ("Escalation is due", "escalate", True),
        ("Replacements are sent", "replace", True),
        ("a place", "replace", False),
        ("Nobody knows; another note", "no", False),
        ("No, it isn't", "no", True),
        ("yesterday", "yes", False),
        ("Yes!", "yes", True),
        ("It is not entailed", "not entailment", True),
        ("It is entailed", "not entailment", False),
        ("the first one", "the first", True),
        ("first of all", "the first", False),
        ("", "fix", False),
    ],
)
def test_a_label_is_found_in_its_inflections_at_word_boundaries(text, verbalizer, expected):
    assert names_label(text, verbalizer) is expected


INPUT = "Customer: the paint kit burst and dried onto the paper before the course began\nWhat must happen next?"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ()),
        ({"agreed": False}, ("disagrees",)),
        ({"agreed": None}, ("no_answer",)),
        ({"agreed": None, "parameters": {"protocol": "human"}}, ()),
        ({"rationale": "It is to be replaced."}, ("leaks_label",)),
        ({"rationale": " \n"}, ("empty",)),
        ({"finish_reason": "length"}, ("cut_off",)),
        ({"rationale": " ".join(f"w{i}" for i in range(151))}, ("too_long",)),
        ({"rationale": "The kit burst open. " * 4}, ("repeats",)),
        (
            {"rationale": "The paint kit burst and dried onto the paper before the course began, so."},
            ("copies_input",),
        ),
    ],
)
def test_each_filter_finds_what_it_is_for_and_nothing_else(fields, expected):
    one = record(**{"rationale": "A kit that arrives burst is no use to her.", **fields})
    assert flags(one, INPUT, "replace") == expected


def test_filters_draw_their_lines_where_they_are_told():
    one = record("one two three four five six")
    assert flags(one, INPUT, "replace", Filters(max_words=5)) == ("too_long",)


@pytest.mark.parametrize("name", ["support_triage", "everyday_nli"])
def test_the_packaged_rationales_pass_every_filter(name):
    task, data = load_task(name)
    rows = data["train"]
    there = [
        record(row["rationale"], idx=row["idx"], agreed=None, parameters={"protocol": "human"}) for row in rows
    ]
    report = report_on(task, rows, there)
    assert report.leak_rate == 0.0
    assert len(report.kept) == len(rows)


def test_the_report_counts_every_filter_and_row(task):
    data = made(["x"] * 9)
    there = [
        record("They broke.", idx="0"),
        record("Refunding is owed.", idx="1"),
        None,
        record("They broke.", idx="3", agreed=False),
        record("", idx="4", agreed=None),
        record("They broke.", idx="5", finish_reason="length"),
        record("A fix is due.", idx="6", review="accept", original="A fix is due."),
        record("They broke.", idx="7", review="reject", original="They broke."),
        record("Because of an explanation and a refund.", idx="8"),
    ]
    report = report_on(task, data, there, failed={"2": "HTTP 500"})
    table = report.table()["count"]
    assert {name: count for name, count in table.items() if count} == {
        "rows": 9,
        "missing": 1,
        "failed": 1,
        "rationales": 8,
        "disagrees": 1,
        "no_answer": 1,
        "leaks_label": 2,
        "empty": 1,
        "cut_off": 1,
        "accept by hand": 1,
        "reject by hand": 1,
        "names another label (no filter)": 1,
        "kept": 3,
    }
    assert set(report.kept) == {"0", "6", "8"}
    assert report.leak_rate == 2 / 8
    by_label = report.by_label()
    assert by_label.loc["fix", "agreed"] == pytest.approx(2 / 3)
    assert by_label.loc["refund", "agreed"] == pytest.approx(2 / 3)
    assert by_label["rationales"].sum() == 8
    assert report.lengths()["max"] == 7
    figure = compare_reports({"small": report})
    bars = figure.data[0]
    shown = dict(zip(bars.y, bars.x, strict=True))
    assert set(shown) == {name.replace("_", " ") for name in [*FLAGS, "kept"]}
    assert shown["leaks label"] == pytest.approx(25.0)
    assert sorted(figure.data[1].x) == sorted(report.rows.loc[report.rows["rationale"].notna(), "words"])


# --- review ------------------------------------------------------------------------------------------


@pytest.fixture
def reviewed(task, tmp_path):
    """A task with four rationales of its own data in a store."""
    data = made(["They broke <b>.", "Refunding is owed.", "Nothing is wrong.", "They broke again."])
    config = TeacherConfig(protocol="human")
    generate(task, data, config, tmp_path)
    return task, data, store_for(task, config, tmp_path), config


def test_a_review_is_a_new_record_that_keeps_the_original_and_the_latest_counts(reviewed):
    task, data, store, config = reviewed
    teachers_own = store.read()
    one = review(store, select(store, task, data, config)[1], "reject")
    assert "1" not in report_on(task, data, select(store, task, data, config)).kept
    two = review(store, one, "edit", " Money is owed. ")
    review(store, two, "edit", "Money is due.")
    assert store.read()[:4] == teachers_own
    assert len(store.read()) == 7
    now = select(store, task, data, config)[1]
    assert (now.rationale, now.original, now.review) == ("Money is due.", "Refunding is owed.", "edit")
    assert report_on(task, data, select(store, task, data, config)).kept["1"] == "Money is due."
    assert generate(task, data, config, store.path.parent.parent).stored == 0


def test_a_review_of_another_kind_or_without_words_is_refused(reviewed):
    task, data, store, config = reviewed
    one = select(store, task, data, config)[0]
    with pytest.raises(ValueError, match="'maybe'"):
        review(store, one, "maybe")
    with pytest.raises(ValueError, match="empty"):
        review(store, one, "edit", "  ")
    assert len(store.read()) == 4


def test_the_panel_pages_shows_flags_and_stores_verdicts(reviewed):
    task, data, store, config = reviewed
    panel = ReviewPanel(task, data, store, config)
    assert "1 of 4" in panel.row.value
    assert panel.words.value == "They broke <b>."
    panel.next.click()
    assert "leaks label" in panel.row.value
    assert "<b>Gold</b>" in panel.row.value
    panel.reject.click()
    panel.next.click()
    panel.words.value = "All is <well>."
    panel.accept.click()
    assert "Before the edit" in panel.row.value
    assert "Nothing is wrong." in panel.row.value
    panel.next.click()
    panel.next.click()
    assert "4 of 4" in panel.row.value
    panel.words.value = ""
    panel.edit.click()
    assert "empty" in panel.message.value
    panel.previous.click()
    assert "3 of 4" in panel.row.value
    panel.choice.value = "not reviewed"
    assert "1 of 2" in panel.row.value
    panel.choice.value = "flagged"
    assert "1 of 1" in panel.row.value
    verdicts = [(one.idx, one.review, one.rationale) for one in store.read()[4:]]
    assert verdicts == [("1", "reject", "Refunding is owed."), ("2", "edit", "All is <well>.")]
    assert set(report_on(task, data, select(store, task, data, config)).kept) == {"0", "2", "3"}


def test_the_panel_shows_what_a_row_says_letter_by_letter(task, tmp_path):
    data = made(["Because."]).map(lambda row: {"input_text": "<script>alert(1)</script>"})
    config = TeacherConfig(protocol="human")
    generate(task, data, config, tmp_path)
    panel = ReviewPanel(task, data, store_for(task, config, tmp_path), config)
    assert "&lt;script&gt;" in panel.row.value
    assert "<script>" not in panel.row.value


def test_the_panel_of_an_empty_store_has_nothing_to_judge(task, tmp_path):
    panel = ReviewPanel(task, made(["a"]), RationaleStore(tmp_path / "none.jsonl"), TeacherConfig(protocol="human"))
    assert panel.row.value == "No rationale to show."
    assert panel.accept.disabled


# --- corruptions -------------------------------------------------------------------------------------


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_replacing_gives_the_chosen_share_to_other_rows_and_loses_none(share, seed):
    words = [None if i % 5 == 4 else f"r{i}" for i in range(20)]
    data = made(words)
    wanted = round(share * 16)
    if wanted == 1:
        with pytest.raises(ConfigError, match="at least 2 rows"):
            replace_share(data, share, seed)
        return
    changed, counts = replace_share(data, share, seed)
    assert counts == {"rows": 20, "rationales": 16, "replaced": wanted}
    assert sum(a != b for a, b in zip(words, changed["rationale"], strict=True)) == wanted
    assert Counter(changed["rationale"]) == Counter(words)
    assert changed.features == data.features
    assert changed.remove_columns("rationale").to_dict() == data.remove_columns("rationale").to_dict()
    assert list(data["rationale"]) == words
    assert replace_share(data, share, seed)[0]["rationale"][:] == changed["rationale"][:]


def test_dropping_takes_the_share_away_and_nothing_else():
    data = made([f"r{i}" for i in range(20)])
    changed, counts = drop_share(data, 0.3, seed=1)
    assert counts == {"rows": 20, "rationales": 14, "dropped": 6}
    assert all(new in (old, None) for old, new in zip(data["rationale"], changed["rationale"], strict=True))
    assert drop_share(data, 0.3, seed=2)[0]["rationale"][:] != changed["rationale"][:]
    assert drop_share(data, 1.0, seed=1)[1]["rationales"] == 0
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        drop_share(data, 1.5, seed=1)


def test_truncating_keeps_the_first_tokens_as_training_counts_them(triage, rows):
    tokenizer = load_backbone("tiny", device="cpu").tokenizer
    fmt = SequenceFormat(tokenizer)
    changed, counts = truncate_rationales(rows, 7, tokenizer)
    assert counts == {"rows": 12, "rationales": 12, "truncated": 12}
    for old, new in zip(rows["rationale"], changed["rationale"], strict=True):
        assert old.startswith(new)
        assert fmt.encode(f" {new}") == fmt.encode(f" {old}")[: len(fmt.encode(f" {new}"))]
        assert len(fmt.encode(f" {new}")) <= 7
    whole, counts = truncate_rationales(rows, 500, tokenizer)
    assert counts["truncated"] == 0
    assert whole["rationale"][:] == rows["rationale"][:]
    half, _ = truncate_rationales(made(["é" * 30, None, "short"]), 5, tokenizer)
    assert set(half[0]["rationale"]) == {"é"}
    assert half["rationale"][1:] == [None, "short"]


# --- the command -------------------------------------------------------------------------------------


def test_the_command_fills_reports_exports_and_says_what_failed(tmp_path):
    run = CliRunner().invoke
    teacher = tmp_path / "teacher.json"
    teacher.write_text(json.dumps({"kind": "openai", "model": "fixed", "max_retries": 0, "concurrency": 1}))
    plan = {"1": "500"}

    def behave(prompt, nth):
        return plan["1"] if nth == 0 and "two flat American prongs" in prompt else "ok"

    with FaultServer(behave) as server:
        options = ["rationales", "support_triage", "--config", str(teacher), "--base-url", server.base_url]
        options += ["--rows", "4", "--folder", str(tmp_path / "r"), "--export-to", str(tmp_path / "out")]
        first, second = run(app, options), run(app, options)
    assert first.exit_code == 1
    assert "Row 1 failed: HTTP 500" in first.output
    assert "4 rows: 0 stored before, 3 stored now, 1 failed" in first.output
    assert second.exit_code == 0, second.output
    assert "leaks_label" in second.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "support_triage.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in lines] == ["0", "1", "2", "3"]


def documented_commands() -> list[list[str]]:
    """The arguments of each `rationales` command in docs/scaling.md."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    start = "python -m dhrd_lib "
    lines = [line.removeprefix(start) for line in text.splitlines() if line.startswith(f"{start}rationales ")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("place", [0, 1])
def test_the_documented_commands_ask_a_server(place, tmp_path):
    command = documented_commands()[place]
    with FaultServer(reply=lambda prompt, nth: f"It burst. {SENTINEL} {('fix', 'refund')[nth % 2]}") as server:
        command[command.index("--base-url") + 1] = server.base_url
        result = CliRunner().invoke(app, [*command, "--rows", "4", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    sampled = "rejection" in command
    assert {body["temperature"] for body in server.bodies} == {0.7 if sampled else 0}
    assert max(server.asked.values()) == (4 if sampled else 1)


def test_the_command_refuses_a_split_that_is_not_there(tmp_path):
    options = ["rationales", "support_triage", "--protocol", "human", "--folder", str(tmp_path), "--split", "tset"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert "tset" in result.output


def test_names_and_parameters_leave_out_what_does_not_change_the_words():
    one = TeacherConfig(kind="openai", model="m", base_url="http://127.0.0.1:1/v1")
    assert teacher_name(one) == "m"
    assert teacher_parameters(one)["server"] == "http://127.0.0.1:1/v1"
    assert "server" not in teacher_parameters(TeacherConfig())
    assert teacher_name(TeacherConfig()) == EMBEDDED
    assert isinstance(TASKS["cb"], Task)
