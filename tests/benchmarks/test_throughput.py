"""Throughput: systems take turns after a warm-up, padding and tokens are counted, the pipeline agrees."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_backbone, tiny_model
from torch import nn

from benchmarks import harness as throughput
from benchmarks.harness import Measured, System, Tokens, measure, ratio
from dhrd_lib import modeling
from dhrd_lib.backbones import layers_of
from dhrd_lib.config import ConfigError, ModelConfig
from dhrd_lib.cot.decoding import Decoding, fine_tuned
from dhrd_lib.modeling import build_model
from dhrd_lib.sequences import DHRDCollator
from dhrd_lib.serving.classifier import CPU_PART_TOKENS
from dhrd_lib.tasks import Task

BENCH = ROOT / "benchmarks" / "throughput.py"
TEXTS = [f"{'word ' * (1 + 7 * i % 23)}number {i}" for i in range(12)]


class Clock:
    """A clock that only moves when a system works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def fake(name: str, clock: Clock, log: list, cost: dict[int, float] | None = None, **limits) -> System:
    """A system that takes `cost[setting]` seconds a text and writes down each call."""
    cost = cost or {1: 1.0}

    def answer(texts, setting):
        log.append((name, setting, tuple(texts)))
        clock.now += cost[setting] * len(texts)
        return list(texts)

    def encode(texts):
        clock.now += 0.25 * len(texts)

    def count(texts, setting, answers):
        return Tokens(2 * len(texts), 4 * len(texts), len(texts))

    settings = tuple(cost)
    return System(name, answer, encode, count, settings, "rows", torch.device("cpu"), weights_mib=3.0, **limits)


