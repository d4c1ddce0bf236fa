"""Teachers: configuration, prompts, a server that is really there and misbehaves, and a local model."""

import logging
import time

import pytest
import torch
from fault_server import FaultServer, completion, good_reply, served

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import ConfigError, WorkbenchError
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.rationales import SENTINEL, TeacherConfig, generate, make_prompt, teachers
from dhrd_lib.rationales.teachers import LocalTeacher, OpenAITeacher, read_reply, teacher_parameters

KEY = "sk-canary-5f2b91c7d3e84a06"
OPENAI = {"kind": "openai", "model": "m"}

pytestmark = pytest.mark.usefixtures("no_teacher")


def ask(plan, triage, rows, folder, n=1, **fields):
    """Return the outcome of asking a server for the first rows, and the server."""
    with FaultServer(plan) as server:
        config = served(server, **{"max_retries": 2, "timeout_s": 0.5, **fields})
        return generate(triage, rows.select(range(n)), config, folder), server


SECRETS = [f"https://user:{KEY}@127.0.0.1/v1", f"https://127.0.0.1/v1?key={KEY}", f"http://{KEY}@127.0.0.1"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "openai"}, "model is None"),
        ({"protocol": "human"}, "protocol is 'human'"),
        ({"protocol": "rejection"}, "temperature is 0 with protocol='rejection'"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"base_url": "localhost:8000"}, "base_url isn't http(s)://"),
        ({"api_key_env": KEY}, "api_key_env isn't a variable's name"),
        *(({"base_url": address}, "base_url isn't http(s)://") for address in SECRETS),
    ],
)
def test_wrong_configuration_is_refused_without_secrets(fields, expected):
    with pytest.raises(ConfigError) as caught:
        TeacherConfig(**fields)
    assert expected in str(caught.value)
    assert KEY not in str(caught.value)


def test_secret_in_environment_is_refused_unrepeated(triage, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", SECRETS[0])
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL isn't http") as caught:
        generate(triage, rows, TeacherConfig(**OPENAI), tmp_path)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("value", ["", f"{KEY}\nnext line"])
def test_missing_key_is_named(value, monkeypatch):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="MY_KEY holds no key") as caught:
        OpenAITeacher(TeacherConfig(**OPENAI, api_key_env="MY_KEY"))
    assert KEY not in str(caught.value)


def test_parameters_are_those_that_change_replies():
    config = TeacherConfig(**OPENAI, base_url="http://127.0.0.1:1/v1/")
    parameters = teacher_parameters(config)
    names = ["kind", "max_tokens", "protocol", "seed", "server", "temperature", "top_p"]
    assert sorted(parameters) == names  # as in older stores
    for same in ({"default_query": {"api-version": "1"}}, {"base_url": "http://127.0.0.1:1/v1"}):
        assert teacher_parameters(config.replace(same)) == parameters
    for change in ({"system": "Be brief."}, {"extra_body": {"top_k": 1}}, {"use_reasoning": True}, {"seed": 1}):
        assert teacher_parameters(config.replace(change)).items() > parameters.items() - {("seed", None)}


def test_prompts_have_what_their_protocol_gives(triage, rows):
    prompt = make_prompt(triage, rows[0], TeacherConfig())
    parts = [rows[0]["input_text"], ", ".join(triage.verbalizers), SENTINEL, "Let's think step by step"]
    assert all(part in prompt for part in [*parts, f"Answer: {triage.verbalizers[rows[0]['label']]}"])
    custom = TeacherConfig(prompt="Why {label}? {text} [{labels}] {sentinel}")
    assert make_prompt(triage, rows[0], custom).startswith("Why replace? Ordered the notched card")
    rejection = TeacherConfig(protocol="rejection", temperature=0.7)
    assert len({make_prompt(triage, {**rows[0], "label": label}, rejection) for label in range(5)}) == 1


@pytest.mark.parametrize(
    ("prompt", "protocol", "expected"),
    [
        ("{input} {label} {rationale}", "gold", "the prompt's row lacks"),
        ("{input} {sentinel}", "gold", "wrong fields for the gold protocol"),
        ("{input} {label}", "rejection", "wrong fields for the rejection protocol"),
        ("Say {label}.", "gold", "leaves the input out"),
    ],
)
def test_prompt_that_breaks_its_protocol_is_refused(triage, rows, prompt, protocol, expected):
    with pytest.raises(WorkbenchError, match=expected):
        make_prompt(triage, rows[0], TeacherConfig(prompt=prompt, protocol=protocol, temperature=0.5))


