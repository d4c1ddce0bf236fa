"""Teachers: how a rationale is asked for, who is asked, and how an answer is read (paper, "Teacher")."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import openai
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from dhrd_lib.backbones import EMBEDDED, load_backbone
from dhrd_lib.config import ConfigError, TeacherConfig, WorkbenchError
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.tasks import Task, render, template_fields

GOLD_PROMPT = """You write explanations for a classifier. Read the text and its right answer, and explain \
step by step, in two or three sentences, which facts of the text lead to it. Don't name the answer in the \
explanation, and don't say that you were given it. After the explanation write {sentinel}, and after that \
the answer, one of: {labels}.

{input}
Answer: {label}

Let's think step by step."""

REJECTION_PROMPT = """You write explanations for a classifier. Read the text and explain step by step, in \
two or three sentences, which of its facts lead to the answer. Don't name the answer in the explanation. \
After the explanation write {sentinel}, and after that the answer, one of: {labels}.

{input}

Let's think step by step."""

PROMPTS = {"gold": GOLD_PROMPT, "rejection": REJECTION_PROMPT}
_LONGEST_ANSWER = 80  # characters; what writes more after the sentinel isn't answering any more


class TeacherError(WorkbenchError):
    """A teacher that can't be asked."""


@dataclass(frozen=True)
class Reply:
    """What came back for one prompt: a text, or in `failure` the reason why there is none."""

    text: str = ""
    finish_reason: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float = 0.0
    failure: str | None = None


# ---------------------------------------------------------------------- prompts and answers


def make_prompt(task: Task, row: Mapping[str, Any], config: TeacherConfig) -> str:
    """The prompt for a row of a split that `load_task` gave.

    Raises `ConfigError` where the template reads something else than a field of the task, `input`, `labels`,
    `label` and `sentinel`; where it leaves the input out; and where it gives the label in the rejection
    protocol, or doesn't in the gold protocol.
    """
    template = config.prompt or PROMPTS[config.protocol]
    _check_prompt(template, task, config.protocol)
    values = {field: row[field] for field in task.fields}
    values |= {"input": row["input_text"], "labels": ", ".join(task.verbalizers), "sentinel": SENTINEL}
    return render(template, {**values, "label": task.verbalizers[row["label"]]})


def _check_prompt(template: str, task: Task, protocol: str) -> None:
    read = set(template_fields(template))
    known = {*task.fields, "input", "labels", "label", "sentinel"}
    if unknown := sorted(read - known):
        raise ConfigError(f"prompt reads {unknown[0]!r}; expected one of {', '.join(sorted(known))}.")
    if "input" not in read and not read >= set(task.fields):
        raise ConfigError("prompt leaves the input out; expected {input}, or every field of the task.")
    if protocol == "gold" and "label" not in read:
        raise ConfigError("prompt doesn't give the label in the gold protocol; expected {label} in it.")
    if protocol == "rejection" and "label" in read:
        raise ConfigError("prompt gives the label in the rejection protocol; expected no {label} in it.")


