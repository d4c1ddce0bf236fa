"""The harness: systems take turns after a warm-up, tokens and padding are counted, the pipeline agrees."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_backbone, tiny_model

from benchmarks import harness
from benchmarks.harness import Measurement, System, Tokens, measure, ratio
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig
from dhrd_lib.cot import CoT, Decoding
from dhrd_lib.inputs import MAX_TOKENS_PER_CPU_BATCH
from dhrd_lib.modeling import build_model
from dhrd_lib.tasks import Task

TEXTS = [f"{'word ' * (1 + 7 * i % 23)}number {i}" for i in range(12)]


class Fakes:
    """A clock that advances only when a fake system works, and the log of their calls."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def system(self, name: str, cost: dict[int, float] | None = None, **limits) -> System:
        """Return a system that takes `cost[setting]` seconds per text."""
        cost = cost or {1: 1.0}

        def answer(texts, setting):
            self.log.append((name, setting, tuple(texts)))
            self.now += cost[setting] * len(texts)
            return list(texts)

        def encode(texts):
            self.now += 0.25 * len(texts)

        def count(texts, setting, answers):
            return Tokens(2 * len(texts), 4 * len(texts), len(texts))

        return System(name, answer, encode, count, tuple(cost), "rows", torch.device("cpu"), 3.0, **limits)


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: fakes.now)
    return fakes


