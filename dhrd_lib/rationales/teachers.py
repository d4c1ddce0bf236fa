"""Teachers: the prompt for a rationale, and the models that reply to it (paper, "Teacher")."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import httpx
import openai
from pydantic import Field, model_validator

from dhrd_lib import config as types
from dhrd_lib.backbones import EMBEDDED, load_backbone
from dhrd_lib.config import Config, ConfigError, WorkbenchError
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.generation import context_length, encode_chat, end_ids, generate
from dhrd_lib.inputs import SENTINEL, render, template_fields
from dhrd_lib.rationales.replies import Reply, has_thinking, is_complete, opened_thinking, split_thinking
from dhrd_lib.tasks import Task

PROMPTS = {
    "gold": """You write explanations for a classifier. Read the text and its right answer, and explain \
step by step, in two or three sentences, which facts of the text lead to it. Don't name the answer in the \
explanation, and don't say that you were given it. After the explanation write {sentinel}, and after that \
the answer, one of: {labels}.

{input}
Answer: {label}

Let's think step by step.""",
    "rejection": """You write explanations for a classifier. Read the text and explain step by step, in \
two or three sentences, which of its facts lead to the answer. Don't name the answer in the explanation. \
After the explanation write {sentinel}, and after that the answer, one of: {labels}.

{input}

Let's think step by step.""",
}
_LOWEST_TEMPERATURE = 0.001
# Codes of errors that every row would meet: they are about the account, or a parameter that every request has.
_HOPELESS = {402, 404, "insufficient_quota", "model_not_found", "unsupported_parameter", "unsupported_value"}
_MAX_SAME_FAILURES = 10


class TeacherError(WorkbenchError):
    """A teacher that cannot be asked."""


class TeacherConfig(Config):
    """Who writes the rationales, and how they are asked (paper, "Teacher").

    `kind` is "local" (a causal LM that `load_backbone` takes; `model` of None is the embedded one) or "openai" (a
    server with OpenAI's chat API; `base_url` of None is OPENAI_BASE_URL, or the hosted default). The key is never
    part of the configuration: `api_key_env` names the variable that holds it.

    `protocol` is "gold" (the label is given) or "rejection" (it isn't; up to `tries` replies for a row, until one
    agrees with it). `prompt` is a template of the row's fields, `input`, `labels`, `label` and `sentinel`.
    `use_reasoning` takes a thinking model's reasoning for the rationale; otherwise thinking is dropped.
    `temperature` of None is the model's default, and 0 is greedy. `token_limit` is the server's name for the limit
    `max_tokens`. `extra_body` is added to each request; a local model takes its `chat_template_kwargs`.
    `default_query` is added to each address, such as Azure's api-version; it and the fields after it do not change
    which stored records count.
    """

    kind: Literal["local", "openai"] = "local"
    model: types.Text | None = None
    base_url: types.Text | None = None
    api_key_env: str = "OPENAI_API_KEY"
    protocol: Literal["gold", "rejection"] = "gold"
    tries: types.PositiveInt = 4
    prompt: types.Text | None = None
    system: types.Text | None = None
    use_reasoning: bool = False
    temperature: types.Weight | None = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: types.PositiveInt = 256
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed: types.Seed | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    default_query: dict[str, str] = Field(default_factory=dict)
    usd_per_million_tokens_in: types.Weight | None = None
    usd_per_million_tokens_out: types.Weight | None = None
    concurrency: types.PositiveInt = 4
    timeout_s: types.PositiveFloat = 60.0
    max_retries: types.Count = 5
    batch_size: types.PositiveInt = 8
    device: types.Name = "auto"
    dtype: types.DType = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        # No value is repeated: a key that somebody puts in one of these fields must not reach a log.
        if not self.api_key_env.isidentifier():
            raise ConfigError("api_key_env isn't a variable's name; expected the name, never the key.")
        _check_address(self.base_url, "base_url")
        if self.kind == "openai" and self.model is None:
            raise ConfigError("model is None with kind='openai'; expected the server's name for a model.")
        if self.temperature and self.temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature is {self.temperature!r}, by which no logit can be divided; expected 0, which is "
                f"greedy, or {_LOWEST_TEMPERATURE} or more."
            )
        if self.protocol == "rejection" and self.tries > 1 and self.temperature == 0:
            raise ConfigError(
                f"temperature is 0 with protocol='rejection' and tries={self.tries}, so that every try gives the "
                "same reply; expected a temperature above 0, or tries=1."
            )
        return self