def test_server_gets_system_prompt_extra_body_and_query(triage, rows, tmp_path):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    fields = {"system": "Be brief.", "extra_body": extra, "default_query": {"api-version": "2024-10-21"}}
    outcome, server = ask(good_reply, triage, rows, tmp_path, **fields, top_p=0.5, seed=3)
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.paths == ["/v1/chat/completions?api-version=2024-10-21"]
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0, 0.5, 256, 3]
    assert outcome.records[0].parameters["system"] == "Be brief."
    _, server = ask(good_reply, triage, rows, tmp_path, temperature=None, token_limit="max_completion_tokens")
    assert sorted(server.bodies[0]) == ["max_completion_tokens", "messages", "model"]


def test_address_and_key_may_come_from_the_environment(monkeypatch, rows, triage, tmp_path):
    with FaultServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert generate(triage, rows.select([0]), TeacherConfig(**OPENAI), tmp_path).stored == 1


def parts(*parts):
    return completion(list(parts))


THINKING_PART = {"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}
TEXT = f"Why. {SENTINEL} replace"
TEXT_PART = {"type": "text", "text": TEXT}


@pytest.mark.parametrize(
    ("body", "use_reasoning", "rationale"),
    [
        (f"hmm\n</think>\n\nWhy.\n{SENTINEL}\nreplace", False, "Why."),
        (parts(TEXT_PART), False, "Why."),
        (parts(THINKING_PART, TEXT_PART), False, "Why."),
        (parts(THINKING_PART, TEXT_PART), True, "hmm"),
        (completion(TEXT, reasoning_content="hmm"), True, "hmm"),
        (completion(TEXT, reasoning="hmm"), False, "Why."),
        (completion(None, "length", reasoning="hmm"), True, "hmm"),
        ({**completion(TEXT), "usage": None}, False, "Why."),
    ],
)
def test_reply_becomes_a_rationale(triage, rows, tmp_path, body, use_reasoning, rationale):
    outcome, _ = ask(lambda prompt, nth: body, triage, rows, tmp_path, use_reasoning=use_reasoning)
    assert (outcome.failed, outcome.records[0].rationale) == ({}, rationale)


REFUSED = {"refusal": "I can't help with that."}
PARTIAL = completion(TEXT, "error")
PARTIAL["choices"][0]["error"] = {"code": 502}
CUT = completion(None, "length", reasoning_content="hmm")


@pytest.mark.parametrize(
    ("body", "reason", "requests"),
    [
        (completion(None), "the reply has no rationale (finish reason 'stop')", 1),
        (f"{SENTINEL} replace", "the reply has no rationale", 1),
        (CUT, "(finish reason 'length'), but 3 characters of thinking", 1),
        (parts(THINKING_PART), "but 3 characters of thinking", 1),
        (completion(None, **REFUSED), "the teacher refused: I can't help", 1),
        (parts({"type": "refusal", **REFUSED}), "the teacher refused: I can't help", 1),
        (completion("Half a", "content_filter"), "ended the reply early (finish reason 'content_filter')", 1),
        (PARTIAL, "the server ended the reply early (finish reason 'error')", 1),
        ({"choices": []}, "the reply isn't a chat completion", 1),
        ({"choices": [{"message": {"content": [3]}}]}, "the reply isn't a chat completion", 1),
        ({"error": {"message": "Provider returned error", "code": 429}}, "Provider returned error", 1),
        ("broken_json", "the reply isn't a chat completion", 1),
        ("hang", "Request timed out", 3),
        ("drop_midway", "Connection error", 3),
        (400, "Error code: 400", 1),
        (500, "Error code: 500", 3),
        ((403, {"message": "Input was flagged by moderation"}), "Input was flagged", 1),
    ],
)
def test_reply_without_rationale_fails_and_is_asked_again(triage, rows, tmp_path, body, reason, requests):
    outcome, server = ask(lambda prompt, nth: body, triage, rows, tmp_path)
    assert reason in outcome.failed["0"]
    assert (outcome.stored, outcome.records, sum(server.asked.values())) == (0, [None], requests)
    again, _ = ask(good_reply, triage, rows, tmp_path)
    assert (again.stored_before, again.failed) == (0, {})


@pytest.mark.parametrize("fault", [429, 500, "drop"])
def test_passing_fault_is_retried(triage, rows, tmp_path, fault):
    start = time.monotonic()
    outcome, _ = ask(lambda prompt, nth: good_reply(prompt) if nth else fault, triage, rows, tmp_path)
    assert outcome.stored == 1
    assert time.monotonic() - start >= 0.5 * (fault == 429)  # the server's Retry-After


QUOTA = {"message": "You exceeded your current quota", "code": "insufficient_quota", "type": "insufficient_quota"}
TEMPERATURE = {"message": "Unsupported value: 'temperature'", "param": "temperature", "code": "unsupported_value"}


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (401, "401 - the server refuses the key in OPENAI_API_KEY", 1),
        (402, "Error code: 402", 1),
        (404, "Error code: 404", 1),
        ((429, QUOTA), "You exceeded your current quota", 3),
        ({"error": QUOTA}, "You exceeded your current quota", 1),
        ((400, TEMPERATURE), "Unsupported value", 1),
        ((422, {"message": "the same for all"}), "Error code: 422", 10),
        (503, "Error code: 503", 30),
    ],
)
def test_fault_of_every_row_ends_the_asking(triage, rows, tmp_path, fault, reason, requests):
    outcome, server = ask(lambda prompt, nth: fault, triage, rows, tmp_path, n=12, concurrency=1)
    assert (sum(server.asked.values()), len(outcome.failed)) == (requests, 12)
    (*_, last) = outcome.failed.values()
    assert last.startswith("not asked, because earlier requests met ")
    assert reason in last


