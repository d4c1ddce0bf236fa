"""Chain-of-thought decoding with the same backbone: prompts, generation, and two ways to read an answer.

The paper compares the pooled classifiers with CoT decoding of up to 500 tokens. One decoding serves every smaller
budget (`Generations.truncated`): the first tokens of a causal decoder do not depend on how many may follow.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from datasets import Dataset
from pydantic import Field, model_validator
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.backbones import Backbone
from dhrd_lib.config import Config, ConfigError, PositiveFloat, PositiveInt, Seed
from dhrd_lib.cot.answers import AnswerReader, vote
from dhrd_lib.cot.scoring import score_continuations
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.generation import check_context, encode_chat, end_ids, generate, stream
from dhrd_lib.inputs import SENTINEL, Inputs, render, render_inputs
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.tasks import Task

PROMPT = """Read the text and answer its question. Explain step by step, in two or three sentences, which facts \
of the text lead to the answer. After the explanation write {sentinel}, and after that the answer, one of: \
{labels}.

{input}

Let's think step by step."""


class Decoding(Config):
    """How tokens are drawn; the defaults are the paper's (paper, "Training set-up").

    `n_samples` above 1 is self-consistency: that many rationales a row, and a vote. `early_stop` ends a row once
    its answer is settled; without it, every row gets exactly `max_new_tokens` tokens. `batch_size` counts
    sequences. Draws depend on `seed` and on which rows share a batch.
    """

    sample: bool = True
    temperature: PositiveFloat = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    max_new_tokens: PositiveInt = 500
    n_samples: PositiveInt = 1
    early_stop: bool = True
    batch_size: PositiveInt = 8
    seed: Seed = 0

    @model_validator(mode="after")
    def _greedy_has_one_sample(self) -> Self:
        if not self.sample and self.n_samples > 1:
            raise ConfigError(f"n_samples is {self.n_samples} with greedy decoding; expected 1, or sample=True.")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `lm.generate`; a hub model's own defaults are not the paper's."""
        temperature, top_p, top_k = (self.temperature, self.top_p, 0) if self.sample else (None, None, None)
        length = {} if self.early_stop else {"min_new_tokens": self.max_new_tokens}
        length |= {"max_new_tokens": self.max_new_tokens, "repetition_penalty": 1.0, "do_sample": self.sample}
        return {**length, "temperature": temperature, "top_p": top_p, "top_k": top_k}


@dataclass(frozen=True)
class Generations:
    """The tokens decoded for N rows: `samples[row][i]` are the ids of one sample, up to its end.

    `inputs` are the rendered texts, `max_new_tokens` is a sample's budget, `seconds` the time for all of them.
    """

    inputs: list[str]
    samples: list[list[list[int]]]
    max_new_tokens: int
    seconds: float

    @property
    def tokens(self) -> np.ndarray:
        """The number of tokens decoded for each row, over all its samples: `(N,)`."""
        return np.array([sum(map(len, row)) for row in self.samples])

    @property
    def seconds_by_row(self) -> np.ndarray:
        """Each row's share of the decoding time, by its tokens: `(N,)`."""
        return self.seconds * self.tokens / self.tokens.sum()

    def truncated(self, budget: int) -> Generations:
        """Return what decoding with a smaller budget gives; its time is unknown (NaN)."""
        if budget > self.max_new_tokens:
            raise ConfigError(f"The budget is {budget}; at most {self.max_new_tokens} tokens were decoded.")
        return Generations(self.inputs, [[ids[:budget] for ids in row] for row in self.samples], budget, math.nan)


@dataclass(frozen=True)
class CoTPredictions:
    """Predictions for N rows: `prediction_ids (N,)` are class indices or `NO_ANSWER`.

    `probabilities (N, K)`: a class's probability (scored) or share of the votes (parsed); `tokens (N,)`: tokens
    spent on each row, over all its samples.
    """

    label_names: tuple[str, ...]
    prediction_ids: np.ndarray
    probabilities: np.ndarray
    tokens: np.ndarray

    @property
    def labels(self) -> list[str | None]:
        """Label names; None for a row without an answer."""
        return [None if i == NO_ANSWER else self.label_names[i] for i in self.prediction_ids]

    @property
    def unanswered(self) -> int:
        """The number of rows without an answer; they count as wrong."""
        return int((self.prediction_ids == NO_ANSWER).sum())


