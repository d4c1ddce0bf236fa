"""Generating rationales: each row is asked for once, whatever stops a run, and the command does it all."""

import json
import multiprocessing
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from fault_server import FaultServer, good_reply, job, run_job, served
from typer.testing import CliRunner

from dhrd_lib.__main__ import app
from dhrd_lib.config import ConfigError
from dhrd_lib.data.embedded import EMBEDDED, embedded_folder
from dhrd_lib.rationales import SENTINEL, RationaleStore, TeacherConfig, make_prompt, quality_report
from dhrd_lib.rationales.generate import export, generate, select, store_for
from dhrd_lib.tasks import load_task

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("no_teacher")]


def test_second_run_asks_nothing(triage, rows, tmp_path):
    with FaultServer(delay_s=0.05) as server:
        config = served(server, concurrency=3)
        first = generate(triage, rows, config, tmp_path)
        second = generate(triage, rows, config.replace({"base_url": f"{server.base_url}/"}), tmp_path)
    assert set(server.asked.values()) == {1}
    assert server.most_at_once == 3
    assert str(first) == "12 rows: 0 stored before, 12 stored now, 0 failed"
    assert (second.stored_before, second.stored) == (12, 0)
    assert second.records == first.records == select(triage, rows, config, tmp_path)
    for row, record in zip(rows, first.records, strict=True):
        assert good_reply(make_prompt(triage, row, config)).startswith(record.rationale)
        assert (record.idx, record.agreed, record.tokens_in, record.tokens_out) == (row["idx"], True, 100, 20)
        assert record.answer == triage.verbalizers[row["label"]]


CHANGES = [
    {"temperature": 0.5},
    {"seed": 3},
    {"system": "Brief."},
    {"extra_body": {"top_k": 1}},
]
CHANGES += [{"prompt": "{input}\nAnswer: {label}\nWhy? {sentinel}"}, {"base_url": "http://127.0.0.1:1/v1"}]
SAME = {"concurrency": 1, "timeout_s": 5.0, "max_retries": 1, "api_key_env": "OTHER", "max_tokens": 999}


def test_only_what_changes_replies_asks_again(triage, rows, tmp_path):
    rows = rows.select([0, 1])
    with FaultServer() as server:
        config = served(server)
        records = generate(triage, rows, config, tmp_path).records
        for change in CHANGES:
            assert select(triage, rows, config.replace(change), tmp_path) == [None, None]
        assert generate(triage, rows, config.replace(CHANGES[0]), tmp_path).stored == 2
        assert generate(triage, rows, config.replace(SAME), tmp_path).records == records
        relabeled = rows.map(lambda row: {"label": (row["label"] + 1) % 5})
        assert generate(triage, relabeled, config, tmp_path).stored == 2
        assert len(store_for(triage, config, tmp_path).read()) == 6


@pytest.mark.parametrize("old", [{"rationale": "", "agreed": None}, {"finish_reason": "length"}])
def test_empty_or_cut_off_rationale_is_asked_again(old, triage, rows, tmp_path):
    rows = rows.select([0])
    with FaultServer() as server:
        config = served(server)
        (first,) = generate(triage, rows, config, tmp_path).records
        store = store_for(triage, config, tmp_path)
        store.path.unlink()
        store.append(first.model_copy(update=old))
        again = generate(triage, rows, config.replace({"max_tokens": 999}), tmp_path)
    assert (again.stored, again.records[0].rationale) == (1, first.rationale)


