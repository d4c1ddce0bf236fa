"""One forward serves both heads, for every architecture; saving keeps everything."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dhrd_lib import backbones, generation
from dhrd_lib.backbones import autocast_if_faster, compute_dtype, layers_of, load_backbone
from dhrd_lib.config import POOLING_MODES, ConfigError, DataConfig, ModelConfig, TrainingConfig
from dhrd_lib.inputs import TaskError
from dhrd_lib.modeling import DHRDModel, build_model, pool
from dhrd_lib.sequences import DHRDCollator, encode_example

TEXTS = ["My lamp broke.", "I was charged twice for one night, and want the money back.", "Why?"]
RATIONALE = "The guest paid for a night that was never slept, so the sum is owed."
EXACT = {"rtol": 0, "atol": 1e-5}


def rows(model: DHRDModel, with_rationale: bool) -> list[dict]:
    fmt = model.sequence_format
    tail = (RATIONALE, "refund") if with_rationale else ()
    made = [encode_example(fmt, f"Customer: {text}\nWhat must happen next?", *tail) for text in TEXTS]
    return [{**row, "class_labels": i} for i, row in enumerate(made)]


def forward(model: DHRDModel, rows: list[dict], **kwargs):
    with torch.no_grad():
        return model(**DHRDCollator(model.tokenizer.pad_token_id)(rows), **kwargs)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, task) -> DHRDModel:
    return tiny_model(task, request.param)


def test_class_logits_ignore_rationale_padding_and_batch(model):
    alone, followed = forward(model, rows(model, False)), forward(model, rows(model, True))
    torch.testing.assert_close(followed.logits, alone.logits, **EXACT)
    assert alone.logits.std(0).max() > 1e-4  # The texts do give different logits.
    one_by_one = torch.cat([forward(model, [row]).logits for row in rows(model, False)])
    torch.testing.assert_close(one_by_one, alone.logits, **EXACT)


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_pooling_sees_the_input_span_alone(task, pooling):
    model = tiny_model(task, pooling=pooling)
    if pooling == "attention":
        torch.nn.init.normal_(model.pooling_query)
    alone, followed = forward(model, rows(model, False)), forward(model, rows(model, True))
    torch.testing.assert_close(followed.logits, alone.logits, **EXACT)


def test_predict_keeps_logits_of_training_and_order(model):
    expected = forward(model, rows(model, True)).logits.softmax(-1)
    hook = model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head ran"))
    labels, probabilities = model.predict(TEXTS, max_batch_tokens=64)
    hook.remove()
    torch.testing.assert_close(torch.from_numpy(probabilities), expected, **EXACT)
    assert labels == [model.label_names[i] for i in expected.argmax(-1)]


def test_predict_takes_one_input_or_a_frame(task):
    model = tiny_model(task)
    labels, probabilities = model.predict(TEXTS)
    frame = pd.DataFrame({"text": TEXTS, "other": 1})
    for inputs in ([{"text": text} for text in TEXTS], frame, iter(TEXTS)):
        assert model.predict(inputs).labels == labels
    for one in (TEXTS[0], {"text": TEXTS[0]}):
        np.testing.assert_allclose(model.predict(one).probabilities, probabilities[:1], **EXACT)
    assert model.predict([]).probabilities.shape == (0, 3)
    with pytest.raises(TaskError, match="input 3 has no text"):
        model.predict([*TEXTS[:2], " "])
    model.config.classifier_trained = False
    with pytest.raises(ConfigError, match="classifier is untrained"):
        model.predict(TEXTS)


def test_class_weights_weigh_rows_by_their_label(task):
    model = tiny_model(task)
    one_by_one = torch.stack([forward(model, [row]).class_loss for row in rows(model, False)])
    weights = torch.tensor([2.0, 0.5, 0.5])
    weighted = forward(model, rows(model, False), class_weights=weights).class_loss
    torch.testing.assert_close(weighted, (weights * one_by_one).sum() / 3)


@pytest.mark.parametrize("separate", [True, False])
def test_privileged_terms_by_hand(task, separate):
    model = tiny_model(task)
    if separate:
        taught = tiny_model(task, training=TrainingConfig(privileged_head="separate", seed=3))
        model.privileged_classifier = taught.privileged_classifier
    texts = ["My lamp.", "My lamp"]
    made = [{**encode_example(model.sequence_format, texts[0], "It broke.", "fix"), "class_labels": 0}]
    made.append({**encode_example(model.sequence_format, texts[1]), "class_labels": 1})
    end = len(encode_example(model.sequence_format, texts[0], "It broke.")["input_ids"])
    assert [row["rationale_end"] for row in made] == [end, 0]
    found = forward(model, made, alpha=0.0, beta=2.0, privileged_gamma=0.5, privileged_temperature=2.0)
    # The rationale's last state is that of an input that ends there.
    read = model.backbone.model(torch.tensor([made[0]["input_ids"][:end]])).last_hidden_state[:, -1]
    teacher = (model.privileged_classifier or model.classifier)(read)
    label_loss = -teacher.log_softmax(-1)[0, 0]
    soft, log_probs = (teacher / 2).softmax(-1)[0], (found.logits[0] / 2).log_softmax(-1)
    kl = 4 * (soft * (soft.log() - log_probs)).sum()
    torch.testing.assert_close(found.privileged_class_loss, label_loss, **EXACT)
    torch.testing.assert_close(found.privileged_kl, kl, **EXACT)
    torch.testing.assert_close(found.loss, 2 * found.class_loss + label_loss + 0.5 * kl, **EXACT)
    alone = forward(model, made[1:], privileged_gamma=0.5)
    assert (alone.privileged_class_loss, alone.privileged_kl) == (0, 0)


def test_privileged_classifier_leaves_the_inputs_as_it_is(task):
    plain, taught = (tiny_model(task, training=TrainingConfig(privileged_head=of)) for of in ("none", "separate"))
    for name, tensor in plain.classifier.state_dict().items():
        assert torch.equal(tensor, taught.classifier.state_dict()[name])
    assert not torch.equal(taught.privileged_classifier[0].weight, taught.classifier[0].weight)


def test_lm_loss_equals_the_backbones_loss(model):
    batch = DHRDCollator(model.tokenizer.pad_token_id)(rows(model, True))
    own = model.backbone(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["lm_labels"]
    ).loss
    torch.testing.assert_close(forward(model, rows(model, True)).lm_loss, own, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(), st.none() | st.text(), st.sampled_from([0, 1])), min_size=1, max_size=4))
def test_any_texts_give_a_finite_loss_and_gradient(task, drawn):
    limits = DataConfig(max_input_tokens=16, max_rationale_tokens=16)
    model = tiny_model(task, data=limits)
    fmt, made = model.sequence_format, []
    for text, rationale, label in drawn:
        verbalizer = None if rationale is None else task.verbalizers[label]
        made.append({**encode_example(fmt, f"Customer: {text}", rationale, verbalizer), "class_labels": label})
    loss = model(**DHRDCollator(model.tokenizer.pad_token_id)(made)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_pool_modes_equal_hand_computation():
    hidden = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    weighted = [(1 + 2 * 3) / 3, (4 + 2 * 2) / 3]
    expected = {"last": [3.0, 2.0], "mean": [2.0, 3.0], "weightedmean": weighted, "max": [3.0, 4.0]}
    for mode, value in expected.items():
        torch.testing.assert_close(pool(hidden, mask, mode), torch.tensor([value]))
    query = torch.tensor([2.0, 0.0])
    weights = torch.softmax(torch.tensor([2.0, 6.0]) / 2**0.5, 0)
    found = pool(hidden, mask, "attention", query)
    torch.testing.assert_close(found, (weights[:, None] * hidden[0, :2]).sum(0)[None])


@pytest.mark.parametrize("changes", [{}, {"finetune": "lora"}, {"pooling": "attention", "head": "linear"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_saved_model_keeps_logits_and_labels(task, tmp_path, changes, architecture):
    model = tiny_model(task, architecture, **changes)
    with torch.no_grad():  # Adapters start at zero: move them, so that losing one shows.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    before = forward(model, rows(model, True))
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    again = DHRDModel.from_pretrained(tmp_path)
    after = forward(again, rows(again, True))
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.lm_loss, after.lm_loss)
    assert again.label_names == list(task.label_names)
    assert again.predict(TEXTS).labels == model.predict(TEXTS).labels
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_head_and_adapters_stay_in_float32(task, tmp_path):
    backbone = load_backbone("tiny", device="cpu", dtype="bfloat16")
    config = ModelConfig(backbone="tiny", dtype="bfloat16", finetune="lora", pooling="attention")
    model = build_model(config, task, backbone=backbone).eval()
    model.save_pretrained(tmp_path)
    for each in (model, DHRDModel.from_pretrained(tmp_path)):
        for name, parameter in each.named_parameters():
            small = any(part in name for part in ("classifier", "pooling_query", "lora_"))
            assert parameter.dtype == (torch.float32 if small else torch.bfloat16), name
    again = DHRDModel.from_pretrained(tmp_path)
    assert torch.equal(forward(again, rows(again, True)).logits, forward(model, rows(model, True)).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_autocast_keeps_weights_losses_and_logits_in_float32(task, architecture, tmp_path, monkeypatch):
    exact = forward(tiny_model(task, architecture), rows(tiny_model(task), True))
    monkeypatch.setattr(backbones, "_bfloat16_speedup", lambda *_: 2.0)
    backbone = tiny_backbone(architecture)
    autocast_if_faster(backbone.model)
    model = build_model(ModelConfig(backbone="tiny"), task, backbone=backbone)
    output = model(**DHRDCollator(model.tokenizer.pad_token_id)(rows(model, True)))
    output.loss.backward()
    for name in ("logits", "class_loss", "lm_loss"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name].detach(), exact[name], rtol=0.02, atol=0.02)
    assert not torch.equal(output.logits, exact.logits)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generate_rationale(TEXTS[0], max_new_tokens=4)
    model.save_pretrained(tmp_path)
    assert compute_dtype(DHRDModel.from_pretrained(tmp_path).backbone) == "bfloat16 autocast"
    assert compute_dtype(DHRDModel.from_pretrained(tmp_path, dtype="float32").backbone) == "float32"


def test_lora_trains_seven_projections_and_classifier(task):
    model = tiny_model(task, finetune="lora", lora_r=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = {name.split(".lora_")[0].rsplit(".")[-1] for name in trained if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".lora_" in name or name.startswith("classifier.") for name in trained)
    assert model.backbone.model.layers[0].mlp.up_proj.lora_A["default"].weight.shape == (2, 16)


def test_freeze_layers_freezes_embedding_and_lowest_layers(model, task, request):
    frozen = tiny_model(task, request.node.callspec.params["model"], freeze_layers=2)
    layers = layers_of(frozen.backbone)
    for layer in layers[:2]:
        assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.requires_grad for p in layers[2].parameters())
    assert not frozen.get_input_embeddings().weight.requires_grad
    with pytest.raises(ConfigError, match=r"freeze_layers is 9; the backbone has 3|4 layers"):
        tiny_model(task, "gpt2", freeze_layers=9)


def test_limits_beyond_the_context_are_refused(task):
    with pytest.raises(ConfigError, match="need a context of 4128 tokens; the backbone's is 2048"):
        tiny_model(task, data=DataConfig(max_input_tokens=3840))


def test_seed_draws_the_head(task):
    models = [tiny_model(task, training=TrainingConfig(seed=seed)) for seed in (1, 1, 2)]
    one, same, other = (model.classifier[0].weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_rationale_continues_from_the_reason_marker(task):
    model = tiny_model(task)
    fmt = model.sequence_format
    prompt = fmt.encode("Customer: My lamp broke.\nWhat must happen next?") + fmt.encode("\nReasoning:")
    generated = model.backbone.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
    expected = expected.split("\nAnswer:")[0].strip()
    assert model.generate_rationale(TEXTS[0], max_new_tokens=20) == expected
    with pytest.raises(ConfigError, match="backbone's context is 2048"):
        model.generate_rationale(TEXTS[0], max_new_tokens=2048)
    assert "".join(model.generate_rationale(TEXTS[0], max_new_tokens=20, stream=True)) == expected


def test_rationale_ends_before_the_answer_marker(task, monkeypatch):
    model = tiny_model(task)
    ids = model.tokenizer(" money is owed\nAnswer: refund").input_ids
    monkeypatch.setattr(generation, "stream", lambda *_, **__: ((ids[:n], 0.0) for n in range(1, len(ids) + 1)))
    assert model.generate_rationale(TEXTS[0]) == "money is owed"
    pieces = list(model.generate_rationale(TEXTS[0], stream=True))
    assert "".join(pieces) == "money is owed"
    assert len(pieces) > 1