def _check_address(address: str | None, name: str) -> None:
    """Refuse an address that isn't one, or that carries a secret, without repeating it."""
    try:
        parts = urlsplit(address or "http://default")
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"{name} isn't an address; expected http://… or https://….")
    if parts.username or parts.password or parts.query or parts.fragment:
        where = "host and path only, and the key in the variable that api_key_env names"
        raise ConfigError(f"{name} has a user, password or query; expected {where}.")


def make_prompt(task: Task, row: Mapping[str, Any], config: TeacherConfig) -> str:
    """Return the prompt for a row of a split that `load_task` gave.

    Raises `ConfigError` where the template reads an unknown field or leaves the input out, and where it gives the
    label in the rejection protocol or leaves it out in the gold protocol.
    """
    template = config.prompt or PROMPTS[config.protocol]
    read = set(template_fields(template))
    known = {*task.fields, "input", "labels", "label", "sentinel"}
    if unknown := sorted(read - known):
        raise ConfigError(f"prompt reads {unknown[0]!r}; expected one of {', '.join(sorted(known))}.")
    if "input" not in read and not read >= set(task.fields):
        raise ConfigError("prompt leaves the input out; expected {input}, or every field of the task.")
    if ("label" in read) != (config.protocol == "gold"):
        has, expected = ("gives", "no {label}") if "label" in read else ("leaves out", "{label}")
        raise ConfigError(f"prompt {has} the label in the {config.protocol} protocol; expected {expected} in it.")
    values = {field: row[field] for field in task.fields}
    values |= {"input": row["input_text"], "labels": ", ".join(task.verbalizers), "sentinel": SENTINEL}
    return render(template, {**values, "label": task.verbalizers[row["label"]]})


def teacher_parameters(config: TeacherConfig) -> dict[str, Any]:
    """Return what a rationale depends on besides prompt and model; records with other parameters do not count.

    The number of tries isn't among them, so that more tries continue those that were made.
    """
    values = config.model_dump(include={"kind", "protocol", "temperature", "top_p", "max_tokens", "seed"})
    # Where they have their defaults, older records count.
    values |= config.model_dump(include={"system", "use_reasoning", "extra_body"}, exclude_defaults=True)
    return {**values, "server": _server(config)} if config.kind == "openai" else values


def _server(config: TeacherConfig) -> str | None:
    address = config.base_url or os.environ.get("OPENAI_BASE_URL") or None
    _check_address(address, "base_url" if config.base_url else "OPENAI_BASE_URL")
    return address and address.rstrip("/")


def _turns(prompt: str, config: TeacherConfig) -> list[tuple[str, str]]:
    return [*([("system", config.system)] if config.system else []), ("user", prompt)]


