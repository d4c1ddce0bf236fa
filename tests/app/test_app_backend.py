"""The backend on tiny models: predictions, streams that stop, models in memory, refused inputs."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from app_runs import BASELINE, DHRD, REASONING, TEXTS, last, never, store_runs

from app.backend import ZERO_SHOT, Backend
from app.settings import MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_ROWS, Settings
from dhrd_lib.config import ConfigError
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.tasks import TaskError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return store_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def backend(root) -> Backend:
    return Backend(Settings(runs=root, backbone="tiny"))


def test_classify_matches_model(backend, root):
    model = DHRDModel.from_pretrained(root / DHRD / "model")
    expected = model.predict([TEXTS])
    actual = backend.classify(DHRD, TEXTS)
    assert actual.label == expected.labels[0]
    np.testing.assert_allclose(list(actual.probabilities.values()), expected.probabilities[0], atol=1e-6)
    assert list(actual.probabilities) == model.label_names
    assert (actual.tokens_read > 10, actual.tokens_cut, actual.tokens_written) == (True, 0, 0)
    assert actual.latency_ms > 0
    assert backend.classify(DHRD, TEXTS["text"]).probabilities == actual.probabilities
    long = backend.classify(DHRD, {"text": "lamp " * 200})
    assert (long.tokens_read, long.tokens_cut > 0) == (64, True)


def test_rows_match_single_inputs(backend):
    rows = [{"text": f"{TEXTS['text']} {'again ' * n}"} for n in range(20)]
    steps = list(backend.classify_rows(DHRD, rows))
    alone = [backend.classify(DHRD, row) for row in rows]
    assert [len(step.predictions.labels) for step in steps] == [16, 20]
    expected = [list(answer.probabilities.values()) for answer in alone]
    np.testing.assert_allclose(steps[-1].predictions.probabilities, expected, atol=1e-5)
    assert steps[-1].predictions.labels == [answer.label for answer in alone]
    assert steps[-1].inputs_cut == sum(answer.tokens_cut > 0 for answer in alone)
    assert steps[-1].seconds > steps[0].seconds > 0


def test_three_models_stay_in_memory(root, monkeypatch):
    backend, loaded = Backend(Settings(runs=root, backbone="tiny")), []
    load = DHRDModel.from_pretrained
    monkeypatch.setattr(DHRDModel, "from_pretrained", lambda path: loaded.append(path) or load(path))
    for run in (BASELINE, DHRD, DHRD, BASELINE):
        backend.classify(run, TEXTS)
    backend.load(REASONING, "support_triage")
    assert len(loaded) == 3
    backend.classify(DHRD, TEXTS)
    last(backend.cot("support_triage", ZERO_SHOT, TEXTS, 2, never))
    assert len(backend._models) == len(loaded) == 3
    assert ("run", BASELINE) not in backend._models


def test_retrained_run_replaces_model_in_memory(tmp_path):
    root = store_runs(tmp_path, DHRD)
    backend = Backend(Settings(runs=root, backbone="tiny"))
    before = backend.classify(DHRD, TEXTS).probabilities
    old = weakref.ref(backend._model(DHRD))
    shutil.rmtree(root / DHRD)
    with pytest.raises(ConfigError, match="There is no finished run"):
        backend.classify(DHRD, TEXTS)
    store_runs(root, BASELINE, DHRD)  # of another seed
    actual = backend.classify(DHRD, TEXTS).probabilities
    expected = DHRDModel.from_pretrained(root / DHRD / "model").predict([TEXTS]).probabilities[0]
    np.testing.assert_allclose(list(actual.values()), expected, atol=1e-6)
    assert actual != before
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("name", ["../runs/tiny-dhrd", "/etc", "", None, ["tiny-dhrd"]])
def test_run_is_looked_up_and_never_a_path(backend, name):
    with pytest.raises(ConfigError, match="There is no finished run"):
        backend.classify(name, TEXTS)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "  "}, "input 1 has no text"),
        ({"body": "x"}, "input 1 lacks 'text'; expected a dict with 'text'"),
        ({"text": "x" * (MAX_CHARACTERS + 1)}, "input 1 has 8,001 characters; expected at most 8,000"),
        ("x" * (MAX_CHARACTERS + 1), "8,001 characters"),
        ([{"text": "x"}], "input 1 is of the type list; expected a dict with 'text'"),
        (None, "input 1 is of the type NoneType"),
    ],
)
def test_bad_input_is_refused(backend, inputs, message):
    for call in (
        lambda: backend.classify(DHRD, inputs),
        lambda: next(backend.classify_rows(DHRD, [inputs])),
        lambda: next(backend.rationale(DHRD, inputs, never)),
        lambda: next(backend.cot("support_triage", ZERO_SHOT, inputs, 8, never)),
    ):
        with pytest.raises(TaskError, match=message):
            call()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "There are 0 rows; expected 1 to 5,000"),
        ([TEXTS] * (MAX_ROWS + 1), "There are 5,001 rows"),
        (3, "is of the type int"),
        ([TEXTS, {"text": ""}], "input 2 has no text"),
    ],
)
def test_bad_rows_are_refused(backend, rows, message):
    with pytest.raises(TaskError, match=message):
        next(backend.classify_rows(DHRD, rows))


@pytest.mark.parametrize("budget", [0, MAX_NEW_TOKENS + 1, "8", None])
def test_bad_token_budget_is_refused(backend, budget):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        next(backend.cot("support_triage", ZERO_SHOT, TEXTS, budget, never))


def test_untrained_classifier_gives_no_figures(backend, root):
    for call in (
        lambda: backend.classify(REASONING, TEXTS),
        lambda: next(backend.classify_rows(REASONING, [TEXTS])),
    ):
        with pytest.raises(ConfigError, match=r"beta = 0\), so its classifier is untrained; expected CoT"):
            call()
    assert last(backend.cot("support_triage", REASONING, TEXTS, 4, never)).answer is not None


def test_cot_streams_and_ends_with_answer(backend):
    steps = list(backend.cot("support_triage", REASONING, TEXTS, 8, never))
    assert [step.tokens for step in steps[:-1]] == list(range(1, len(steps)))
    assert all(step.answer is None for step in steps[:-1])
    answer = steps[-1].answer
    assert answer.tokens_written == steps[-1].tokens
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-4)
    stopped = list(backend.cot("support_triage", REASONING, TEXTS, 8, lambda: True))
    assert [(step.tokens, step.answer) for step in stopped] == [(1, None)]


def test_closed_stream_frees_backend(backend):
    for steps in (
        backend.cot("support_triage", ZERO_SHOT, TEXTS, 200, never),
        backend.rationale(DHRD, TEXTS, never),
        backend.classify_rows(DHRD, [TEXTS] * 40),
    ):
        next(steps)
        steps.close()
        assert backend._computing.acquire(timeout=5)
        backend._computing.release()


def test_rationale_matches_model(backend, root):
    expected = DHRDModel.from_pretrained(root / DHRD / "model").generate_rationale(TEXTS, 24)
    assert last(backend.rationale(DHRD, TEXTS, never)).text == expected