def split_reply(text: str) -> tuple[str, str]:
    """A reply as rationale and answer, parted by the sentinel; the answer is empty where there is none.

    What thinking models put in front between <think> tags is no part of the rationale.
    """
    text = re.sub(r"^\s*<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    rationale, _, after = text.partition(SENTINEL)
    lines = after.strip().splitlines()
    return rationale.strip(), lines[0].strip()[:_LONGEST_ANSWER] if lines else ""


def read_answer(answer: str, task: Task) -> int | None:
    """The class that an answer names, as verbalizer or label name; None where it names none or several."""
    names = {name.lower(): i for i, name in [*enumerate(task.label_names), *enumerate(task.verbalizers)]}
    # Longest first, so that "not entailment" isn't read as "entailment".
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = {names[name] for name in re.findall(rf"(?<!\w)(?:{either})(?!\w)", answer.lower())}
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------------- who is asked


def teacher_name(config: TeacherConfig) -> str:
    """What the teacher is called in a store: the model's name, or "human"."""
    if config.protocol == "human":
        return "human"
    default = EMBEDDED if config.kind == "local" else os.environ.get("DHRD_TEACHER_MODEL")
    name = config.model or default
    if not name:
        raise TeacherError("No model is named; expected `model`, or the variable DHRD_TEACHER_MODEL.")
    return name


def teacher_parameters(config: TeacherConfig) -> dict[str, Any]:
    """What a rationale depends on beside prompt and model; a record with other parameters is another one.

    The number of tries isn't among them: more tries go on from those that were made.
    """
    if config.protocol == "human":
        return {"protocol": "human"}
    names = ("kind", "protocol", "temperature", "top_p", "max_tokens", "seed")
    values = {name: getattr(config, name) for name in names}
    return {**values, "server": _base_url(config)} if config.kind == "openai" else values


def load_teacher(config: TeacherConfig) -> OpenAITeacher | LocalTeacher:
    """The teacher, ready to be asked; raises `TeacherError` where a server's model or key isn't named."""
    return LocalTeacher(config) if config.kind == "local" else OpenAITeacher(config)


class OpenAITeacher:
    """A server that speaks OpenAI's chat API: hosted models, vLLM, Ollama, `transformers serve`.

    The client repeats a request that met 408, 409, 429, 5xx, a time-out or a broken connection, up to
    `max_retries` times, with back-off or after what Retry-After says.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._model = teacher_name(config)
        self._key = _api_key(config)
        self._refused: str | None = None
        self._client = openai.OpenAI(
            # A server without a key still gets one, because the client wants one.
            api_key=self._key or "none",
            base_url=_base_url(config),
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )

    def ask(self, prompts: Sequence[str], attempt: int = 0) -> Iterator[tuple[int, Reply]]:
        """Each prompt's place and its reply, as they come; `concurrency` of them are asked at a time.

        The next prompt is sent once the caller has come back for more, so that at most `concurrency` replies
        are on their way or not dealt with yet: that many a kill can cost.
        """
        pool = ThreadPoolExecutor(self._config.concurrency)
        waiting = iter(range(len(prompts)))
        running = {}
        try:
            for place in islice(waiting, self._config.concurrency):
                running[pool.submit(self._one, prompts[place], attempt)] = place
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
                    for place in islice(waiting, 1):
                        running[pool.submit(self._one, prompts[place], attempt)] = place
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, prompt: str, attempt: int) -> Reply:
        if self._refused:
            return Reply(failure=f"not asked, because an earlier request met {self._refused}")
        start = time.monotonic()
        try:
            response = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                **self._sampling(attempt),
            )
        except (openai.OpenAIError, ValueError) as error:
            return Reply(failure=self._reason(error), seconds=time.monotonic() - start)
        return self._read(response, time.monotonic() - start)

    def _sampling(self, attempt: int) -> dict[str, Any]:
        config = self._config
        chosen: dict[str, Any] = {config.token_limit: config.max_tokens}
        if config.temperature is not None:
            chosen["temperature"] = config.temperature
        if config.top_p < 1:
            chosen["top_p"] = config.top_p
        if config.seed is not None:
            chosen["seed"] = config.seed + attempt
        return chosen

    def _read(self, response: Any, seconds: float) -> Reply:
        # The client doesn't check what a server sends, so any part of it may be missing or of another type.
        try:
            choice = response.choices[0]
            text, finish = choice.message.content or "", choice.finish_reason or "stop"
            text = self._without_key(text).encode("utf-8", "replace").decode()
        except (AttributeError, IndexError, TypeError):
            return Reply(failure="the reply isn't a chat completion", seconds=seconds)
        usage = getattr(response, "usage", None)
        tokens = [getattr(usage, f"{name}_tokens", None) for name in ("prompt", "completion")]
        tokens = [count if isinstance(count, int) else None for count in tokens]
        return Reply(text, str(finish), *tokens, seconds)

    def _reason(self, error: Exception) -> str:
        """Why a request failed, in one line without the key; what never can succeed stops the others."""
        config = self._config
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in (401, 403):  # the body may quote the key
                self._refused = f"HTTP {status}: the server refuses the key in {config.api_key_env}"
                return self._refused
            reason = f"HTTP {status}: {self._without_key(' '.join(error.message.split()))[:200]}"
            if status == 404:
                self._refused = reason
            return reason
        if isinstance(error, openai.APITimeoutError):
            return f"no reply within {config.timeout_s:g} s, asked {config.max_retries + 1} times"
        if isinstance(error, openai.APIConnectionError):
            return f"the connection failed ({type(error.__cause__).__name__})"
        return "the reply isn't JSON"

    def _without_key(self, text: str) -> str:
        # What is shorter is a stand-in ("none", "EMPTY") and may be a word of the text.
        return text.replace(self._key, "***") if len(self._key) >= 8 else text


def _base_url(config: TeacherConfig) -> str | None:
    return config.base_url or os.environ.get("OPENAI_BASE_URL")


def _api_key(config: TeacherConfig) -> str:
    """The key from the environment; empty where a server of one's own needs none."""
    name = config.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and not _base_url(config):
        raise TeacherError(f"The variable {name} is empty; expected a key in it, or base_url.")
    if not all(33 <= ord(sign) <= 126 for sign in key):
        raise TeacherError(f"The variable {name} holds no key; expected printable ASCII without spaces.")
    return key


class LocalTeacher:
    """A causal LM on this machine, asked in batches, padded on the left."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._backbone = load_backbone(teacher_name(config), config.device, config.dtype)

    def ask(self, prompts: Sequence[str], attempt: int = 0) -> Iterator[tuple[int, Reply]]:
        """Each prompt's place and its reply, batch by batch, shortest prompts first."""
        texts = [self._chat(prompt) for prompt in prompts]
        lengths = [len(ids) for ids in self._tokenize(texts).input_ids] if texts else []
        context = getattr(self._backbone.model.config.get_text_config(), "max_position_embeddings", math.inf)
        fits = []
        for place in sorted(range(len(texts)), key=lengths.__getitem__):
            wanted = lengths[place] + self._config.max_tokens
            if wanted > context:
                yield place, Reply(failure=f"prompt and max_tokens take {wanted} tokens of {context}")
            else:
                fits.append(place)
        for first in range(0, len(fits), self._config.batch_size):
            batch = fits[first : first + self._config.batch_size]
            yield from zip(batch, self._batch([texts[i] for i in batch], attempt), strict=True)

    def _chat(self, prompt: str) -> str:
        tokenizer = self._backbone.tokenizer
        if not tokenizer.chat_template:
            return f"{prompt}\n"
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def _tokenize(self, texts: list[str], **padding: Any) -> Any:
        tokenizer = self._backbone.tokenizer
        # A chat template writes the start token itself.
        return tokenizer(texts, add_special_tokens=not tokenizer.chat_template, **padding)

    @torch.no_grad()
    def _batch(self, texts: list[str], attempt: int) -> list[Reply]:
        model, tokenizer = self._backbone.model, self._backbone.tokenizer
        inputs = self._tokenize(texts, padding=True, padding_side="left", return_tensors="pt")
        length = inputs.input_ids.shape[1]
        ended = _Ended(tokenizer, model.generation_config, length, len(texts))
        start = time.monotonic()
        with torch.random.fork_rng():
            if self._config.seed is not None:
                torch.manual_seed(self._config.seed + attempt)
            rows = model.generate(
                **inputs.to(model.device),
                max_new_tokens=self._config.max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[ended],
                **self._sampling(),
            )[:, length:]
        seconds = (time.monotonic() - start) / len(texts)
        replies = []
        for i, row in enumerate(rows):
            end = int(ended.places[i])
            text = tokenizer.decode(row[: end or len(row)], skip_special_tokens=True)
            tokens_in = int(inputs.attention_mask[i].sum())
            replies.append(Reply(text, "stop" if end else "length", tokens_in, end or len(row), round(seconds, 4)))
        return replies

    def _sampling(self) -> dict[str, Any]:
        if self._config.temperature == 0:
            return {"do_sample": False}
        chosen: dict[str, Any] = {"do_sample": True, "top_p": self._config.top_p}
        if self._config.temperature is not None:
            chosen["temperature"] = self._config.temperature
        return chosen


class _Ended(StoppingCriteria):
    """Ends a row at the end token, or once the answer after the sentinel stands; remembers where."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, start: int, rows: int) -> None:
        ends = config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self._tokenizer, self._start = tokenizer, start
        self.places = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        for i, row in enumerate(input_ids[:, self._start :].tolist()):
            if not self.places[i] and (row[-1] in self._ends or _answered(self._tokenizer.decode(row))):
                self.places[i] = len(row)
        return (self.places > 0).to(input_ids.device)


def _answered(text: str) -> bool:
    after = text.partition(SENTINEL)[2].lstrip()
    return "\n" in after or len(after) > _LONGEST_ANSWER
