"""The frozen-trunk cache: the same states, computed once, and never another row's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model

from dhrd_lib.modeling import DHRDModel
from dhrd_lib.scaling.trunk_cache import cached_trunk_states
from dhrd_lib.sequences import encode_example


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path))


def rows(model: DHRDModel, rationale: str | None = "money is owed") -> list[dict]:
    texts = ("My lamp broke.", "I was charged twice, and want it back.", "Why?")
    label = None if rationale is None else "fix"
    return [encode_example(model.sequence_format, text, rationale, label) for text in texts]


def computed(model: DHRDModel, monkeypatch) -> list[int]:
    """The numbers of rows for which states are computed from here on."""
    seen, own = [], model.trunk_states
    monkeypatch.setattr(model, "trunk_states", lambda ids, *rest: seen.append(len(ids)) or own(ids, *rest))
    return seen


def test_cached_states_are_the_states_of_each_row_alone(task):
    model = tiny_model(task)
    made = rows(model)
    for row, states in zip(made, cached_trunk_states(model, made, 2, max_batch_tokens=40), strict=True):
        ids = torch.tensor([row["input_ids"]])
        expected = model.trunk_states(ids, torch.ones_like(ids), 2)[0].numpy()
        np.testing.assert_allclose(states, expected, atol=1e-5)


def test_states_are_computed_once_and_serve_the_inputs_alone(task, monkeypatch):
    model = tiny_model(task)
    made = rows(model)
    seen = computed(model, monkeypatch)
    full = cached_trunk_states(model, made, 2)
    assert sum(seen) == 3
    again, alone = cached_trunk_states(model, made, 2), cached_trunk_states(model, rows(model, None), 2)
    assert sum(seen) == 3
    for i, row in enumerate(made):
        assert np.array_equal(again[i], full[i])
        assert np.array_equal(alone[i], full[i][: row["input_length"]])


def test_the_states_of_a_backbone_serve_it_in_another_folder_too(task, monkeypatch):
    model = tiny_model(task)
    seen = computed(model, monkeypatch)
    for folder in ("here/backbone", "there/backbone"):
        model.config.backbone_config._name_or_path = folder
        cached_trunk_states(model, rows(model), 2)
    assert sum(seen) == 3


def test_a_changed_row_layer_count_or_backbone_is_computed_anew(task, monkeypatch):
    model = tiny_model(task)
    seen = computed(model, monkeypatch)
    cached_trunk_states(model, rows(model), 2)
    cached_trunk_states(model, rows(model, "another rationale"), 2)
    assert sum(seen) == 6
    cached_trunk_states(model, rows(model), 1)
    assert sum(seen) == 9
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    cached_trunk_states(model, rows(model), 2)
    assert sum(seen) == 12


def test_an_interrupted_computation_is_not_read_and_is_made_again(task, monkeypatch, tmp_path):
    model = tiny_model(task)
    made = rows(model)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "trunk_states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_trunk_states(model, made, 2)
    assert list(tmp_path.rglob("*.npy"))
    states = cached_trunk_states(model, made, 2)
    assert np.abs(states[1]).sum() > 0
    assert len(list(tmp_path.rglob("*.npy"))) == 1


@pytest.mark.parametrize("file", ["*.npy", "*.json"])
def test_states_that_were_cut_short_are_computed_again(task, monkeypatch, tmp_path, file):
    model = tiny_model(task)
    made = rows(model)
    whole = [states.copy() for states in cached_trunk_states(model, made, 2)]
    (path,) = tmp_path.rglob(file)
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 8)
    seen = computed(model, monkeypatch)
    for states, expected in zip(cached_trunk_states(model, made, 2), whole, strict=True):
        assert np.array_equal(states, expected)
    assert sum(seen) == 3
