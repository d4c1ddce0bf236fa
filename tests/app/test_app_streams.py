"""Streams of tokens: the same as without a stream, told as they come, ended when nobody reads on."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from dhrd_lib.config import ConfigError
from dhrd_lib.cot import decoding as cots
from dhrd_lib.cot.decoding import Decoding
from dhrd_lib.modeling import stream_tokens

TEXT = "My lamp broke."
DECODING = Decoding(max_new_tokens=12, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def cot(task):
    return cots.fine_tuned(tiny_model(task))


def test_the_last_of_a_stream_is_what_write_gives(cot):
    steps = list(cot.stream(TEXT, DECODING))
    written = cot.write([TEXT], DECODING)
    assert steps[-1].samples == written.samples
    assert [len(step.samples[0][0]) for step in steps] == list(range(1, len(written.samples[0][0]) + 1))


def test_a_stream_leaves_the_random_generator_as_it_was(cot):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(cot.stream(TEXT, DECODING))
    assert torch.equal(torch.rand(1), expected)


def test_a_closed_stream_stops_generating(cot):
    steps = cot.stream(TEXT, replace(DECODING, max_new_tokens=400, early_stop=False))
    next(steps)
    before = threading.active_count()
    steps.close()
    assert threading.active_count() == before - 1


def test_several_samples_are_no_stream(cot):
    with pytest.raises(ConfigError, match="n_samples is 2"):
        next(cot.stream(TEXT, replace(DECODING, n_samples=2)))


def test_what_generation_raises_reaches_the_reader():
    def generate(streamer):
        streamer.put(torch.tensor([[1, 2]]))
        streamer.put(torch.tensor([7]))
        raise RuntimeError("out of memory")

    tokens = stream_tokens(generate)
    assert next(tokens)[0] == 7
    with pytest.raises(RuntimeError, match="out of memory"):
        next(tokens)
