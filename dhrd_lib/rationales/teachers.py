"""Teachers: the prompt for a rationale, the models that reply to it, and reading replies (paper, "Teacher")."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import openai
import regex
from pydantic import Field, model_validator

from dhrd_lib import config as types
from dhrd_lib.backbones import EMBEDDED, load_backbone
from dhrd_lib.config import Config, ConfigError
from dhrd_lib.cot.answers import MAX_ANSWER_CHARACTERS, AnswerReader
from dhrd_lib.generation import context_length, encode_chat, end_ids, generate
from dhrd_lib.inputs import SENTINEL, render, template_fields
from dhrd_lib.tasks import Task

_ANSWER = "After the explanation write {sentinel}, and after that the answer, one of: {labels}.\n\n{input}\n"
_RULE = "Don't name the answer in the explanation"
PROMPTS = {
    "gold": "You write explanations for a classifier. Read the text and its right answer, and explain step by "
    f"step, in two or three sentences, which facts of the text lead to it. {_RULE}, and don't say that you were "
    f"given it. {_ANSWER}Answer: {{label}}\n\nLet's think step by step.",
    "rejection": "You write explanations for a classifier. Read the text and explain step by step, in two or three "
    f"sentences, which of its facts lead to the answer. {_RULE}. {_ANSWER}\nLet's think step by step.",
}
# Status and codes of errors that every row would meet: of the account, or of a parameter that every request has.
_HOPELESS = {401, 402, 404, "insufficient_quota", "model_not_found", "unsupported_parameter", "unsupported_value"}
Chat = list[tuple[str, str]]  # role, content
_NAME = "(?:seed:)?(?:think|thinking|thought|reasoning)"
# What opens and closes a model's thinking. The opening mark may be in the prompt, by its chat template.
_THINKING = (
    (rf"[<\[◁]{_NAME}[>\]▷]", rf"[<\[◁]/{_NAME}[>\]▷]"),  # most models; EXAONE, Seed-OSS, Magistral, Kimi
    (r"<\|(?:begin_of_thought|START_THINKING)\|>", r"<\|(?:end_of_thought|END_THINKING)\|>"),  # Sky-T1, Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>", r"<channel\|>"),  # Gemma 4
    (r"<unused94>|\[unused16\]", r"<unused95>|\[unused17\]"),  # MedGemma, Pangu
    (r"<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>", r"<\|channel\|>\s*final[^<]*<\|message\|>"),
    (r"\A\s*analysis(?=.*assistantfinal)", r"assistantfinal"),  # gpt-oss, with control tokens and without
    (r"Here(?: is|'s) my thought process:", r"Here(?: is|'s) my response:"),  # Granite 3
)
_OPENING, _CLOSING = (
    regex.compile("|".join(marks), regex.IGNORECASE | regex.DOTALL) for marks in zip(*_THINKING, strict=True)
)
# A server that does not know a model's end token leaves it in the text, and what the model writes after it.
_END_OF_TURN = regex.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end_of_text|endoftext|end_of_turn|end|return|user|start_header_id)\|>"
    r"|<｜end▁of▁sentence｜>|</s>|<end_of_turn>|<eos>|<turn\|>|\[EOS\]"
)
_WRAPPER = regex.compile(
    r"(?i)</?(?:answer|response|output|explanation|rationale)>|<\|(?:(?:begin|end)_of_(?:solution|box)"
    r"|(?:START|END)_RESPONSE)\|>"
)
# In any case and emphasis, as a heading or in other brackets; without brackets in capitals, or alone on a line.
_SENTINEL = regex.compile(
    r"[\s*_#>`~\-]*(?:[\[［【(<\\]+\s*(?i:END[ _]OF[ _]REASONING)\s*[\]］】)>\\]+|\bEND[ _]OF[ _]REASONING\b"
    r"|(?im:^[*_#>`~\- ]*END[ _]OF[ _]REASONING(?=[*_`~:. ]*$)))[*_`~:]*"
)


class TeacherConfig(Config):
    """Who writes the rationales, a backbone or any server with OpenAI's API, and how (paper, "Teacher").

    `protocol` is "gold" (the label is given) or "rejection" (up to `tries` replies, until one agrees with it).
    `prompt` is a template of the row's fields, `input`, `labels`, `label` and `sentinel`.
    """

    kind: Literal["local", "openai"] = "local"
    model: types.Text | None = None
    base_url: types.Text | None = None  # or else OPENAI_BASE_URL, or the hosted default
    api_key_env: str = "OPENAI_API_KEY"
    protocol: Literal["gold", "rejection"] = "gold"
    tries: types.PositiveInt = 4
    prompt: types.Text | None = None
    system: types.Text | None = None
    use_reasoning: bool = False  # take the model's thinking for the rationale
    temperature: types.Weight | None = 0.0  # 0 is greedy, None the model's default
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: types.PositiveInt = 256
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed: types.Seed | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)  # a local model takes its chat_template_kwargs
    # The fields below do not change which stored records count.
    default_query: dict[str, str] = Field(default_factory=dict)  # such as Azure's api-version
    concurrency: types.PositiveInt = 4
    timeout_s: types.PositiveFloat = 60.0
    max_retries: types.Count = 5
    batch_size: types.PositiveInt = 8
    device: types.Name = "auto"
    dtype: types.DType = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.api_key_env.isidentifier():  # not repeated: it may be the key
            raise ConfigError("api_key_env isn't a variable's name; expected the name, never the key.")
        if self.base_url:
            _server(self)
        if self.kind == "openai" and self.model is None:
            raise ConfigError("model is None with kind='openai'; expected the server's name for a model.")
        if self.protocol == "rejection" and self.tries > 1 and self.temperature == 0:
            raise ConfigError("temperature is 0 with protocol='rejection'; expected more, or tries=1.")
        return self


def _server(config: TeacherConfig) -> str | None:
    """Return the server's address; refuse one that may have a secret in it, without repeating it."""
    name = "base_url" if config.base_url else "OPENAI_BASE_URL"
    address = (config.base_url or os.environ.get(name, "")).rstrip("/")
    if address and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", address):
        raise ConfigError(f"{name} isn't http(s)://HOST/PATH; expected no user or query, which may hold a key.")
    return address or None