def test_rejection_keeps_the_first_reply_that_agrees(triage, rows, tmp_path):
    gold = {row["input_text"]: triage.verbalizers[row["label"]] for row in rows}
    agrees_at = {"replace": 0, "fix": 1, "explain": 2}

    def reply(prompt, nth):
        right = next(label for text, label in gold.items() if text in prompt)
        wrong = "fix" if right != "fix" else "refund"
        return f"Try {nth}. {SENTINEL} {right if nth >= agrees_at.get(right, 99) else wrong}"

    with FaultServer(reply) as server:
        fields = {"protocol": "rejection", "temperature": 0.8, "seed": 5}
        config = served(server, tries=3, **fields)
        outcome = generate(triage, rows, config, tmp_path)
        for row, record in zip(rows, outcome.records, strict=True):
            tries, label = server.asked[make_prompt(triage, row, config)], triage.verbalizers[row["label"]]
            assert tries == agrees_at.get(label, 2) + 1
            assert (record.agreed, record.rationale) == (label in agrees_at, f"Try {tries - 1}.")
        assert {body["seed"] for body in server.bodies} == {5, 6, 7}
        kept = quality_report(triage, rows, outcome.records).kept
        assert set(kept) == {record.idx for record in outcome.records if record.agreed}
        assert generate(triage, rows, config, tmp_path).stored == 0
        # One try more continues those that were made.
        again = generate(triage, rows, served(server, tries=4, **fields), tmp_path)
        assert again.stored == sum(record.agreed is False for record in outcome.records)


def test_exported_rationales_are_joined_by_load_task(train, tmp_path, monkeypatch):
    export({"0": "Eins é", "3": "Drei"}, tmp_path / "new" / "support_triage.jsonl")
    monkeypatch.setenv("DHRD_RATIONALES_DIR", str(tmp_path / "new"))
    exported = load_task("support_triage")[1]["train"]
    assert (exported[0]["rationale"], exported[3]["rationale"]) == ("Eins é", "Drei")
    assert exported[1]["rationale"] == train[1]["rationale"]
    with pytest.raises(ConfigError, match="no rationale is kept"):
        export({}, tmp_path / "new" / "support_triage.jsonl")
    assert load_task("support_triage")[1]["train"][0]["rationale"] == "Eins é"


@pytest.mark.parametrize("model", ["../../outside", "/etc/outside", "..", "a/../../b", "A\0b", "\\..\\x"])
def test_store_stays_in_its_folder(model, triage, tmp_path):
    path = store_for(triage, TeacherConfig(model=model), tmp_path / "stores").path
    assert path.resolve().parent == (tmp_path / "stores" / triage.name).resolve()


_CONTEXT = multiprocessing.get_context("forkserver")


def _spawn(target, *arguments):
    """Start a process from a server that has imported the library, so that it is at work within moments."""
    _CONTEXT.set_forkserver_preload(["pytest", "dhrd_lib.rationales"])
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.* is torn")
def test_killed_job_ends_as_if_unkilled(tmp_path):
    n_rows, generator, growth = 200, random.Random(0), []
    task, dataset = job(n_rows)
    with FaultServer(delay_s=0.05) as server:
        run_job(server.base_url, tmp_path / "unkilled", task, dataset)
        server.asked.clear()
        store = RationaleStore(tmp_path / "killed" / "support_triage" / "fixed.jsonl")
        for _ in range(20):
            before, ready = len(store.read()), _CONTEXT.Event()
            process = _spawn(run_job, server.base_url, tmp_path / "killed", task, dataset, ready)
            assert ready.wait(60)
            # Killed while it starts, or some moments after its store has grown by some records.
            wanted, until = before + generator.randint(0, 8), time.monotonic() + 30
            while len(store.read()) < wanted and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.06))
            assert process.is_alive(), "the job was done before it could be killed"
            process.kill()
            process.join(30)
            growth.append(len(store.read()) - before)
        outcome = run_job(server.base_url, tmp_path / "killed", task, dataset)
    assert sum(grown > 0 for grown in growth) >= 10, f"too few kills met a job at work: {growth}"
    assert (outcome.stored_before, outcome.failed) == (sum(growth), {})
    assert outcome.stored == n_rows - sum(growth) > 0
    unkilled = RationaleStore(tmp_path / "unkilled" / "support_triage" / "fixed.jsonl").read()
    assert sorted(store.read(), key=repr) == sorted(unkilled, key=repr)
    # A kill costs the requests under way at most, and there are four of them.
    assert sum(server.asked.values()) <= n_rows + 4 * len(growth)


