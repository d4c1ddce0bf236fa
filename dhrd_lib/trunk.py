"""Frozen-trunk cache: with the lowest k layers frozen, the states that leave them are the same in every step.

They are computed once a row, kept on disk, memory-mapped, and training runs the upper layers from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm

from dhrd_lib.backbones import cache_dir, decoder_of, layers_of
from dhrd_lib.modeling import DHRDModel, length_sorted_batches
from dhrd_lib.sequences import DHRDCollator


class TrunkStates:
    """The cached states of a list of rows: item i is a float32 array `(S_i, H)`, read from disk."""

    def __init__(self, states: np.ndarray, lengths: Sequence[int]) -> None:
        self._states = states
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> np.ndarray:
        start = self._ends[place - 1] if place else 0
        return self._states[start : self._ends[place]]


def cached_trunk_states(
    model: DHRDModel, rows: Sequence[dict[str, Any]], trunk_layers: int, max_batch_tokens: int = 4096
) -> TrunkStates:
    """The states that enter layer `trunk_layers` for each row's `input_ids`, computed once and kept.

    The key is a hash of the frozen weights, the number of layers and every token id, so a changed backbone,
    template or row never meets old states. Layers are run in evaluation mode: dropout in them is off.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    path = cache_dir() / "trunk" / f"{_key(model, rows, trunk_layers)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            _compute(model, rows, lengths, trunk_layers, max_batch_tokens, path)
    return TrunkStates(np.load(path, mmap_mode="r"), lengths)


def _key(model: DHRDModel, rows: Sequence[dict[str, Any]], trunk_layers: int) -> str:
    digest = hashlib.sha256()
    embeddings = [m for m in decoder_of(model.backbone).modules() if isinstance(m, nn.Embedding)]
    for module in [*embeddings, *layers_of(model.backbone)[:trunk_layers]]:
        for parameter in module.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    settings = [model.config.backbone_config.to_dict(), trunk_layers]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(np.asarray([len(row["input_ids"]), *row["input_ids"]], dtype=np.int64).data)
    return digest.hexdigest()[:32]


def _compute(
    model: DHRDModel,
    rows: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    trunk_layers: int,
    max_batch_tokens: int,
    path: Path,
) -> None:
    was_training = model.training
    model.eval()
    scratch = path.with_suffix(f".part-{os.getpid()}")
    hidden_size = model.config.backbone_config.get_text_config().hidden_size
    states = np.lib.format.open_memmap(
        scratch, mode="w+", dtype=np.float32, shape=(sum(lengths), hidden_size)
    )
    starts = np.cumsum([0, *lengths[:-1]])
    collate = DHRDCollator(model.tokenizer.pad_token_id)
    try:
        with tqdm(total=len(rows), desc=f"states of {trunk_layers} frozen layers", unit="row") as bar:
            for places in length_sorted_batches(lengths, max_batch_tokens):
                batch = collate([rows[place] for place in places])
                found = model.trunk_states(
                    batch["input_ids"].to(model.device),
                    batch["attention_mask"].to(model.device),
                    trunk_layers,
                )
                for place, row in zip(places, found.float().cpu().numpy(), strict=True):
                    states[starts[place] : starts[place] + lengths[place]] = row[: lengths[place]]
                bar.update(len(places))
        states.flush()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
        model.train(was_training)