def make_prompt(task: Task, row: Mapping[str, Any], config: TeacherConfig) -> str:
    """Return the prompt for a row; raise `WorkbenchError` where the template doesn't fit the task or protocol."""
    template = config.prompt or PROMPTS[config.protocol]
    read = set(template_fields(template))
    if "input" not in read and not read >= set(task.fields):
        raise ConfigError("prompt leaves the input out; expected {input}, or every field of the task.")
    if ("label" in read) != (config.protocol == "gold"):
        expected = "no {label}" if "label" in read else "{label}"
        raise ConfigError(f"prompt has the wrong fields for the {config.protocol} protocol; expected {expected}.")
    values = {field: row[field] for field in task.fields} | {"input": row["input_text"], "sentinel": SENTINEL}
    values |= {"labels": ", ".join(task.verbalizers), "label": task.verbalizers[row["label"]]}
    return render(template, values, "the prompt's row")


def teacher_parameters(config: TeacherConfig) -> dict[str, Any]:
    """Return what a rationale depends on besides prompt and model; more tries continue those that were made."""
    values = config.model_dump(include={"kind", "protocol", "temperature", "top_p", "max_tokens", "seed"})
    # Where they have their defaults, older records count.
    values |= config.model_dump(include={"system", "use_reasoning", "extra_body"}, exclude_defaults=True)
    return {**values, "server": _server(config)} if config.kind == "openai" else values


