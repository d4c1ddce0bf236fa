"""Chain-of-thought decoding on the same backbone: prompts, token budgets, and two ways to read an answer.

The paper compares the pooled classifiers with CoT decoding at up to 500 tokens. Here one decoding serves every
smaller budget, because what a causal decoder writes first doesn't depend on how long it may go on.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.backbones import Backbone, decoder_of, lm_logits
from dhrd_lib.config import ConfigError
from dhrd_lib.cot.answers import AnswerReader, vote
from dhrd_lib.evaluation import NO_ANSWER, task_metrics
from dhrd_lib.generation import check_context, encode_chat, end_ids, generate, left_padded, stream
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import length_sorted_batches
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.tasks import Task, render

BUDGETS = (0, 16, 32, 64, 128, 256, 500)
READINGS = ("parsed", "scored")
PROMPT = """Read the text and answer its question. Explain step by step, in two or three sentences, which facts \
of the text lead to the answer. After the explanation write {sentinel}, and after that the answer, one of: \
{labels}.

{input}

Let's think step by step."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn; the defaults are the paper's (paper, "Training set-up").

    `n_samples` above 1 is self-consistency: so many rationales a row, and a vote. `early_stop` ends a row once
    its answer stands; without it, every row gets exactly `max_new_tokens` tokens. `batch_size` counts
    sequences. Draws depend on `seed` and on which rows share a batch.
    """

    sample: bool = True
    temperature: float = 0.1
    top_p: float = 0.7
    max_new_tokens: int = 500
    n_samples: int = 1
    early_stop: bool = True
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected 1 or more.")
        if not self.sample and self.n_samples > 1:
            raise ConfigError(f"n_samples is {self.n_samples} with greedy decoding; expected 1, or sample=True.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature is {self.temperature!r} and top_p {self.top_p!r}; expected a temperature above 0 "
                "(greedy decoding is sample=False) and a top_p above 0 and at most 1."
            )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        # A hub model brings defaults of its own, which aren't the paper's.
        length = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": 1.0}
        if not self.early_stop:
            length["min_new_tokens"] = self.max_new_tokens
        if not self.sample:
            return {**length, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**length, "do_sample": True, **drawn}


GREEDY = Decoding(sample=False)


@dataclass(frozen=True)
class Written:
    """What was decoded for N rows: `samples[row][i]` are the token ids of one sample, up to its stop.

    `inputs` are the rendered input texts, `max_new_tokens` is the budget of a sample, and `seconds` is what
    decoding it took, all rows together.
    """

    inputs: list[str]
    samples: list[list[list[int]]]
    max_new_tokens: int
    seconds: float

    def cut(self, budget: int) -> Written:
        """What decoding with this budget would have written (its time isn't known).

        Raises `ConfigError` where the budget is larger than the one that was decoded with.
        """
        if budget > self.max_new_tokens:
            raise ConfigError(f"The budget is {budget}; at most {self.max_new_tokens} tokens were decoded.")
        return Written(self.inputs, [[ids[:budget] for ids in row] for row in self.samples], budget, math.nan)


@dataclass(frozen=True)
class Answers:
    """`predictions (N,)`: class indices or `NO_ANSWER`; `tokens (N,)`: tokens that were written for each row,
    over all its samples; `shares (N, K)`: a class's probability (scored) or share of the votes (parsed)."""

    predictions: np.ndarray
    tokens: np.ndarray
    shares: np.ndarray

    @property
    def unanswered(self) -> int:
        """Rows without an answer that could be read; they count as wrong."""
        return int((self.predictions == NO_ANSWER).sum())


@dataclass(frozen=True)
class CoT:
    """A backbone that is asked to reason; made by `fine_tuned`, `zero_shot` or `few_shot`.

    `encode_prompt(input_text)` gives the ids after which the rationale is written, `encode_bare(input_text)`
    those after which, with nothing written, the marker and the answer follow (budget 0).
    """

    name: str
    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    label_names: tuple[str, ...]
    verbalizers: tuple[str, ...]
    answer_marker: str
    encode_prompt: Callable[[str], list[int]]
    encode_bare: Callable[[str], list[int]]

    @property
    def reader(self) -> AnswerReader:
        """How this prompt's answers are read."""
        return AnswerReader(self.answer_marker, self.label_names, self.verbalizers)

    @torch.inference_mode()
    def write(self, texts: Sequence[str | Mapping[str, Any]], decoding: Decoding | None = None) -> Written:
        """Decode rationale and answer for inputs (dicts of the template's fields, or str for one field).

        Raises `ConfigError` where a prompt and the new tokens don't fit the backbone's context.
        """
        decoding = decoding or Decoding()
        inputs = [render(self.template, text) for text in texts]
        prompts = [ids for ids in map(self.encode_prompt, inputs) for _ in range(decoding.n_samples)]
        check_context(self.lm, prompts, decoding.max_new_tokens)
        written: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        started = time.perf_counter()
        with tqdm(total=len(order), desc="CoT", unit="row", delay=2) as bar:
            for number, first in enumerate(range(0, len(order), decoding.batch_size)):
                places = order[first : first + decoding.batch_size]
                # Each batch has its own seed: how long the one before ran must not change its draws.
                batch = [prompts[i] for i in places]
                new = generate(self.lm, self.tokenizer, batch, **self._options(decoding, number))
                for place, ids in zip(places, new, strict=True):
                    written[place] = ids
                bar.update(len(places))
        seconds = time.perf_counter() - started
        n = decoding.n_samples
        samples = [written[i * n : (i + 1) * n] for i in range(len(inputs))]
        return Written(inputs, samples, decoding.max_new_tokens, seconds)

    def stream(self, text: str | Mapping[str, Any], decoding: Decoding | None = None) -> Iterator[Written]:
        """Decode one input, and give after each token what has been written so far; closing it stops the decoding.

        The last one is what `write([text], decoding)` gives. Raises `ConfigError` as `write` does, and where
        `n_samples` is above 1.
        """
        decoding = decoding or Decoding()
        if decoding.n_samples > 1:
            raise ConfigError(f"n_samples is {decoding.n_samples}; expected 1, a stream being one sample.")
        inputs = [render(self.template, text)]
        prompts = [self.encode_prompt(inputs[0])]
        check_context(self.lm, prompts, decoding.max_new_tokens)

        options = self._options(decoding)
        with closing(stream(self.lm, self.tokenizer, prompts[0], **options)) as steps:
            for ids, seconds in steps:
                yield Written(inputs, [[ids]], decoding.max_new_tokens, seconds)

    def parse(self, written: Written) -> Answers:
        """Answers as they stand in the text after the marker; several samples vote (see `vote`)."""
        read = [[self.reader.read(self._text(self._without_end(ids))) for ids in row] for row in written.samples]
        read = np.array(read)
        shares = (read[:, :, None] == np.arange(len(self.verbalizers))).mean(1)
        return Answers(vote(read), np.array([sum(map(len, row)) for row in written.samples]), shares)

    def score(self, written: Written, *, mean: bool = False, max_batch_tokens: int = 4096) -> Answers:
        """Answers by the LM head's own probability of each verbalizer after rationale and marker.

        A rationale ends before the marker, if it was written, and else where it was cut; only the tokens up to
        there, and the marker's, count as spent. At budget 0 the marker follows the input at once. `mean` divides
        a verbalizer's summed log-probability by its tokens.
        """
        parts = [[self._rationale(ids) for ids in row] for row in written.samples]
        encode = self.encode_prompt if written.max_new_tokens else self.encode_bare
        marker = self._encode(self.answer_marker)
        inputs = [encode(text) for text in written.inputs]
        prefixes = [
            ids + rationale + marker for ids, row in zip(inputs, parts, strict=True) for rationale, _ in row
        ]
        words = [self._encode(f" {word}") for word in self.verbalizers]
        check_context(self.lm, prefixes, max(map(len, words)))
        scores = score_continuations(
            self.lm, prefixes, words, self.tokenizer.pad_token_id, mean=mean, max_batch_tokens=max_batch_tokens
        )
        probabilities = softmax(scores, axis=1).reshape(len(parts), -1, len(words))
        tokens = np.array([sum(spent for _, spent in row) for row in parts])
        return Answers(vote(probabilities.argmax(2), probabilities), tokens, probabilities.mean(1))

    def without_rationale(self, texts: Sequence[str | Mapping[str, Any]], **options: Any) -> Answers:
        """The LM head alone: verbalizers scored right after the input, no token written (budget 0)."""
        inputs = [render(self.template, text) for text in texts]
        return self.score(Written(inputs, [[[]] for _ in inputs], 0, 0.0), **options)

    def _options(self, decoding: Decoding, batch: int = 0) -> dict[str, Any]:
        options = {**decoding.arguments(), "seed": decoding.seed * 1_000_003 + batch}
        return {**options, "is_complete": self.reader.is_settled} if decoding.early_stop else options

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in end_ids(self.lm, self.tokenizer) else ids

    def _text(self, ids: list[int]) -> str:
        # Markers may be special tokens, so these aren't skipped.
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _rationale(self, ids: list[int]) -> tuple[list[int], int]:
        """The ids before the marker (all of them where there is none), and how many were written for them."""
        kept = self._without_end(ids)
        place = self._text(kept).find(self.answer_marker)
        if place < 0:
            return kept, len(ids)
        steps = range(len(kept) + 1)

        def characters(n: int) -> int:
            return len(self._text(kept[:n]))

        spent = bisect_left(steps, place + len(self.answer_marker), key=characters)
        return kept[: bisect_right(steps, place, key=characters) - 1], spent


# ---------------------------------------------------------------------- prompts


def fine_tuned(model: DHRDModel) -> CoT:
    """CoT on a trained model, asked exactly as it was taught: `[x, <REASON>]`, and `<ANS>` before the answer.

    Made for `beta = 0` (the paper's CoT comparison); any model with a trained reasoning head will do. At budget
    0 the row is `[x, <ANS>]`, as in the paper's OnlyLabel.
    """
    fmt = model.sequence_format
    reason = fmt.encode(fmt.reason_marker)
    return CoT(
        name="fine-tuned",
        lm=model.backbone,
        tokenizer=model.tokenizer,
        template=model.config.template,
        label_names=tuple(model.label_names),
        verbalizers=tuple(model.config.verbalizers),
        answer_marker=fmt.answer_marker,
        encode_prompt=lambda text: fmt.encode_input(text)[0] + reason,
        encode_bare=lambda text: fmt.encode_input(text)[0],
    )


def zero_shot(backbone: Backbone, task: Task) -> CoT:
    """CoT on a bare backbone, asked in words; the teacher's sentinel parts explanation and answer."""
    return few_shot(backbone, task, [])


def few_shot(backbone: Backbone, task: Task, examples: Sequence[Mapping[str, Any]]) -> CoT:
    """CoT on a bare backbone after worked examples: rows with `input_text`, `rationale` and `label`.

    Examples are earlier turns of the chat; a backbone without a chat template gets the same as plain text.
    """
    turns = []
    for row in examples:
        turns.append(_turn("user", _question(task, row["input_text"])))
        answer = f"{row['rationale'].strip()} {SENTINEL} {task.verbalizers[row['label']]}"
        turns.append(_turn("assistant", answer))

    def encode(text: str) -> list[int]:
        return encode_chat(backbone.tokenizer, [*turns, _turn("user", _question(task, text))])

    return CoT(
        name=f"{len(examples)}-shot" if examples else "zero-shot",
        lm=backbone.model,
        tokenizer=backbone.tokenizer,
        template=task.template,
        label_names=task.label_names,
        verbalizers=task.verbalizers,
        answer_marker=SENTINEL,
        encode_prompt=encode,
        encode_bare=encode,
    )


def pick_examples(train: Dataset, k: int, seed: int = 0) -> list[dict[str, Any]]:
    """k rows of train that have a rationale, drawn with the seed, one a label in turn.

    Raises `ConfigError` where fewer than k rows have one.
    """
    rows = [row for row in train.shuffle(seed=seed) if row["rationale"]]
    if len(rows) < k:
        raise ConfigError(f"{len(rows)} rows of train have a rationale; expected at least k={k}.")
    # The n-th row of every label comes before the (n+1)-th of any.
    by_label = pd.Series([row["label"] for row in rows])
    turns = by_label.groupby(by_label).cumcount()
    order = sorted(range(len(rows)), key=lambda place: (turns[place], by_label[place]))
    return [rows[place] for place in order[:k]]


def _question(task: Task, input_text: str) -> str:
    values = {"input": input_text, "labels": ", ".join(task.verbalizers), "sentinel": SENTINEL}
    return render(PROMPT, values)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ---------------------------------------------------------------------- scoring


@torch.inference_mode()
def score_continuations(
    lm: PreTrainedModel,
    prefixes: Sequence[list[int]],
    continuations: Sequence[list[int]],
    pad_token_id: int,
    *,
    mean: bool = False,
    max_batch_tokens: int = 4096,
) -> np.ndarray:
    """Log-probability (nats, summed over tokens, or their mean) of each continuation after each prefix: (N, K).

    A prefix is read once; its cached keys and values serve all K continuations. The LM head is computed only
    where a continuation's token is predicted.
    """
    scores = np.zeros((len(prefixes), len(continuations)), dtype=np.float32)
    for places in length_sorted_batches([len(ids) for ids in prefixes], max_batch_tokens):
        found = _score_batch(lm, [prefixes[i] for i in places], continuations, pad_token_id)
        scores[places] = found.cpu().numpy()
    return scores / [len(ids) for ids in continuations] if mean else scores


def _score_batch(
    lm: PreTrainedModel, prefixes: list[list[int]], continuations: Sequence[list[int]], pad_token_id: int
) -> torch.Tensor:
    several = max(map(len, continuations)) > 1
    ids, mask = left_padded(prefixes, pad_token_id, lm.device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = decoder_of(lm)(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=several)
    first = _log_probs(lm, out.last_hidden_state[:, -1])
    scores = first[:, [words[0] for words in continuations]]
    if not several:
        return scores
    out.past_key_values.batch_repeat_interleave(len(continuations))
    return scores + _score_rest(lm, out.past_key_values, mask, continuations, pad_token_id)


def _score_rest(
    lm: PreTrainedModel,
    cache: Any,
    mask: torch.Tensor,
    continuations: Sequence[list[int]],
    pad_token_id: int,
) -> torch.Tensor:
    """What the tokens after the first add, from a cache in which each of B prefixes stands K times: (B, K)."""
    rows, k = len(mask), len(continuations)
    steps = max(map(len, continuations)) - 1
    padded = [[*words, *[pad_token_id] * (steps + 1 - len(words))] for words in continuations]
    words = torch.tensor(padded, device=mask.device).repeat(rows, 1)
    lengths = torch.tensor([len(words) for words in continuations], device=mask.device).repeat(rows)
    before = mask.repeat_interleave(k, 0)
    hidden = decoder_of(lm)(
        input_ids=words[:, :-1],
        attention_mask=torch.cat([before, before.new_ones(rows * k, steps)], 1),
        position_ids=before.sum(1, keepdim=True) + torch.arange(steps, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    found = _log_probs(lm, hidden).gather(2, words[:, 1:, None]).squeeze(2)
    real = torch.arange(1, steps + 1, device=mask.device) < lengths[:, None]
    return torch.where(real, found, 0.0).sum(1).view(rows, k)


def _log_probs(lm: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return lm_logits(lm, hidden).float().log_softmax(-1)


# ---------------------------------------------------------------------- votes, budgets, cascade


def accuracy_by_budget(
    cot: CoT,
    written: Written,
    labels: ArrayLike,
    *,
    budgets: Sequence[int] = BUDGETS,
    readings: Sequence[str] = READINGS,
    metrics: Sequence[str] = ("accuracy",),
    groups: ArrayLike | None = None,
) -> pd.DataFrame:
    """The primary metric against tokens spent, at every budget and by both readings, from one decoding.

    Columns: cot, reading, budget (tokens), tokens (mean a row), value, low, high (the primary metric and its 95%
    bootstrap interval, fractions), unanswered (rows), rows, and `answers`, the `Answers`. Budget 0 is the LM head
    alone and has no parsed reading. Raises `ConfigError` where a budget is larger than what was decoded.
    """
    table = []
    for reading in readings:
        for budget in sorted(set(budgets) - ({0} if reading == "parsed" else set())):
            cut = written.cut(budget)
            answers = cot.parse(cut) if reading == "parsed" else cot.score(cut)
            found = bootstrap_interval(metrics, labels, answers.predictions, groups)
            table.append(
                {
                    "cot": cot.name,
                    "reading": reading,
                    "budget": budget,
                    "tokens": float(answers.tokens.mean()),
                    **vars(found),
                    "unanswered": answers.unanswered,
                    "rows": len(answers.predictions),
                    "answers": answers,
                }
            )
    return pd.DataFrame(table)


def cascade(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cot_predictions: ArrayLike,
    *,
    classifier_seconds: float,
    cot_seconds: ArrayLike,
    metrics: Sequence[str] = ("accuracy",),
    groups: ArrayLike | None = None,
) -> pd.DataFrame:
    """DHRD answers, and the rows under a confidence threshold go on to CoT: one row a threshold.

    Args:
        probabilities: (N, K), the classifier's.
        cot_predictions: (N,), class indices or `NO_ANSWER`.
        classifier_seconds: what one row costs the classifier, measured.
        cot_seconds: what a row costs CoT, measured; one figure, or (N,).

    Columns: threshold, share_to_cot, value (the primary metric), queries_per_second. The first row is the
    classifier alone (threshold 0). The last is CoT alone (threshold infinity): where no answer depends on the
    classifier, it isn't run. In between, every row pays for the classifier.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    confidence, said = probabilities.max(1), probabilities.argmax(1)
    cost = np.broadcast_to(np.asarray(cot_seconds, dtype=float), confidence.shape)
    table = []
    for threshold in [0.0, *np.unique(confidence)[1:], math.inf]:
        to_cot = confidence < threshold
        answers = np.where(to_cot, cot_predictions, said)
        seconds = cost[to_cot].sum() + (0.0 if threshold == math.inf else classifier_seconds * len(said))
        table.append(
            {
                "threshold": threshold,
                "share_to_cot": float(to_cot.mean()),
                "value": task_metrics(metrics, labels, answers, groups)["primary"],
                "queries_per_second": len(said) / seconds,
            }
        )
    return pd.DataFrame(table)


def seconds_by_row(written: Written) -> np.ndarray:
    """Each row's share of the decoding time, (N,), by the tokens that were written for it."""
    tokens = np.array([sum(map(len, row)) for row in written.samples])
    return written.seconds * tokens / tokens.sum()
