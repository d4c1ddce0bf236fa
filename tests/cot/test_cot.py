"""CoT decoding: prompts as taught, budgets to the token, answers as written, a cascade with honest ends."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone, tiny_model
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dhrd_lib.config import ConfigError
from dhrd_lib.cot import decoding as cots
from dhrd_lib.cot.answers import AnswerReader, vote
from dhrd_lib.cot.decoding import GREEDY, CoT, Decoding, Written, cascade
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.inputs import SENTINEL
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.sequences import encode_example
from dhrd_lib.studies import plots
from dhrd_lib.studies.calibration import reliability

TEXTS = ["My lamp broke.", "I was charged twice for one night, and want the money back.", "Why?"]
SHORT = Decoding(max_new_tokens=24, early_stop=False, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def model(task) -> DHRDModel:
    return tiny_model(task)


@pytest.fixture(scope="module")
def cot(model) -> CoT:
    return cots.fine_tuned(model)


def ids(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False).input_ids


def lively(task, architecture: str) -> DHRDModel:
    """A tiny model whose greedy tokens depend on what it has read."""
    model = tiny_model(task, architecture)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def scripted(monkeypatch, lm, script: list[list[int]]) -> list[int]:
    """Make the model write `script[row]`, whatever it reads; gives the lengths of the steps it was asked for."""
    steps = []

    def generate(input_ids, stopping_criteria, max_new_tokens, pad_token_id, **_):
        grown = input_ids
        for step in range(max_new_tokens):
            column = [row[step] if step < len(row) else pad_token_id for row in script]
            grown = torch.cat([grown, torch.tensor(column)[:, None]], 1)
            steps.append(step)
            if all(done.all() for done in (stop(grown, None) for stop in stopping_criteria)):
                break
        return grown

    monkeypatch.setattr(lm, "generate", generate)
    return steps


class TestPrompts:
    def test_a_tuned_model_reads_the_ids_that_it_was_taught_with(self, model, cot):
        row = encode_example(model.sequence_format, "Customer: Why?\nWhat must happen next?", "Because.", "fix")
        prompt = cot.encode_prompt("Customer: Why?\nWhat must happen next?")
        assert row["input_ids"][: len(prompt)] == prompt
        rest = [ids(model, text) for text in (" Because.", "\nAnswer:", " fix")]
        assert row["input_ids"][len(prompt) :] == [token for part in rest for token in part]

    def test_zero_shot_names_the_labels_the_sentinel_and_the_input(self, task):
        zero = cots.zero_shot(tiny_backbone("llama"), task)
        text = zero.tokenizer.decode(zero.encode_prompt("Customer: Why?"))
        assert all(part in text for part in ("fix, refund, explain", SENTINEL, "Customer: Why?"))
        assert zero.name == "zero-shot"

    def test_a_chat_template_is_used_where_there_is_one(self, task):
        backbone = tiny_backbone("llama")
        backbone.tokenizer.chat_template = "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
        example = {"input_text": "It broke.", "rationale": "It can be mended.", "label": 0}
        shots = cots.few_shot(backbone, task, [example])
        text = shots.tokenizer.decode(shots.encode_prompt("Why?"))
        order = ["(user)", "It broke.", f"(assistant)It can be mended. {SENTINEL} fix", "(user)", "Why?"]
        places = [text.index(order[0])]
        for part in order[1:]:
            places.append(text.index(part, places[-1] + 1))
        assert places == sorted(places)
        assert shots.name == "1-shot"

    def test_examples_are_seeded_and_take_the_labels_in_turn(self):
        rows = [{"label": i % 3, "rationale": "why" if i else None, "idx": i} for i in range(30)]
        train = Dataset.from_list(rows)
        picked = cots.pick_examples(train, 5, seed=1)
        assert [row["label"] for row in picked] == [0, 1, 2, 0, 1]
        assert len({row["idx"] for row in picked}) == 5
        assert picked == cots.pick_examples(train, 5, seed=1)
        assert picked != cots.pick_examples(train, 5, seed=2)
        with pytest.raises(ConfigError, match="29 rows of train have a rationale; expected at least k=30"):
            cots.pick_examples(train, 30)

    def test_what_does_not_fit_the_context_is_refused(self, cot):
        with pytest.raises(ConfigError, match="the backbone's context is 2048"):
            cot.write(TEXTS, Decoding(max_new_tokens=2040))


class TestReading:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("It broke.\nAnswer: entailment", 0),
            ("\nAnswer: not entailment", 1),
            ("\nAnswer: Not_Entailment.", 1),
            ("\nAnswer:\n\n  **ENTAILMENT**, I think", 0),
            ("\nAnswer: The answer is: not entailment; no entailment", 1),
            ("\nAnswer: entailments", NO_ANSWER),
            ("\nAnswer: none of them\nentailment", NO_ANSWER),
            ("\nAnswer: " + "x" * 80 + " entailment", NO_ANSWER),
            ("It is entailment.", NO_ANSWER),
            ("\nAnswer: entailment\nAnswer: not entailment", 0),
            ("", NO_ANSWER),
        ],
    )
    def test_an_answer_is_the_first_whole_label_in_the_line_after_the_marker(self, text, answer):
        reader = AnswerReader("\nAnswer:", ["entailment", "not_entailment"], ["entailment", "not entailment"])
        assert reader.read(text) == answer

    def test_a_label_that_may_still_grow_is_waited_for(self):
        reader = AnswerReader("A:", ["fix", "fix now"], ["fix", "fix now"])
        grown = ["A:", "A: fix", "A: fix ", "A: fix n"]
        assert not any(reader.is_settled(text) for text in grown)
        assert reader.is_settled("A: fix nu")
        assert reader.is_settled("A: fix now.")
        assert (reader.read("A: fix nu"), reader.read("A: fix now.")) == (0, 1)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(["A:", " ", "\n", "not", "fix", "fix now", "entailment", "ed", ".", "x" * 30])))
    def test_what_is_written_after_an_answer_is_settled_changes_nothing(self, parts):
        reader = AnswerReader("A:", ["fix", "fix now", "not fix at all"], ["fix", "entailment", "not entailment"])
        texts = ["".join(parts[:n]) for n in range(len(parts) + 1)]
        for before, after in pairwise(texts):
            if reader.is_settled(before):
                assert reader.is_settled(after)
                assert reader.read(after) == reader.read(before)

    def test_a_row_without_an_answer_is_counted_and_wrong(self, cot, model):
        said = [ids(model, " broken\nAnswer: refund"), ids(model, " broken\nAnswer: maybe")]
        answers = cot.parse(Written(TEXTS[:2], [[row] for row in said], 9, 1.0))
        assert answers.predictions.tolist() == [1, NO_ANSWER]
        assert answers.unanswered == 1
        assert answers.tokens.tolist() == [len(row) for row in said]
        assert answers.shares.tolist() == [[0, 1, 0], [0, 0, 0]]


class TestDecoding:
    def test_the_defaults_are_the_papers(self):
        assert Decoding().arguments() == {
            "do_sample": True,
            "temperature": 0.1,
            "top_p": 0.7,
            "top_k": 0,
            "max_new_tokens": 500,
            "repetition_penalty": 1.0,
        }

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_left_padding_and_batches_change_nothing(self, task, architecture):
        cot = cots.fine_tuned(lively(task, architecture))
        greedy = replace(GREEDY, max_new_tokens=12, early_stop=False)
        together, alone = (cot.write(TEXTS, replace(greedy, batch_size=n)) for n in (3, 1))
        assert together.samples == alone.samples
        assert len({tuple(row[0]) for row in alone.samples}) > 1  # The texts do give different tokens.

    @pytest.mark.parametrize("decoding", [replace(GREEDY, max_new_tokens=24, early_stop=False), SHORT])
    @pytest.mark.parametrize("budget", [1, 7, 24])
    def test_a_cut_equals_decoding_anew_with_that_budget(self, cot, decoding, budget):
        decoding = replace(decoding, batch_size=2)
        cut = cot.write(TEXTS, decoding).cut(budget)
        anew = cot.write(TEXTS, replace(decoding, max_new_tokens=budget))
        assert cut.samples == anew.samples
        assert {len(row[0]) for row in anew.samples} == {budget}

    def test_the_seed_draws_and_the_callers_draws_stay(self, cot):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        one, again, other = (cot.write(TEXTS, replace(SHORT, seed=seed)).samples for seed in (0, 0, 1))
        assert one == again != other
        assert torch.equal(torch.rand(3), expected)

    def test_a_row_ends_at_its_answer_and_the_batch_at_its_last(self, cot, model, monkeypatch):
        script = [ids(model, " so\nAnswer: refund. More"), ids(model, " it is so\nAnswer: fix\n And more of it")]
        steps = scripted(monkeypatch, model.backbone, script)
        written = cot.write(TEXTS[:2], Decoding(max_new_tokens=100))
        # Longest prompts go first, so the second text is the first row of the batch.
        second, first = (model.tokenizer.decode(row[0]) for row in written.samples)
        assert first == " so\nAnswer: refund."
        assert second == " it is so\nAnswer: fix\n"
        assert len(steps) == max(len(row[0]) for row in written.samples)

    def test_an_end_token_ends_a_row_and_is_counted(self, cot, model, monkeypatch):
        end = model.tokenizer.eos_token_id
        scripted(monkeypatch, model.backbone, [[*ids(model, " so\nAnswer: fix"), end, *ids(model, " more")]])
        written = cot.write(TEXTS[:1], Decoding(max_new_tokens=100))
        assert written.samples[0][0][-1] == end
        answers = cot.parse(written)
        assert answers.predictions.tolist() == [0]
        assert answers.tokens.tolist() == [len(ids(model, " so\nAnswer: fix")) + 1]

    def test_early_stop_leaves_the_answers_as_they_are(self, cot, model, monkeypatch):
        said = [" a\nAnswer: fixed, fix it", " b\nAnswer: refunds", " c\nAnswer: explain refund fix"]
        script = [ids(model, text) + ids(model, "\nfix\n" * 5) for text in said]
        read = {}
        for early in (True, False):
            scripted(monkeypatch, model.backbone, script)
            read[early] = cot.parse(cot.write(TEXTS, Decoding(max_new_tokens=40, early_stop=early)))
        assert read[True].predictions.tolist() == read[False].predictions.tolist()
        assert read[True].tokens.sum() < read[False].tokens.sum()

    def test_tokens_of_all_samples_are_counted(self, cot):
        written = cot.write(TEXTS, replace(SHORT, n_samples=3, max_new_tokens=5))
        assert [len(row) for row in written.samples] == [3, 3, 3]
        assert cot.parse(written).tokens.tolist() == [15, 15, 15]
        assert len({tuple(ids) for ids in written.samples[0]}) > 1  # Samples of a row differ.

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_samples": 0}, "n_samples is 0"),
            ({"n_samples": 2, "sample": False}, "n_samples is 2 with greedy decoding"),
            ({"temperature": 0.0}, "greedy decoding is sample=False"),
            ({"top_p": 1.5}, "top_p 1.5"),
        ],
    )
    def test_parameters_that_make_no_sense_are_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            Decoding(**changes)


class TestScoring:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_scores_are_the_log_probabilities_of_a_whole_forward(self, task, architecture):
        model = lively(task, architecture)
        prefixes = [ids(model, text) for text in TEXTS]
        words = [ids(model, text) for text in (" fix", " refund the money", " explain why")]
        assert len({len(word) for word in words}) > 1
        expected = np.zeros((3, 3))
        for i, prefix in enumerate(prefixes):
            for k, word in enumerate(words):
                with torch.no_grad():
                    found = model.backbone(torch.tensor([prefix + word])).logits[0].log_softmax(-1)
                expected[i, k] = sum(found[len(prefix) + j - 1, token] for j, token in enumerate(word))
        for budget in (1, 10_000):
            scores = cots.score_continuations(model.backbone, prefixes, words, 0, max_batch_tokens=budget)
            np.testing.assert_allclose(scores, expected, atol=1e-4)
        means = cots.score_continuations(model.backbone, prefixes, words, 0, mean=True)
        np.testing.assert_allclose(means, expected / [len(word) for word in words], atol=1e-4)

    def test_the_rationale_ends_before_the_marker_and_only_that_is_spent(self, cot, model):
        before, marker = ids(model, " It is owed"), ids(model, "\nAnswer:")
        row = before + marker + ids(model, " refund. And more")
        assert cot._rationale(row) == (before, len(before + marker))
        assert cot._rationale(before) == (before, len(before))
        assert cot._rationale([*before, model.tokenizer.eos_token_id]) == (before, len(before) + 1)

    def test_what_is_scored_is_the_row_of_training(self, cot, model, monkeypatch):
        seen = []

        def score(lm, prefixes, words, pad_token_id, **_):
            seen.append(prefixes)
            return np.zeros((1, 3))

        monkeypatch.setattr(cots, "score_continuations", score)
        fmt, text = model.sequence_format, "Customer: Why?\nWhat must happen next?"
        cot.score(Written([text], [[ids(model, " Because.")]], 9, 1.0))
        cot.without_rationale(["Why?"])
        answer = len(ids(model, " fix"))
        assert seen[0] == [encode_example(fmt, text, "Because.", "fix")["input_ids"][:-answer]]
        assert seen[1] == [encode_example(fmt, text, None, "fix")["input_ids"][:-answer]]  # the paper's OnlyLabel

    def test_probabilities_sum_to_one_and_answer_for_every_row(self, cot):
        answers = cot.score(cot.write(TEXTS, replace(SHORT, n_samples=2, max_new_tokens=4)))
        np.testing.assert_allclose(answers.shares.sum(1), 1, atol=1e-5)
        assert answers.unanswered == 0
        assert answers.tokens.tolist() == [8, 8, 8]

    def test_special_markers_are_found_in_what_is_written(self, task):
        model = tiny_model(task, markers="special")
        cot = cots.fine_tuned(model)
        row = ids(model, " so") + ids(model, "<ANS>") + ids(model, " refund")
        assert cot.parse(Written(["x"], [[row]], 9, 1.0)).predictions.tolist() == [1]
        assert cot._rationale(row) == (ids(model, " so"), len(ids(model, " so")) + 1)


class TestVote:
    def test_the_majority_wins_and_rows_without_an_answer_have_no_vote(self):
        read = np.array([[2, 1, 2], [NO_ANSWER, NO_ANSWER, 1], [NO_ANSWER] * 3])
        assert vote(read).tolist() == [2, 1, NO_ANSWER]

    def test_ties_go_to_the_first_or_to_the_more_probable(self):
        read = np.array([[2, 1]])
        probabilities = np.array([[[0.1, 0.4, 0.5], [0.0, 0.9, 0.1]]])
        assert vote(read).tolist() == [2]
        assert vote(read, probabilities).tolist() == [1]


class TestBudgets:
    def test_budgets_are_honoured_to_the_token_by_both_readings(self, cot):
        written = cot.write(TEXTS, SHORT)
        table = cots.accuracy_by_budget(cot, written, [0, 1, 2], budgets=(0, 4, 9))
        assert table[["reading", "budget"]].to_numpy().tolist() == [
            ["parsed", 4],
            ["parsed", 9],
            ["scored", 0],
            ["scored", 4],
            ["scored", 9],
        ]
        assert table["tokens"].tolist() == table["budget"].tolist()
        assert (table["rows"] == 3).all()
        assert table["value"].between(table["low"], table["high"]).all()

    def test_budget_zero_is_the_lm_head_alone(self, cot):
        (row,) = cots.accuracy_by_budget(cot, cot.write(TEXTS, SHORT), [0, 1, 2], budgets=(0,)).to_dict("records")
        np.testing.assert_allclose(row["answers"].shares, cot.without_rationale(TEXTS).shares, atol=1e-6)
        assert (row["tokens"], row["unanswered"]) == (0, 0)

    def test_a_budget_beyond_what_was_decoded_is_refused(self, cot):
        with pytest.raises(ConfigError, match="The budget is 25; at most 24 tokens were decoded"):
            cot.write(TEXTS, SHORT).cut(25)


class TestCascade:
    LABELS = np.array([0, 1, 1, 0])
    PROBABILITIES = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    COT = np.array([NO_ANSWER, 1, 1, 0])
    COST = np.array([1.0, 2.0, 3.0, 4.0])

    def curve(self, **changes):
        costs = {"classifier_seconds": 0.5, "cot_seconds": self.COST} | changes
        return cascade(self.LABELS, self.PROBABILITIES, self.COT, **costs)

    def test_its_ends_are_the_two_pure_systems(self):
        curve = self.curve()
        first, last = curve.iloc[0], curve.iloc[-1]
        assert (first["share_to_cot"], first["value"], first["queries_per_second"]) == (0, 0.5, 1 / 0.5)
        assert (last["share_to_cot"], last["value"], last["queries_per_second"]) == (1, 0.75, 4 / 10)
        assert last["threshold"] == math.inf

    def test_rows_under_the_threshold_go_to_cot_and_pay_for_both(self):
        # Confidence 0.9, 0.6, 0.8, 0.7: the second row goes first, then the fourth, then the third.
        curve = self.curve()
        assert curve["share_to_cot"].tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert curve["value"].tolist() == [0.5, 0.75, 1, 1, 0.75]
        assert curve["queries_per_second"].tolist() == pytest.approx([4 / 2, 4 / 4, 4 / 8, 4 / 11, 4 / 10])

    def test_one_cost_for_every_row_will_do(self):
        assert self.curve(cot_seconds=2.5)["queries_per_second"].iloc[-1] == pytest.approx(1 / 2.5)

    def test_rows_of_equal_confidence_go_together(self):
        curve = cascade([0, 1], np.full((2, 2), 0.5), [0, 1], classifier_seconds=1.0, cot_seconds=1.0)
        assert curve["share_to_cot"].tolist() == [0, 1]

    def test_seconds_are_shared_out_by_tokens(self):
        written = Written(["a", "b"], [[[1, 2, 3]], [[4], [5]]], 9, 10.0)
        assert cots.seconds_by_row(written).tolist() == [6.0, 4.0]


class TestFigures:
    def test_accuracy_is_drawn_against_tokens_with_the_pooled_systems_as_level_lines_in_every_panel(self):
        rows = pd.DataFrame({"cot": ["zero-shot", "zero-shot", "3-shot"], "reading": ["parsed"] * 3})
        rows = rows.assign(budget=[9, 99, 9], tokens=[9.0, 99.0, 9.0], value=[0.2, 0.6, 0.4])
        rows = rows.assign(low=rows["value"] - 0.1, high=rows["value"] + 0.1, unanswered=0, rows=10)
        figure = plots.accuracy_by_tokens(rows, {"DHRD": 0.8})
        line, level, other, again = figure.data
        assert np.allclose(line.x, [1, 2])  # log10(1 + tokens), so that 0 has its place
        assert np.allclose(line.y, [20, 60])
        assert np.allclose(line.error_y.arrayminus, [10, 10])
        assert np.allclose(other.y, [40])
        assert level.name == again.name == "DHRD, no token"
        assert set(level.y) == set(again.y) == {80}
        assert [trace.xaxis for trace in figure.data] == ["x", "x", "x2", "x2"]
        assert [trace.showlegend for trace in figure.data] == [True, True, False, False]

    def test_the_cascade_has_its_ends_marked(self):
        curve = cascade([0, 1], [[0.9, 0.1], [0.6, 0.4]], [0, 1], classifier_seconds=1.0, cot_seconds=9.0)
        line, classifier, reasoner = plots.cascade_curve(curve).data
        assert np.allclose(line.y, 100 * curve["value"])
        assert (classifier.x[0], classifier.y[0]) == (1.0, 50)
        assert reasoner.x[0] == pytest.approx(1 / 9)
        assert reasoner.y[0] == 100

    def test_reliability_is_drawn_against_the_line_where_it_would_lie(self):
        table = reliability([0, 0], [[0.9, 0.1], [0.4, 0.6]], n_bins=2)
        diagonal, line = plots.reliability_diagram({"DHRD": table}, "test").data
        assert diagonal.x == diagonal.y
        assert np.allclose([line.x, line.y], [[60, 90], [0, 100]])

    def test_throughput_has_a_log_axis_and_a_bar_a_system(self):
        row = {"latency_p50_ms": 1.0, "latency_p95_ms": 2.0, "written_tokens_per_query": 0.0, "queries": 5}
        row |= {"best_batch": 8, "best_batch_unit": "rows"}
        rows = pd.DataFrame(
            [{**row, "system": n, "queries_per_second": q} for n, q in (("DHRD", 50), ("CoT", 0.2))]
        )
        figure = plots.throughput_bars(rows)
        assert figure.layout.xaxis.type == "log"
        assert list(figure.data[0].y) == ["DHRD", "CoT"]
        assert np.allclose(figure.data[0].x, [50, 0.2])


@pytest.mark.slow
def test_the_embedded_backbone_reasons_and_answers_after_examples():
    from dhrd_lib.backbones import load_backbone
    from dhrd_lib.tasks import load_task

    task, splits = load_task("support_triage")
    cot = cots.few_shot(load_backbone(), task, cots.pick_examples(splits["train"], 5))
    written = cot.write(list(splits["test"].select(range(4))), Decoding(max_new_tokens=120))
    assert cot.parse(written).unanswered < 4