class TestMeasure:
    def test_warm_up_covers_every_batch_size(self, fakes):
        measure([fakes.system(name, {1: 1.0, 4: 0.5}) for name in "ab"], TEXTS, rounds=2)
        assert [(name, setting) for name, setting, _ in fakes.log[:4]] == [("a", 1), ("a", 4), ("b", 1), ("b", 4)]
        assert all(texts == tuple(TEXTS[:2]) for *_, texts in fakes.log[:4])

    def test_systems_take_turns_on_the_same_texts(self, fakes):
        results = measure([fakes.system(name) for name in "abc"], TEXTS, rounds=3, latency_queries=0)
        rounds = fakes.log[3:]
        assert [name for name, *_ in rounds] == list("abcbcacab")
        for number in range(3):
            assert {texts for *_, texts in rounds[3 * number : 3 * number + 3]} == {tuple(TEXTS[number::3])}
        assert [result.queries for result in results] == [[4, 4, 4]] * 3
        assert sorted(text for texts in results[0].answers for text in texts) == sorted(TEXTS)

    def test_latencies_are_of_single_texts_in_turns(self, fakes):
        results = measure([fakes.system(name) for name in "ab"], TEXTS, rounds=1, latency_queries=3)
        expected = [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
        assert [(name, texts) for name, _, texts in fakes.log[-6:]] == [(n, (TEXTS[i],)) for n, i in expected]
        assert results[0].latency_seconds == [1.0] * 3

    def test_fastest_batch_size_is_used(self, fakes):
        (result,) = measure([fakes.system("a", {1: 1.0, 4: 0.25, 8: 0.5})], TEXTS, rounds=1, latency_queries=1)
        assert result.setting == 4
        assert [setting for _, setting, _ in fakes.log[-2:]] == [4, 1]  # latency has batches of 1
        assert result.row()["queries_per_second"] == pytest.approx(4.0)

    def test_slow_systems_take_part_as_limited(self, fakes):
        slow = fakes.system("slow", {1: 10.0}, rounds=2, queries_per_round=1)
        batched = fakes.system("batched", rounds=1, latency_queries=1)
        results = measure([fakes.system("a"), slow, batched], TEXTS, rounds=4, latency_queries=2)
        assert [result.queries for result in results] == [[3] * 4, [1, 1], [3]]
        assert results[1].latency_seconds == [10.0, 10.0]  # from the rounds
        assert [name for name, *_ in fakes.log].count("slow") == 1 + 2
        assert len(results[2].latency_seconds) == 1

    def test_probe_replaces_answer_until_the_rounds(self, fakes):
        probe = fakes.system("probe", {1: 1.0, 2: 0.5}).answer
        system = replace(fakes.system("a", {1: 1.0, 2: 1.0}), probe=probe)
        (result,) = measure([system], TEXTS, rounds=1, latency_queries=0)
        assert result.setting == 2
        assert [name for name, *_ in fakes.log] == ["probe"] * 4 + ["a"]

    def test_row_follows_from_the_clock(self, fakes):
        row = measure([fakes.system("a", {1: 2.0})], TEXTS, rounds=3, latency_queries=4)[0].row()
        expected = {
            "queries_per_second": 0.5,
            "tokens_per_second": 1.5,  # 2 read and 1 generated in 2 seconds
            "latency_p50_ms": 2000,
            "latency_p95_ms": 2000,
            "latency_queries": 4,
            "tokenization_ms_per_query": 250,
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

    def test_device_is_synchronized_around_timed_calls(self, fakes, monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fakes.log.append(device))
        harness.timed(torch.device("cpu"), fakes.log.append, "call")
        harness.timed(torch.device("cuda:0"), fakes.log.append, "call")
        assert fakes.log == ["call", torch.device("cuda:0"), "call", torch.device("cuda:0")]

    def test_fewer_texts_than_rounds_are_refused(self):
        with pytest.raises(ConfigError, match="There are 2 texts for 5 rounds"):
            measure([], TEXTS[:2])

    def test_memory_is_above_what_was_held(self):
        with harness.memory_added(torch.device("cpu")) as added_mib:
            block = torch.ones(40 * harness.MIB // 4)
            harness.time.sleep(0.1)
        del block
        assert 35 < added_mib[0] < 80

    def test_ratio_covers_shared_rounds(self):
        fast = Measurement(None, queries=[4, 4, 4], seconds=[1.0, 2.0, 100.0])
        slow = Measurement(None, queries=[1, 2], seconds=[1.0, 2.0])
        assert ratio(fast, slow) == {"value": pytest.approx(8 / 3), "low": 2.0, "high": 4.0, "rounds": 2}


class TestSystems:
    @pytest.fixture(scope="class")
    def model(self):
        task = Task("mixed", "{text}", ("no", "yes", "maybe"), ("no", "yes", "maybe"))
        config = ModelConfig(backbone="tiny", device="cpu", head="linear")
        return build_model(config, task, DataConfig(max_input_tokens=48), backbone=tiny_backbone("llama")).eval()

    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_pipeline_has_the_same_logits(self, model, batch_size):
        theirs, ours = harness.pipeline_system("pipeline", model), harness.pooled_system("DHRD", model)
        assert max(len(model.sequence_format.encode(text)) for text in TEXTS) > 48  # some inputs are cut
        logits = ours.answer(TEXTS, 100)
        assert logits.std(axis=0).max() > 1e-3  # the texts do have different logits
        np.testing.assert_allclose(theirs.answer(TEXTS, batch_size), logits, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3", "gemma2"])
    def test_other_architectures_agree(self, task, architecture):
        model = tiny_model(replace(task, template="{text}"), architecture, head="linear")
        theirs, ours = harness.pipeline_system("pipeline", model), harness.pooled_system("DHRD", model)
        np.testing.assert_allclose(theirs.answer(TEXTS, 4), ours.answer(TEXTS, 100), atol=1e-5)

    def test_padding_is_counted_as_computed(self, model):
        embedded = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda _, ids, out: embedded.append(ids[0].numel())
        )
        ours, theirs = harness.pooled_system("DHRD", model), harness.pipeline_system("pipeline", model)
        for system, setting in ((ours, 100), (theirs, 4)):
            embedded.clear()
            answers = system.answer(TEXTS, setting)
            tokens = system.count(TEXTS, setting, answers)
            assert (tokens.padded, tokens.written) == (sum(embedded), 0)
            assert tokens.read == sum(len(row["input_ids"]) for row in model.encode(TEXTS))
        handle.remove()
        assert max(ours.settings) <= MAX_TOKENS_PER_CPU_BATCH  # larger batches would be split

    def test_cot_generates_exactly_its_budget(self, model):
        cot = CoT.from_model(model)
        system = harness.cot_system("CoT", cot, Decoding(max_new_tokens=20, early_stop=False), (1, 3))
        tokens = system.count(TEXTS[:3], 3, system.answer(TEXTS[:3], 3))
        lengths = [len(cot.encode_prompt(text)) for text in TEXTS[:3]]
        assert tokens == (sum(lengths), 3 * max(lengths), 60)
        assert [len(row[0]) for row in system.probe(TEXTS[:3], 3)[0].samples] == [8] * 3

    def test_mixed_texts_are_seeded_and_balanced(self, monkeypatch):
        monkeypatch.delenv("DHRD_DATA_DIR", raising=False)
        texts, source = harness.mixed_texts(21)
        assert source == "21 texts of everyday_nli, support_triage (no BoolQ: DHRD_DATA_DIR isn't set)"
        assert sum(text.startswith("Premise:") for text in texts) == 11
        assert texts == harness.mixed_texts(21)[0] != harness.mixed_texts(21, seed=1)[0]

    def test_boolq_joins_where_its_folder_is_set(self, monkeypatch, tmp_path):
        row = {"passage": "Ice is frozen water.", "question": "is ice water"}
        (tmp_path / "BoolQ").mkdir()
        for split in ("train", "val"):
            lines = [json.dumps({**row, "idx": i, "label": i % 2 == 0, "passage": f"{i}"}) for i in range(40)]
            (tmp_path / "BoolQ" / f"{split}.jsonl").write_text("\n".join(lines))
        monkeypatch.setenv("DHRD_DATA_DIR", str(tmp_path))
        texts, source = harness.mixed_texts(9)
        assert source == "9 texts of everyday_nli, support_triage, boolq"
        assert sum(text.startswith("Passage:") for text in texts) == 3