class Reply(NamedTuple):
    """A teacher's reply: a text, and the thinking that came apart from it, or in `failure` why there is none."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    tokens_in: int = 0  # 0 where the server doesn't count them
    tokens_out: int = 0
    failure: str | None = None


def has_thinking(text: str) -> bool:
    """Return whether a mark of thinking is in a text."""
    return bool(_OPENING.search(text) or _CLOSING.search(text))


def read_reply(reply: Reply, reader: AnswerReader, gold: int, use_reasoning: bool = False) -> dict[str, Any]:
    """Return rationale, answer, whether it agrees with gold (None: no label, or several), and finish reason.

    The sentinel is the first one that a label follows, because a reply may quote it before. A text with an answer
    is complete, whatever the limit cut off after it. Raises `ValueError` where there is no rationale.
    """
    if reply.failure:
        raise ValueError(reply.failure)
    *_, end = [0, *(match.end() for match in _CLOSING.finditer(reply.text))]
    thinking, text = reply.text[:end], reply.text[end:]
    if opened := _OPENING.search(text):  # and never closed
        thinking, text = thinking + text[opened.start() :], text[: opened.start()]
    text = _WRAPPER.sub("", _END_OF_TURN.split(text, 1)[0]).strip()
    thinking = _END_OF_TURN.split(_CLOSING.sub("", _OPENING.sub("", thinking)), 1)[0].strip()
    thinking = reply.reasoning.strip() or thinking
    rationale, answer, label = text, "", None
    for match in reversed(list(_SENTINEL.finditer(text))):
        after = text[match.end() :]
        classes = set(reader.read_all(SENTINEL + after))
        if len(classes) == 1 or label is None:
            rationale, answer = text[: match.start()].strip(), " ".join(after.split())[:MAX_ANSWER_CHARACTERS]
            label = classes.pop() if len(classes) == 1 else None
    rationale = thinking if use_reasoning else rationale
    if not rationale:
        hint = f", but {len(thinking)} characters of thinking, which use_reasoning=true takes" if thinking else ""
        raise ValueError(f"the reply has no rationale (finish reason {reply.finish_reason!r}){hint}")
    agreed, finish = (None, reply.finish_reason) if label is None else (label == gold, "stop")
    return {"rationale": rationale, "answer": answer, "agreed": agreed, "finish_reason": finish}


class OpenAITeacher:
    """A server with OpenAI's chat API; the client repeats requests that met 429, 5xx or a broken connection."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config, server = config, _server(config)
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not re.fullmatch("[!-~]*" if server else "[!-~]+", self._key):
            raise ConfigError(f"{config.api_key_env} holds no key; expected printable ASCII, or base_url.")
        self._stopped, self._failures = "", Counter()  # failures since the last reply
        options = {"timeout": config.timeout_s, "max_retries": config.max_retries}
        # The client requires a key, a local server does not.
        key, query = self._key or "none", config.default_query
        self._client = openai.OpenAI(api_key=key, base_url=server, default_query=query, **options)

    def ask(self, chats: Sequence[Chat], seed: int | None = None) -> list[Reply]:
        """Return a reply to each chat; an error that every row would meet ends the asking."""
        return [self._ask(chat, seed) for chat in chats]

    def _ask(self, chat: Chat, seed: int | None) -> Reply:
        if self._stopped:
            return Reply(failure=f"not asked, because earlier requests met {self._stopped}")
        config = self._config
        body = {"temperature": config.temperature, "top_p": config.top_p if config.top_p < 1 else None}
        body |= {"seed": seed, config.token_limit: config.max_tokens}
        body = {name: value for name, value in body.items() if value is not None} | config.extra_body
        messages = [{"role": role, "content": text} for role, text in chat]
        create = self._client.chat.completions.with_raw_response.create
        try:
            response = create(model=config.model, messages=messages, extra_body=body)
            reply = response.http_response.json()
            if error := reply.get("error"):  # in spite of its status 200
                raise openai.APIError(str(error), response.http_request, body=error)
            self._failures.clear()
            return self._read(reply)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # The client doesn't check replies.
            return Reply(failure="the reply isn't a chat completion")
        except openai.OpenAIError as error:
            status, code = getattr(error, "status_code", None), getattr(error, "code", None)
            reason = self._clean(" ".join(f"{error} {error.__cause__ or ''}".split()))[:200]
            if status == 401:  # A server may quote a part of the key.
                reason = f"Error code: 401 - the server refuses the key in {config.api_key_env}"
            self._failures[reason] += 1
            if {status, code} & _HOPELESS or self._failures[reason] >= max(10, 2 * config.concurrency):
                self._stopped = reason
            return Reply(failure=reason)

    def _read(self, reply: dict[str, Any]) -> Reply:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason") or "stop"
        content, thinking = message["content"], message.get("reasoning_content") or message.get("reasoning")
        parts = content if isinstance(content, list) else [{"text": content}]
        parts = [*parts, {"thinking": thinking, "refusal": message.get("refusal")}]
        kinds = ("text", "thinking", "refusal")
        text, thinking, refusal = (self._clean("".join(_text(part.get(kind)) for part in parts)) for kind in kinds)
        failure = f"the teacher refused: {refusal[:200]}" if refusal else None
        if finish in ("content_filter", "error", "abort") or choice.get("error"):
            failure = f"the server ended the reply early (finish reason {finish!r})"
        counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text, thinking, str(finish), *counts, failure)

    def _clean(self, text: str) -> str:
        # A shorter key is a placeholder ("none", "EMPTY") and may be a word of the text.
        text = text.replace(self._key, "***") if len(self._key) >= 8 else text
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair can't be stored


def _text(value: str | list[dict[str, str]] | None) -> str:
    return value if isinstance(value, str) else "".join(part["text"] for part in value or [])


class LocalTeacher:
    """A causal LM on this machine."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._backbone = load_backbone(config.model or EMBEDDED, config.device, config.dtype)

    def ask(self, chats: Sequence[Chat], seed: int | None = None) -> list[Reply]:
        """Return a reply to each chat of a batch."""
        config, lm, tokenizer = self._config, self._backbone.model, self._backbone.tokenizer
        template = config.extra_body.get("chat_template_kwargs", {})
        rows = [encode_chat(tokenizer, chat, **template) for chat in chats]
        room, ends = context_length(lm) - config.max_tokens, end_ids(lm, tokenizer)
        options = {"max_new_tokens": config.max_tokens, "do_sample": config.temperature != 0, "top_p": config.top_p}
        if config.temperature is not None:
            options["temperature"] = config.temperature or None
        fits = [row for row in rows if len(row) <= room]
        new = iter(generate(lm, tokenizer, fits, seed=seed, **options) if fits else [])
        replies = []
        for n, row in zip(map(len, rows), rows, strict=True):
            if n > room:
                replies.append(Reply(failure=f"the prompt has {n} tokens; the context leaves {room} for it"))
                continue
            ids = next(new)
            ended = bool(ids) and ids[-1] in ends
            # Marks of thinking may be special tokens, and the prompt may end with the first.
            prompt = tokenizer.decode(row[-16:]).rstrip()
            *_, opening = ["", *(mark.group() for mark in _OPENING.finditer(prompt) if mark.end() == len(prompt))]
            text = opening + tokenizer.decode(ids[:-1] if ended else ids)
            replies.append(Reply(text, "", "stop" if ended else "length", n, len(ids)))
        return replies