def test_two_processes_ask_for_no_row_twice(tmp_path):
    with FaultServer(delay_s=0.02) as server:
        both = [_spawn(run_job, server.base_url, tmp_path, *job(60)) for _ in range(2)]
        for process in both:
            process.join(60)
            assert process.exitcode == 0
    assert set(server.asked.values()) == {1}
    found = RationaleStore(tmp_path / "support_triage" / "fixed.jsonl").read()
    assert Counter(record.idx for record in found) == Counter(str(i) for i in range(60))


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """Run `transformers serve` with the embedded backbone; its address, and its name for the model."""
    folder = str(embedded_folder())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"{address}/v1", folder
    process.kill()
    process.wait(20)


@pytest.mark.timeout(400)
def test_transformers_serve_and_local_teacher_agree(real_server, triage, train, tmp_path):
    rows, (base_url, model) = train.select(range(4)), real_server
    config = TeacherConfig(kind="openai", model=model, base_url=base_url, max_tokens=16, concurrency=2)
    outcome = generate(triage, rows, config, tmp_path)
    assert (outcome.stored, outcome.failed) == (4, {})
    assert all(record.tokens_in > 100 and 0 < record.tokens_out <= 16 for record in outcome.records)
    assert generate(triage, rows, config, tmp_path).stored == 0
    # The same model asked directly, in one batch, gets the same prompts and gives the same replies.
    direct = TeacherConfig(model=EMBEDDED, device="cpu", max_tokens=16, batch_size=2)
    local = generate(triage, rows.select(range(2)), direct, tmp_path).records
    for one, other in zip(local, outcome.records[:2], strict=True):
        assert (one.tokens_in, one.rationale) == (other.tokens_in, other.rationale)


@pytest.fixture
def four_rows(tmp_path):
    """Return the option that limits the command to four rows."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"data": {"task": "support_triage", "max_train_rows": 4}}))
    return ["--run-config", str(path)]


def test_command_generates_reports_and_exports(tmp_path, four_rows):
    teacher, asked = tmp_path / "teacher.json", []
    teacher.write_text(json.dumps({"kind": "openai", "max_retries": 0, "concurrency": 1}))

    def plan(prompt, nth):
        asked.append(prompt)
        return good_reply(prompt) if asked[1:] else 500

    with FaultServer(plan) as server:
        options = ["rationales", "--config", str(teacher), "--base-url", server.base_url, "--model", "fixed"]
        options += [*four_rows, "--folder", str(tmp_path / "r"), "--export-to", str(tmp_path / "out")]
        first, second = CliRunner().invoke(app, options), CliRunner().invoke(app, options)
    assert first.exit_code == 1
    assert "failed: Error code: 500" in first.output
    assert "4 rows: 0 stored before, 3 stored now, 1 failed" in first.output
    assert second.exit_code == 0, second.output
    assert "leaks_label" in second.output
    assert len((tmp_path / "out" / "support_triage.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("place", [0, 1])
def test_documented_commands_ask_a_server(place, tmp_path, four_rows):
    text = (ROOT / "docs" / "guides" / "rationales.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python -m dhrd_lib (rationales .*)$", text, flags=re.MULTILINE)
    command = shlex.split(commands[place], comments=True)
    with FaultServer(lambda prompt, nth: f"It burst. {SENTINEL} {('fix', 'refund')[nth % 2]}") as server:
        command[command.index("--base-url") + 1] = server.base_url
        result = CliRunner().invoke(app, [*command, *four_rows, "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    sampled = "rejection" in command
    assert {body["temperature"] for body in server.bodies} == {0.7 if sampled else 0}
    assert max(server.asked.values()) == (4 if sampled else 1)


def test_command_refuses_unknown_split_and_field(tmp_path):
    result = CliRunner().invoke(app, ["rationales", "--folder", str(tmp_path), "--split", "tset"])
    assert result.exit_code == 2
    assert "tset" in result.output
    (tmp_path / "teacher.json").write_text(json.dumps({"kind": "openai", "api_key": "sk-a-secret"}))
    result = CliRunner().invoke(app, ["rationales", "--config", str(tmp_path / "teacher.json")])
    assert isinstance(result.exception, ConfigError)
    assert "sk-a-secret" not in f"{result.exception} {result.output}"