class OpenAITeacher:
    """A server with OpenAI's chat API: hosted models, vLLM, Ollama, `transformers serve`.

    The client repeats a request that met 408, 409, 429, 5xx, a time-out or a broken connection, up to `max_retries`
    times, with back-off or after what Retry-After says. An error that every row would meet ends the asking. Raises
    `TeacherError` where the variable holds no key.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config, server, name = config, _server(config), config.api_key_env
        self._key = os.environ.get(name, "").strip()
        if not self._key and not server:
            raise TeacherError(f"The variable {name} is empty; expected a key in it, or base_url.")
        if not all(33 <= ord(character) <= 126 for character in self._key):
            raise TeacherError(f"The variable {name} holds no key; expected printable ASCII without spaces.")
        self._stopped: str | None = None
        self._last_failure, self._same_failures = "", 0
        self._client = openai.OpenAI(
            api_key=self._key or "none",  # The client requires one, a local server does not.
            base_url=server,
            timeout=config.timeout_s,
            max_retries=config.max_retries,
            default_query=config.default_query,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [_reveal_error]}),
        )

    def ask(self, prompts: Sequence[str], attempt: int = 0) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and its reply, as they come.

        The next prompt is sent once the caller has come back for more: a kill costs `concurrency` replies at most.
        """
        pool, waiting = ThreadPoolExecutor(self._config.concurrency), iter(range(len(prompts)))
        running, free = {}, self._config.concurrency
        try:
            while True:
                running |= {pool.submit(self._request, prompts[i], attempt): i for i in islice(waiting, free)}
                if not running:
                    return
                done, free = wait(running, return_when=FIRST_COMPLETED).done.pop(), 1
                yield running.pop(done), done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, prompt: str, attempt: int) -> Reply:
        if self._stopped:
            return Reply(failure=f"not asked, because earlier requests met {self._stopped}")
        config, start = self._config, time.monotonic()
        optional = {
            "temperature": config.temperature,
            "top_p": config.top_p if config.top_p < 1 else None,
            "seed": None if config.seed is None else config.seed + attempt,
        }
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=config.model,
                messages=[{"role": role, "content": text} for role, text in _turns(prompt, config)],
                extra_body=config.extra_body,
                **{config.token_limit: config.max_tokens},
                **{name: value for name, value in optional.items() if value is not None},
            )
            self._same_failures = 0
            return self._read(response.http_response.json(), time.monotonic() - start)
        except openai.OpenAIError as error:
            failure = self._failure(error)
        except ValueError:
            failure = "the reply isn't JSON"
        except (AttributeError, IndexError, KeyError, TypeError):
            # The client doesn't check what a server sends, so any part of it may be missing or of another type.
            failure = "the reply isn't a chat completion"
        return Reply(failure=failure, seconds=time.monotonic() - start)

    def _read(self, body: Any, seconds: float) -> Reply:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason") or "stop"
        text, reasoning, refusal = _texts(message)
        tokens = (usage.get(f"{name}_tokens") for name in ("prompt", "completion"))
        failure = f"the teacher refused: {self._clean(refusal)[:200]}" if refusal else None
        if finish in ("content_filter", "error", "abort") or choice.get("error"):
            failure = f"the server ended the reply early (finish reason {finish!r})"
        counts = (count if type(count) is int else None for count in tokens)
        return Reply(self._clean(text), self._clean(reasoning), str(finish), *counts, seconds, failure)

    def _failure(self, error: openai.OpenAIError) -> str:
        """Return why a request failed, without the key; an error that every row would meet ends the asking."""
        config, hopeless = self._config, False
        if isinstance(error, openai.APIStatusError):
            status, message = error.status_code, self._clean(" ".join(error.message.split()))[:200]
            reason, hopeless = f"HTTP {status}: {message}", bool({status, error.code} & _HOPELESS)
            if status in (401, 403) and not re.search("moderat|flagged", message):
                reason, hopeless = f"HTTP {status}: the server refuses the key in {config.api_key_env}", True
            reason += f"; expected another {error.param}" if error.param in type(config).model_fields else ""
        elif isinstance(error, openai.APITimeoutError):
            reason = f"no reply within {config.timeout_s:g} s, asked {config.max_retries + 1} times"
        else:
            reason = f"the connection failed ({type(error.__cause__).__name__})"
        self._same_failures = self._same_failures + 1 if reason == self._last_failure else 1
        self._last_failure = reason
        if hopeless or self._same_failures >= max(_MAX_SAME_FAILURES, 2 * config.concurrency):
            self._stopped = reason
        return reason

    def _clean(self, text: str) -> str:
        # A shorter key is a placeholder ("none", "EMPTY") and may be a word of the text.
        text = text.replace(self._key, "***") if len(self._key) >= 8 else text
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair can't be stored