def test_key_is_in_no_store_log_or_output(triage, rows, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    printed = []
    for plan in ["echo_key", (500, "echo_key"), (400, "echo_key"), 401, "hang", "broken_json"]:
        outcome, server = ask(lambda prompt, nth, plan=plan: plan, triage, rows, tmp_path, max_retries=1)
        printed += [repr(served(server)), repr(outcome), str(outcome)]
    stores = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode()
    everything = "\n".join([*printed, stores, caplog.text, *capfd.readouterr()])
    assert "***" in stores
    assert "Error code: 401" in everything
    assert KEY not in everything


def local(**fields):
    return LocalTeacher(TeacherConfig(model="tiny", device="cpu", max_tokens=12, **fields))


def chats(triage, rows, n):
    """Return chats of several lengths."""
    return [[("user", make_prompt(triage, rows[i], TeacherConfig())[-60 - 20 * i :])] for i in range(n)]


def test_local_reply_is_the_same_in_a_batch(triage, rows):
    teacher, prompts = local(), chats(triage, rows, 5)
    replies = teacher.ask(prompts)
    assert replies == [reply for chat in prompts for reply in teacher.ask([chat])]
    tokenizer = load_backbone("tiny", device="cpu").tokenizer
    lengths = [len(tokenizer(f"{prompt}\n").input_ids) for ((_, prompt),) in prompts]
    assert [reply.tokens_in for reply in replies] == lengths


def test_local_draws_are_seeded_and_differ_between_tries(triage, rows):
    teacher, prompts, state = local(temperature=1.0), chats(triage, rows, 3), torch.get_rng_state()
    texts = [[reply.text for reply in teacher.ask(prompts, seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


def test_local_thinking_opened_by_the_template(triage, monkeypatch):
    reader, chat = AnswerReader(SENTINEL, triage.label_names, triage.verbalizers), [("user", "Why?")]
    thinking, plain = local(), local(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    tokenizer = thinking._backbone.tokenizer
    tokenizer.chat_template = plain._backbone.tokenizer.chat_template = TEMPLATE
    (cut,) = thinking.ask([chat])  # 12 tokens of thinking that never ends
    with pytest.raises(ValueError, match="no rationale"):
        read_reply(cut, reader, 0)
    (reply,) = plain.ask([[("system", "Be brief."), *chat]])
    assert reply.tokens_in == len(tokenizer("system: Be brief.\nuser: Why?\n").input_ids)
    ids = tokenizer(f"hmm {SENTINEL} fix\n</think>\nWhy. {SENTINEL} refund").input_ids
    monkeypatch.setattr(teachers, "generate", lambda *_, **__: [ids])
    (reply,) = thinking.ask([chat])
    assert read_reply(reply, reader, 0)["rationale"] == "Why."


def test_prompt_beyond_the_context_fails_its_row(triage, train, tmp_path):
    rows = train.select([0, 1]).map(lambda row: {"input_text": "long " * 9999 if row["idx"] == "0" else "short"})
    config = TeacherConfig(model="tiny", device="cpu", max_tokens=12, temperature=1.0, prompt="{input} {label}")
    outcome = generate(triage, rows, config, tmp_path)
    assert outcome.stored == 1
    assert outcome.failed["0"].startswith("the prompt has ")