class TestMeasure:
    def test_every_system_is_warmed_up_at_every_batch_size_before_any_is_timed(self, clock):
        log = []
        measure([fake(name, clock, log, {1: 1.0, 4: 0.5}) for name in "ab"], TEXTS, rounds=2)
        warm = [("a", 1), ("a", 4), ("b", 1), ("b", 4)]
        assert [(name, setting) for name, setting, _ in log[:4]] == warm
        assert all(texts == tuple(TEXTS[:2]) for *_, texts in log[:4])

    def test_systems_take_turns_round_by_round_on_the_same_texts_and_the_order_moves_on(self, clock):
        log = []
        found = measure([fake(name, clock, log) for name in "abc"], TEXTS, rounds=3, latency_queries=0)
        rounds = log[3:]
        assert [name for name, *_ in rounds] == list("abcbcacab")
        for number in range(3):
            assert {texts for *_, texts in rounds[3 * number : 3 * number + 3]} == {tuple(TEXTS[number::3])}
        assert [one.queries for one in found] == [[4, 4, 4]] * 3
        assert sorted(text for texts in found[0].answers for text in texts) == sorted(TEXTS)

    def test_latencies_are_of_one_text_at_a_time_in_turns(self, clock):
        log = []
        found = measure([fake(name, clock, log) for name in "ab"], TEXTS, rounds=1, latency_queries=3)
        assert [(name, texts) for name, _, texts in log[-6:]] == [
            ("a", (TEXTS[0],)),
            ("b", (TEXTS[0],)),
            ("b", (TEXTS[1],)),
            ("a", (TEXTS[1],)),
            ("a", (TEXTS[2],)),
            ("b", (TEXTS[2],)),
        ]
        assert found[0].latency_seconds == [1.0] * 3

    def test_the_fastest_batch_size_is_chosen_and_used(self, clock):
        log = []
        (one,) = measure([fake("a", clock, log, {1: 1.0, 4: 0.25, 8: 0.5})], TEXTS, rounds=1, latency_queries=1)
        assert one.setting == 4
        assert log[-2][:2] == ("a", 4)
        assert log[-1][:2] == ("a", 1)  # Latency is at batch 1.
        assert one.row()["queries_per_second"] == pytest.approx(4.0)

    def test_a_slow_system_takes_part_as_often_as_it_may(self, clock):
        log = []
        slow = fake("slow", clock, log, {1: 10.0}, rounds=2, queries_per_round=1)
        found = measure([fake("a", clock, log), slow], TEXTS, rounds=4, latency_queries=2)
        assert found[1].queries == [1, 1]
        assert found[1].latency_seconds == [10.0, 10.0]  # From the rounds: it isn't asked again.
        assert [name for name, *_ in log].count("slow") == 1 + 2

    def test_a_slow_system_is_asked_for_as_many_latencies_as_it_says(self, clock):
        slow = fake("slow", clock, [], latency_queries=1)
        found = measure([fake("a", clock, []), slow], TEXTS, rounds=1, latency_queries=3)
        assert [len(one.latency_seconds) for one in found] == [3, 1]

    def test_a_probe_stands_in_for_a_long_answer_until_the_rounds(self, clock):
        log = []
        probe = fake("probe", clock, log, {1: 1.0, 2: 0.5}).answer
        system = replace(fake("a", clock, log, {1: 1.0, 2: 1.0}), probe=probe)
        (one,) = measure([system], TEXTS, rounds=1, latency_queries=0)
        assert one.setting == 2
        assert [name for name, *_ in log] == ["probe"] * 4 + ["a"]

    def test_the_row_has_the_figures_that_follow_from_the_clock(self, clock):
        row = measure([fake("a", clock, [], {1: 2.0})], TEXTS, rounds=3, latency_queries=4)[0].row()
        expected = {
            "queries_per_second": 0.5,
            "tokens_per_second": 1.5,  # 2 read and 1 written in 2 seconds
            "latency_p50_ms": 2000,
            "latency_p95_ms": 2000,
            "latency_queries": 4,
            "tokenisation_ms_per_query": 250,
            "compute_ms_per_query": 1750,
            "padding_share": 0.5,
            "read_tokens_per_query": 2,
            "written_tokens_per_query": 1,
            "queries": 12,
            "rounds": 3,
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["round_queries_per_second"] == [0.5] * 3
        assert row["peak_memory_mib"] >= row["weights_mib"] == 3
        json.dumps(row, allow_nan=False)

    def test_the_device_is_synchronised_before_and_after_each_timed_call(self, clock, monkeypatch):
        log = []
        monkeypatch.setattr(throughput, "synchronise", lambda device: log.append("synchronised"))
        measure([fake("a", clock, log)], TEXTS, rounds=1, latency_queries=1)
        timed = [place for place, entry in enumerate(log) if entry != "synchronised"][1:]  # The first is warm-up.
        assert timed
        assert all(log[place - 1] == log[place + 1] == "synchronised" for place in timed)

    def test_a_gpu_is_waited_for_and_a_cpu_is_not(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        throughput.synchronise(torch.device("cpu"))
        throughput.synchronise(torch.device("cuda:0"))
        assert waited == [torch.device("cuda:0")]

    def test_fewer_texts_than_rounds_are_refused(self):
        with pytest.raises(ConfigError, match="There are 2 texts for 5 rounds"):
            measure([], TEXTS[:2])

    def test_memory_is_what_a_system_holds_above_what_was_held(self):
        with throughput.memory_added(torch.device("cpu")) as added_mib:
            block = torch.ones(40 * throughput.MIB // 4)
            throughput.time.sleep(0.1)
        del block
        assert 35 < added_mib[0] < 80

    def test_a_ratio_is_over_the_rounds_that_both_took_part_in(self):
        fast, slow = Measured(None), Measured(None)
        fast.queries, fast.seconds = [4, 4, 4], [1.0, 2.0, 100.0]
        slow.queries, slow.seconds = [1, 2], [1.0, 2.0]
        assert ratio(fast, slow) == {"value": pytest.approx(8 / 3), "low": 2.0, "high": 4.0, "rounds": 2}


class TestSystems:
    @pytest.fixture(scope="class")
    def model(self):
        task = Task("mixed", "{text}", ("no", "yes", "maybe"), ("no", "yes", "maybe"))
        config = ModelConfig(backbone="tiny", device="cpu", head="linear")
        return build_model(config, task, backbone=tiny_backbone("llama"), max_input_tokens=48).eval()

    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_the_pipeline_gives_the_same_logits(self, model, batch_size):
        theirs = throughput.pipeline_system("pipeline", model)
        ours = throughput.pooled_system("DHRD", model)
        assert max(len(model.sequence_format.encode(text)) for text in TEXTS) > 48  # Some inputs are cut.
        logits = ours.answer(TEXTS, 100)
        assert logits.std(axis=0).max() > 1e-3  # The texts do give different logits.
        np.testing.assert_allclose(theirs.answer(TEXTS, batch_size), logits, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3", "gemma2"])
    def test_other_architectures_have_the_same_classifier(self, task, architecture):
        model = tiny_model(replace(task, template="{text}"), architecture, head="linear")
        theirs, ours = throughput.pipeline_system("pipeline", model), throughput.pooled_system("DHRD", model)
        np.testing.assert_allclose(theirs.answer(TEXTS, 4), ours.answer(TEXTS, 100), atol=1e-5)

    def test_a_model_that_transformers_has_no_classifier_for_is_refused(self, task):
        with pytest.raises(ConfigError, match="head 'mlp'; expected 'last' and 'linear'"):
            throughput.sequence_classifier(tiny_model(task))

    def test_the_classifier_shares_the_weights_and_the_model_keeps_its_own(self, model):
        classifier = throughput.sequence_classifier(model)
        assert classifier.model is model.backbone.model
        assert classifier.score is model.classifier

    def test_padding_is_counted_as_it_is_computed(self, model, monkeypatch):
        computed = []
        classify = model.classify
        monkeypatch.setattr(model, "classify", lambda ids, *a: computed.append(ids.numel()) or classify(ids, *a))
        ours = throughput.pooled_system("DHRD", model)
        tokens = ours.count(TEXTS, 100, ours.answer(TEXTS, 100))
        assert tokens.padded == sum(computed)
        assert tokens.read == sum(len(row["input_ids"]) for row in model.encode_texts(TEXTS))
        assert max(ours.settings) <= CPU_PART_TOKENS  # or `classify` would make smaller parts than are counted
        embedded = []
        theirs = throughput.pipeline_system("pipeline", model)
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _, ids, out: embedded.append(ids[0].numel()))
        tokens = theirs.count(TEXTS, 4, theirs.answer(TEXTS, 4))
        handle.remove()
        assert (tokens.padded, tokens.written) == (sum(embedded), 0)

    def test_cot_writes_exactly_its_budget_and_probes_with_less(self, model):
        cot = fine_tuned(model)
        system = throughput.cot_system("CoT", cot, Decoding(max_new_tokens=20, early_stop=False), (1, 3))
        answers = system.answer(TEXTS[:3], 3)
        assert system.count(TEXTS[:3], 3, answers).written == 60
        assert [len(row[0]) for row in system.probe(TEXTS[:3], 3)[0].samples] == [8] * 3
        lengths = [len(cot.encode_prompt(text)) for text in TEXTS[:3]]
        assert system.count(TEXTS[:3], 3, answers)[:2] == (sum(lengths), 3 * max(lengths))

    def test_the_lm_head_alone_writes_nothing(self, model):
        system = throughput.lm_head_system("LM head", fine_tuned(model))
        answers = system.answer(TEXTS[:3], 1)
        assert answers.predictions.shape == (3,)
        assert system.count(TEXTS[:3], 1, answers).written == 0

    def test_mixed_texts_are_seeded_of_equal_parts_and_say_what_is_missing(self, monkeypatch):
        monkeypatch.delenv("DHRD_DATA_DIR", raising=False)
        texts, source = throughput.mixed_texts(21)
        assert source == "21 texts of everyday_nli, support_triage (no BoolQ: DHRD_DATA_DIR isn't set)"
        assert sum(text.startswith("Premise:") for text in texts) == 11
        assert texts == throughput.mixed_texts(21)[0] != throughput.mixed_texts(21, seed=1)[0]

    def test_boolq_takes_part_where_its_folder_is_named(self, monkeypatch, tmp_path):
        row = {"passage": "Ice is frozen water.", "question": "is ice water"}
        (tmp_path / "BoolQ").mkdir()
        for split in ("train", "val"):
            lines = [json.dumps({**row, "idx": i, "label": i % 2 == 0, "passage": f"{i}"}) for i in range(40)]
            (tmp_path / "BoolQ" / f"{split}.jsonl").write_text("\n".join(lines))
        monkeypatch.setenv("DHRD_DATA_DIR", str(tmp_path))
        texts, source = throughput.mixed_texts(9)
        assert source == "9 texts of everyday_nli, support_triage, boolq"
        assert sum(text.startswith("Passage:") for text in texts) == 3


class TestParts:
    def test_classify_in_parts_gives_the_same_logits_and_drops_padding(self, task, monkeypatch):
        model = tiny_model(task)
        rows = [{**row, "class_labels": 0} for row in model.encode_texts(TEXTS)]
        batch = DHRDCollator(model.tokenizer.pad_token_id)(rows)
        ids, mask = batch["input_ids"], batch["input_mask"]
        states = model.trunk_states(ids, mask, 2)
        seen = []
        layers_of(model.backbone)[3].register_forward_hook(lambda _, states, out: seen.append(states[0].shape))
        with torch.no_grad():
            monkeypatch.setattr(modeling, "CPU_PART_TOKENS", 10**6)
            whole = model.classify(ids, mask)
            monkeypatch.setattr(modeling, "CPU_PART_TOKENS", 2 * ids.shape[1])
            for given in ((), (states, 2)):
                torch.testing.assert_close(model.classify(ids, mask, *given), whole, rtol=0, atol=1e-5)
        lengths = mask.sum(1).tolist()
        expected = [(2, max(lengths[i : i + 2]), 16) for i in range(0, len(rows), 2)]
        assert [tuple(shape) for shape in seen] == [(len(rows), ids.shape[1], 16), *expected * 2]


class TestPeak:
    def test_flops_are_those_of_every_matrix_product(self, task):
        model = tiny_model(task)
        counted = []
        hooks = [
            module.register_forward_hook(
                lambda module, args, _: counted.append(2 * args[0].numel() * module.out_features)
            )
            for module in layers_of(model.backbone).modules()
            if isinstance(module, nn.Linear)
        ]
        ids = torch.randint(5, 500, (2, 6))
        model.classify(ids, torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        # Scores and mixing, 2 operations each, over 21 visible pairs a row: 4 layers, 2 heads of 8.
        attention = 4 * 2 * (2 * 2 * 21) * 16
        norms = sum(p.numel() for n, p in layers_of(model.backbone).named_parameters() if "norm" in n)
        assert throughput.classify_flops(model, 2, 6) == sum(counted) + attention + 2 * norms * 12

    def test_the_share_is_of_the_best_product_measured_beside_it(self, task):
        share = throughput.peak_share(tiny_model(task), rows=2, tokens=8, square=64, repeats=1)
        assert share["peak_gflop_per_second"] == max(share["peak_by_shape"].values())
        assert share["share"] == pytest.approx(share["gflop_per_second"] / share["peak_gflop_per_second"])
        assert "64 x 64 x 64" in share["peak_by_shape"]

    def test_the_profile_names_operators_and_their_shares(self, task):
        profile = throughput.profile_classify(tiny_model(task), 2, 8)
        assert "aten::mm" in set(profile["operator"])
        assert profile["share"].sum() == pytest.approx(1)
        assert profile["ms"].is_monotonic_decreasing


def test_the_benchmark_writes_its_file_and_page_and_prints_the_ratios(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DHRD_DATA_DIR", raising=False)
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    limits = {"queries": 8, "rounds": 2, "latency-queries": 2, "max-new-tokens": 20, "square": 64}
    arguments = ["--backbone", "tiny", *(f"--{name}={value}" for name, value in limits.items())]
    bench.main([*arguments, "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "throughput.json").read_text())
    assert stored["largest_logit_difference"] < 1e-4
    assert {"DHRD / pooled baseline", "DHRD / CoT (paper's parameters)", "DHRD / CoT (budget 16)"} <= set(
        stored["ratios"]
    )
    assert stored["environment"]["packages"]["torch"]
    page = (tmp_path / "throughput.html").read_text()
    assert "pipeline (batches of 8)" in page
    assert '"type":"log"' in page
    printed = capsys.readouterr().out
    assert "DHRD / pooled baseline: " in printed
    assert "of the matmul peak" in printed
