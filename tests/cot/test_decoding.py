"""CoT: prompts as in training, budgets exact to the token, both readings."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone, tiny_model

from dhrd_lib.cot import CoT, Decoding, Generations, decoding
from dhrd_lib.cot.decoding import score_continuations
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.sequences import encode_example

TEXTS = ["My lamp broke.", "I was charged twice for one night, and want the money back.", "Why?"]
SHORT = Decoding(max_new_tokens=24, early_stop=False, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def model(task) -> DHRDModel:
    return tiny_model(task)


@pytest.fixture(scope="module")
def cot(model) -> CoT:
    return CoT.from_model(model)


def ids(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False).input_ids


def scripted(monkeypatch, lm, script: list[list[int]]) -> None:
    """Make the model write `script[row]` whatever it reads."""

    def generate(input_ids, stopping_criteria, max_new_tokens, pad_token_id, **_):
        for step in range(max_new_tokens):
            column = [row[step] if step < len(row) else pad_token_id for row in script]
            input_ids = torch.cat([input_ids, torch.tensor(column)[:, None]], 1)
            if all(done.all() for done in (stop(input_ids, None) for stop in stopping_criteria)):
                break
        return input_ids

    monkeypatch.setattr(lm, "generate", generate)


class TestPrompts:
    def test_trained_model_gets_the_ids_of_training(self, model, cot):
        text = "Customer: Why?\nWhat must happen next?"
        row = encode_example(model.sequence_format, text, "Because.", "fix")
        rest = [token for part in (" Because.", "\nAnswer:", " fix") for token in ids(model, part)]
        assert row["input_ids"] == cot.encode_prompt(text) + rest

    def test_examples_are_earlier_turns_of_the_chat(self, task):
        backbone = tiny_backbone("llama")
        backbone.tokenizer.chat_template = "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
        example = {"input_text": "It broke.", "rationale": "It can be repaired.", "label": 0}
        zero, one = (CoT.from_backbone(backbone, task, examples) for examples in ([], [example]))
        turn = f"It broke.\n\nLet's think step by step.(assistant)It can be repaired. {SENTINEL} fix(user)"
        text = one.tokenizer.decode(one.encode_prompt("Why?"))
        assert turn in text
        assert "one of: fix, refund, explain." in text
        assert text.endswith(zero.tokenizer.decode(zero.encode_prompt("Why?")))
        assert (zero.name, one.name) == ("zero-shot", "1-shot")

    def test_import_loads_no_openai_client(self):
        script = "import sys, dhrd_lib.cot; assert 'openai' not in sys.modules"
        subprocess.run([sys.executable, "-c", script], check=True)


class TestDecoding:
    def test_defaults_are_the_papers(self, cot):
        expected = {"do_sample": True, "temperature": 0.1, "top_p": 0.7, "top_k": 0, "max_new_tokens": 500}
        expected |= {"repetition_penalty": 1.0, "seed": 0, "is_complete": cot.reader.is_settled}
        assert Decoding().arguments(cot.reader) == expected

    @pytest.mark.parametrize("sample", [True, False])
    @pytest.mark.parametrize("budget", [1, 7, 24])
    def test_truncation_equals_a_smaller_budget(self, cot, sample, budget):
        decoding = SHORT.replace({"batch_size": 2, "sample": sample})
        smaller = cot.generate(TEXTS, decoding.replace({"max_new_tokens": budget}))
        assert cot.generate(TEXTS, decoding).truncated(budget).samples == smaller.samples
        assert {len(row[0]) for row in smaller.samples} == {budget}

    def test_row_ends_at_its_answer(self, cot, model, monkeypatch):
        script = [ids(model, " so\nAnswer: refund. More"), ids(model, " it is so\nAnswer: fix\n And more of it")]
        scripted(monkeypatch, model.backbone, script)
        generations = cot.generate(TEXTS[:2], Decoding(max_new_tokens=100))
        # Longest prompts go first, so the second text is the first row of the batch.
        decoded = [model.tokenizer.decode(row[0]) for row in generations.samples]
        assert decoded == [" it is so\nAnswer: fix\n", " so\nAnswer: refund."]
        assert generations.tokens.tolist() == [len(row[0]) for row in generations.samples]

    def test_early_stop_keeps_predictions(self, cot, model, monkeypatch):
        texts = [" a\nAnswer: fixed, fix it", " b\nAnswer: refunds", " c\nAnswer: explain refund fix"]
        scripted(monkeypatch, model.backbone, [ids(model, text) + ids(model, "\nfix\n" * 5) for text in texts])
        early, whole = (cot.predict(TEXTS, max_new_tokens=40, early_stop=early) for early in (True, False))
        assert early.labels == whole.labels
        assert early.tokens.sum() < whole.tokens.sum()

    def test_samples_differ_and_all_count_as_tokens(self, cot):
        generations = cot.generate(TEXTS, SHORT.replace({"n_samples": 3, "max_new_tokens": 5}))
        assert len(set(map(tuple, generations.samples[0]))) > 1
        scored = cot.score(generations)
        assert cot.parse(generations).tokens.tolist() == scored.tokens.tolist() == [15, 15, 15]
        np.testing.assert_allclose(scored.probabilities.sum(1), 1, atol=1e-5)

    def test_samples_vote_and_ties_go_to_the_first(self, cot, model):
        answers = [["explain", "refund", "explain"], ["x", "refund", "fix"], ["x", "x", "x"]]
        samples = [[ids(model, f"\nAnswer: {answer}") for answer in row] for row in answers]
        predictions = cot.parse(Generations(TEXTS, samples, 99, 1.0))
        assert predictions.prediction_ids.tolist() == [2, 1, NO_ANSWER]
        np.testing.assert_allclose(predictions.probabilities[0], [0, 1 / 3, 2 / 3])

    def test_stream_ends_with_what_generate_returns(self, cot):
        steps = list(cot.stream(TEXTS[1], SHORT))
        assert steps[-1].samples == cot.generate([TEXTS[1]], SHORT).samples
        assert [len(step.samples[0][0]) for step in steps] == list(range(1, 25))


class TestReading:
    def test_unanswered_rows_have_no_label(self, cot, model):
        rows = [ids(model, " broken\nAnswer: refund"), ids(model, " broken\nAnswer: maybe")]
        predictions = cot.parse(Generations(TEXTS[:2], [[row] for row in rows], 9, 1.0))
        assert predictions.prediction_ids.tolist() == [1, NO_ANSWER]
        assert predictions.labels == ["refund", None]
        assert predictions.tokens.tolist() == list(map(len, rows))
        assert predictions.probabilities.tolist() == [[0, 1, 0], [0, 0, 0]]

    def test_rationale_ends_before_the_marker(self, cot, model):
        before, marker = ids(model, " It is owed"), ids(model, "\nAnswer:")
        row = before + marker + ids(model, " refund. And more")
        assert cot._rationale(row) == (before, len(before + marker))
        assert cot._rationale(before) == (before, len(before))
        assert cot._rationale([*before, model.tokenizer.eos_token_id]) == (before, len(before) + 1)

    def test_scored_row_is_the_row_of_training(self, cot, model, monkeypatch):
        scored = []

        def score(lm, prefixes, *_, **__):
            scored.extend(prefixes)
            return np.zeros((1, 3))

        monkeypatch.setattr(decoding, "score_continuations", score)
        fmt, text = model.sequence_format, "Customer: Why?\nWhat must happen next?"
        cot.score(Generations([text], [[ids(model, " Because.")]], 9, 1.0))
        cot.score(Generations([text], [[[]]], 0, 0.0))
        # Without a rationale it is the paper's OnlyLabel.
        rows = [encode_example(fmt, text, rationale, "fix")["input_ids"] for rationale in ("Because.", None)]
        assert scored == [row[: -len(ids(model, " fix"))] for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_a_whole_forward(task, architecture):
    model = tiny_model(task, architecture)
    prefixes = [ids(model, text) for text in TEXTS]
    labels = [ids(model, text) for text in (" fix", " refund the money", " explain why")]
    expected = np.zeros((3, 3))
    for i, prefix in enumerate(prefixes):
        for k, label in enumerate(labels):
            with torch.no_grad():
                log_probs = model.backbone(torch.tensor([prefix + label])).logits[0].log_softmax(-1)
            expected[i, k] = sum(log_probs[len(prefix) + j - 1, token] for j, token in enumerate(label))
    np.testing.assert_allclose(score_continuations(model.backbone, prefixes, labels), expected, atol=1e-4)
