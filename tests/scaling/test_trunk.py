"""The frozen-trunk cache: the same states, computed once, and never another row's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from dhrd_lib.modeling import DHRDModel
from dhrd_lib.scaling import trunk_cache
from dhrd_lib.scaling.trunk_cache import cached_trunk_states, logits_from_states, skip_layers, trunk_states
from dhrd_lib.sequences import DHRDCollator, encode_examples

TEXTS = ["My lamp broke.", "I was charged twice, and want it back.", "Why?"]
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path))


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Return the numbers of rows for which states are computed from here on."""
    numbers = []
    monkeypatch.setattr(
        trunk_cache, "trunk_states", lambda *args: numbers.append(len(args[1]["input_ids"])) or trunk_states(*args)
    )
    return numbers


def rows(model: DHRDModel, rationale: str | None = "money is owed") -> list[dict]:
    label = None if rationale is None else "fix"
    return encode_examples(model.sequence_format, TEXTS, [rationale] * 3, [label] * 3)


def cached(model: DHRDModel, rows: list[dict], n_layers: int = 2) -> list[np.ndarray]:
    return cached_trunk_states(model, {"train": rows}, n_layers)["train"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_skipped_layers_change_no_state(task, architecture, n_layers):
    model = tiny_model(task, architecture)
    batch = DHRDCollator(model.tokenizer.pad_token_id)(rows(model))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    decoder = model.backbone.get_decoder()
    with torch.no_grad():
        expected = decoder(ids, attention_mask=mask).last_hidden_state
        with skip_layers(model, range(n_layers), trunk_states(model, batch, n_layers)):
            states = decoder(ids, attention_mask=mask).last_hidden_state
        after = decoder(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[mask.bool()], expected[mask.bool()], **EXACT)
    assert torch.equal(after, expected)  # The layers are back in their places.


def test_cached_states_and_their_logits_are_those_of_each_row_alone(task):
    model = tiny_model(task)
    inputs = rows(model, None)
    states = cached(model, inputs)
    for row, own in zip(inputs, states, strict=True):
        alone = DHRDCollator(model.tokenizer.pad_token_id)([row])
        np.testing.assert_allclose(own, trunk_states(model, alone, 2)[0], **EXACT)
    np.testing.assert_allclose(logits_from_states(model, inputs, states, 2), model.logits(inputs), **EXACT)


def test_states_are_computed_once_and_serve_the_inputs_alone(task, computed):
    model = tiny_model(task)
    full = cached(model, rows(model))
    assert sum(computed) == 3
    again, alone = cached(model, rows(model)), cached(model, rows(model, None))
    assert sum(computed) == 3
    for i, row in enumerate(rows(model)):
        assert np.array_equal(again[i], full[i])
        assert np.array_equal(alone[i], full[i][: row["input_length"]])


def test_states_belong_to_rows_layers_weights_and_dtype_but_not_to_a_folder(task, computed):
    model = tiny_model(task)
    cached(model, rows(model))
    model.config.backbone_config._name_or_path = "another/folder"
    cached(model, rows(model))
    assert sum(computed) == 3
    cached(model, rows(model, "another rationale"))
    assert sum(computed) == 6
    cached(model, rows(model), 1)
    assert sum(computed) == 9
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    cached(model, rows(model))
    assert sum(computed) == 12
    model.backbone.has_autocast = True
    cached(model, rows(model))
    assert sum(computed) == 15


def test_an_interrupted_computation_leaves_no_states(task, monkeypatch, tmp_path):
    model = tiny_model(task)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trunk_cache, "trunk_states", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(model, rows(model))
    assert not list(tmp_path.rglob("*.npy"))
    assert np.abs(cached(model, rows(model))[1]).sum() > 0