def _texts(message: dict[str, Any]) -> tuple[str, str, str]:
    """Return a message's text, reasoning and refusal, whether it has them as fields or as parts of its content."""
    content = message["content"] or ""
    texts = {"text": [], "thinking": [], "refusal": []}
    for part in [content] if isinstance(content, str) else content:
        part = {"text": part} if isinstance(part, str) else part
        for kind, of in texts.items():
            value = part.get(kind) or ""
            of += [value] if isinstance(value, str) else [inner["text"] for inner in value]
    reasoning = message.get("reasoning_content") or message.get("reasoning") or "".join(texts["thinking"])
    return "".join(texts["text"]), reasoning, message.get("refusal") or "".join(texts["refusal"])


def _reveal_error(response: httpx.Response) -> None:
    """Give an error that came with status 200 its own, and keep the client from repeating a hopeless request."""
    response.read()
    try:
        error = response.json()["error"]
        code = error.get("code") if isinstance(error, dict) else None
    except (KeyError, TypeError, ValueError):
        return
    if error and response.status_code == 200:
        response.status_code = code if isinstance(code, int) and 400 <= code < 600 else 400
    if isinstance(error, dict) and "insufficient_quota" in (code, error.get("type")):
        response.headers["x-should-retry"] = "false"


class LocalTeacher:
    """A causal LM on this machine, asked in batches."""

    def __init__(self, config: TeacherConfig, reader: AnswerReader) -> None:
        self._config, self._reader = config, reader
        self._backbone = load_backbone(config.model or EMBEDDED, config.device, config.dtype)
        # Thinking may quote the sentinel, so a model that thinks ends by its end token alone.
        self._may_think = has_thinking(self._backbone.tokenizer.chat_template or "")

    def ask(self, prompts: Sequence[str], attempt: int = 0) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and its reply, batch by batch, shortest prompts first."""
        config, lm, tokenizer = self._config, self._backbone.model, self._backbone.tokenizer
        template = config.extra_body.get("chat_template_kwargs", {})
        rows = [encode_chat(tokenizer, _turns(prompt, config), **template) for prompt in prompts]
        fits, context = [], context_length(lm)
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            if (needed := len(rows[i]) + config.max_tokens) > context:
                yield i, Reply(failure=f"prompt and max_tokens need {needed} positions of {context}")
            else:
                fits.append(i)
        sampling = {"do_sample": True, "top_p": config.top_p, "temperature": config.temperature}
        if config.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif config.temperature is None:
            del sampling["temperature"]
        for first in range(0, len(fits), config.batch_size):
            batch, start = fits[first : first + config.batch_size], time.monotonic()
            replies = generate(
                lm,
                tokenizer,
                [rows[i] for i in batch],
                seed=None if config.seed is None else config.seed + attempt,
                is_complete=None if self._may_think else self._is_complete,
                max_new_tokens=config.max_tokens,
                **sampling,
            )
            seconds = round((time.monotonic() - start) / len(batch), 4)
            for i, ids in zip(batch, replies, strict=True):
                yield i, self._reply(rows[i], ids, seconds)

    def _is_complete(self, text: str) -> bool:
        return is_complete(text, self._reader)

    def _reply(self, prompt: list[int], ids: list[int], seconds: float) -> Reply:
        tokenizer = self._backbone.tokenizer
        ended = bool(ids) and ids[-1] in end_ids(self._backbone.model, tokenizer)
        # Marks of thinking may be special tokens, and the first may be in the prompt.
        text = opened_thinking(tokenizer.decode(prompt[-16:])) + tokenizer.decode(ids[:-1] if ended else ids)
        finished = ended or len(ids) < self._config.max_tokens or self._is_complete(text)
        thinking, text = split_thinking(text)
        for token in tokenizer.all_special_tokens:
            thinking, text = thinking.replace(token, ""), text.replace(token, "")
        return Reply(text, thinking, "stop" if finished else "length", len(prompt), len(ids), seconds)