@dataclass(frozen=True)
class CoT:
    """A backbone that reasons before it answers; made by `from_model` or `from_backbone`.

    `encode_prompt(input_text)` gives the ids that a rationale follows, `encode_bare(input_text)` those that the
    marker and the answer follow where no token is decoded (budget 0).
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

    @classmethod
    def from_model(cls, model: DHRDModel) -> CoT:
        """Return CoT with a trained model, prompted as in training: `[x, <REASON>]`, and `<ANS>` before the answer.

        Meant for `beta = 0` (the paper's CoT comparison); any model with a trained reasoning head will do. At
        budget 0 the row is `[x, <ANS>]`, as in the paper's OnlyLabel.
        """
        fmt = model.sequence_format
        reason = fmt.encode(fmt.reason_marker)
        return cls(
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

    @classmethod
    def from_backbone(cls, backbone: Backbone, task: Task, examples: Sequence[Mapping[str, Any]] = ()) -> CoT:
        """Return zero-shot CoT with a bare backbone, prompted in words, or few-shot CoT with worked examples.

        Examples are rows with `input_text`, `rationale` and `label` (see `pick_examples`); they become
        earlier turns of the chat. A sentinel separates explanation and answer.
        """

        def question(text: str) -> str:
            return render(PROMPT, {"input": text, "labels": ", ".join(task.verbalizers), "sentinel": SENTINEL})

        turns = []
        for row in examples:
            answer = f"{row['rationale'].strip()} {SENTINEL} {task.verbalizers[row['label']]}"
            turns += [("user", question(row["input_text"])), ("assistant", answer)]

        def encode(text: str) -> list[int]:
            return encode_chat(backbone.tokenizer, [*turns, ("user", question(text))])

        return cls(
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

    @cached_property
    def reader(self) -> AnswerReader:
        """The reader of this prompt's answers."""
        return AnswerReader(self.answer_marker, self.label_names, self.verbalizers)

    def predict(
        self, inputs: Inputs, *, reading: Literal["parsed", "scored"] = "parsed", **decoding: Any
    ) -> CoTPredictions:
        """Decode and read predictions; `decoding` are fields of `Decoding`, such as `max_new_tokens`."""
        generations = self.generate(inputs, Decoding(**decoding))
        return self.parse(generations) if reading == "parsed" else self.score(generations)

    def generate(self, inputs: Inputs, decoding: Decoding | None = None) -> Generations:
        """Decode rationale and answer of each input.

        Raises `ConfigError` where a prompt and the new tokens do not fit the backbone's context.
        """
        decoding = decoding or Decoding()
        texts = render_inputs(self.template, inputs)
        prompts = [ids for ids in map(self.encode_prompt, texts) for _ in range(decoding.n_samples)]
        check_context(self.lm, prompts, decoding.max_new_tokens)
        ids: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        started = time.perf_counter()
        for number, first in enumerate(tqdm(range(0, len(order), decoding.batch_size), desc="CoT", delay=2)):
            places = order[first : first + decoding.batch_size]
            batch = [prompts[place] for place in places]
            new = generate(self.lm, self.tokenizer, batch, **self._options(decoding, number))
            for place, row in zip(places, new, strict=True):
                ids[place] = row
        seconds = time.perf_counter() - started
        samples = [ids[i : i + decoding.n_samples] for i in range(0, len(ids), decoding.n_samples)]
        return Generations(texts, samples, decoding.max_new_tokens, seconds)

    def stream(self, row: str | Mapping[str, Any], decoding: Decoding | None = None) -> Iterator[Generations]:
        """Decode one input and yield, after each token, all that was decoded so far; closing it ends the decoding.

        The last item equals `generate([row], decoding)`. Raises `ConfigError` as `generate` does, and where
        `n_samples` is above 1.
        """
        decoding = decoding or Decoding()
        if decoding.n_samples > 1:
            raise ConfigError(f"n_samples is {decoding.n_samples}; expected 1, a stream being one sample.")
        (text,) = render_inputs(self.template, row)
        prompt = self.encode_prompt(text)
        check_context(self.lm, [prompt], decoding.max_new_tokens)
        with closing(stream(self.lm, self.tokenizer, prompt, **self._options(decoding))) as steps:
            for ids, seconds in steps:
                yield Generations([text], [[ids]], decoding.max_new_tokens, seconds)

    def _options(self, decoding: Decoding, batch: int = 0) -> dict[str, Any]:
        # Each batch has its own seed: its draws must not depend on how long the one before it was.
        is_complete = self.reader.is_settled if decoding.early_stop else None
        return {**decoding.arguments(), "seed": decoding.seed * 1_000_003 + batch, "is_complete": is_complete}

    def parse(self, generations: Generations) -> CoTPredictions:
        """Read the answers from the text after the marker; several samples vote (see `vote`)."""
        texts = [[self._decode(self._without_end(ids)) for ids in row] for row in generations.samples]
        read = np.array([[self.reader.read(text) for text in row] for row in texts])  # (N, samples)
        shares = (read[:, :, None] == np.arange(len(self.verbalizers))).mean(1)
        return CoTPredictions(self.label_names, vote(read), shares, generations.tokens)

    def score(
        self, generations: Generations, *, mean: bool = False, max_batch_tokens: int = 4096
    ) -> CoTPredictions:
        """Read the answers from the LM head's probability of each verbalizer after rationale and marker.

        A rationale ends before the marker, if there is one, and else where it was cut; only the tokens up to
        there, and the marker's, count as spent. At budget 0 the marker follows the input at once. `mean` divides
        a verbalizer's summed log-probability by its tokens.
        """
        rationales = [[self._rationale(ids) for ids in row] for row in generations.samples]
        encode = self.encode_prompt if generations.max_new_tokens else self.encode_bare
        marker, *answers = self._encode(self.answer_marker, *(f" {verbalizer}" for verbalizer in self.verbalizers))
        prompts = map(encode, generations.inputs)
        prefixes = [
            prompt + ids + marker for prompt, row in zip(prompts, rationales, strict=True) for ids, _ in row
        ]
        check_context(self.lm, prefixes, max(map(len, answers)))
        scores = score_continuations(
            self.lm, prefixes, answers, self.tokenizer.pad_token_id, mean=mean, max_batch_tokens=max_batch_tokens
        )
        probabilities = softmax(scores, axis=1).reshape(len(rationales), -1, len(answers))  # (N, samples, K)
        tokens = np.array([sum(spent for _, spent in row) for row in rationales])
        predictions = vote(probabilities.argmax(2), probabilities)
        return CoTPredictions(self.label_names, predictions, probabilities.mean(1), tokens)

    def without_rationale(self, inputs: Inputs, **options: Any) -> CoTPredictions:
        """Read the LM head alone: score the verbalizers right after the input, with no token decoded (budget 0)."""
        texts = render_inputs(self.template, inputs)
        return self.score(Generations(texts, [[[]] for _ in texts], 0, 0.0), **options)

    def _encode(self, *texts: str) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)  # with special tokens, because markers may be some

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in end_ids(self.lm, self.tokenizer) else ids

    def _rationale(self, ids: list[int]) -> tuple[list[int], int]:
        """Return the ids before the marker (all where there is none), and how many were decoded up to its end."""
        kept = self._without_end(ids)
        start = self._decode(kept).find(self.answer_marker)
        if start < 0:
            return kept, len(ids)
        counts = range(len(kept) + 1)

        def characters(n: int) -> int:
            return len(self._decode(kept[:n]))

        spent = bisect_left(counts, start + len(self.answer_marker), key=characters)
        return kept[: bisect_right(counts, start, key=characters) - 1], spent


def pick_examples(train: Dataset, k: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return k rows of train that have a rationale, drawn with the seed, one of each label in turn.

    Raises `ConfigError` where fewer than k rows have one.
    """
    rows = [row for row in train.shuffle(seed=seed) if row["rationale"]]
    if len(rows) < k:
        raise ConfigError(f"{len(rows)} rows of train have a rationale; expected at least k={k}.")
    # The n-th row of every label comes before the (n+1)-th of any.
    labels = pd.Series([row["label"] for row in rows])
    turns = labels.groupby(labels).cumcount()
    order = sorted(range(len(rows)), key=lambda place: (turns[place], labels[place]))
    return [rows[place] for place in order[:k]]
