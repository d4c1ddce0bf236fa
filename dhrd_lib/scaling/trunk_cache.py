"""Frozen-trunk cache: with the lowest k layers frozen, the states that leave them are the same in every step.

They are computed once a row, kept on disk, memory-mapped, and training runs the upper layers from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from dhrd_lib.backbones import decoder_of, layers_of, locked, writing_cache
from dhrd_lib.config import cache_dir
from dhrd_lib.inputs import length_sorted_batches
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import write_json
from dhrd_lib.sequences import DHRDCollator


class TrunkStates:
    """The cached states of a list of rows: item i is a float32 array `(S_i, H)`, read from disk."""

    def __init__(self, folder: Path, places: Sequence[tuple[str, int, int]]) -> None:
        files = {file for file, _, _ in places}
        self._states = {file: np.load(folder / f"{file}.npy", mmap_mode="r") for file in files}
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> np.ndarray:
        file, start, length = self._places[row]
        return self._states[file][start : start + length]


def cached_trunk_states(
    model: DHRDModel, rows: Sequence[Mapping[str, Any]], trunk_layers: int, max_batch_tokens: int = 512
) -> TrunkStates:
    """The states that enter layer `trunk_layers` for each row's `input_ids`, computed once and kept.

    States are kept by a hash of the frozen weights and the number of layers, and within it by the row's
    token ids, so a changed backbone, template or row never meets old states. Attention is causal: a row
    also serves for its input alone. Layers are run in evaluation mode: dropout in them is off.
    """
    folder = cache_dir() / "trunk" / _key(model, trunk_layers)
    names = [_hash(row["input_ids"]) for row in rows]
    with writing_cache(folder), locked(folder / "lock"):
        index = _read_index(folder)
        missing = {name: row for name, row in zip(names, rows, strict=True) if name not in index}
        if missing:
            _compute(model, list(missing.values()), trunk_layers, max_batch_tokens, folder)
            index = _read_index(folder)
    return TrunkStates(folder, [index[name] for name in names])


def _key(model: DHRDModel, trunk_layers: int) -> str:
    digest = hashlib.sha256()
    embeddings = [m for m in decoder_of(model.backbone).modules() if isinstance(m, nn.Embedding)]
    for module in [*embeddings, *layers_of(model.backbone)[:trunk_layers]]:
        for parameter in module.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    shape = model.config.backbone_config.to_dict()
    shape.pop("_name_or_path", None)  # The same backbone may lie in another folder.
    settings = [shape, trunk_layers]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).data).hexdigest()[:32]


def _read_index(folder: Path) -> dict[str, tuple[str, int, int]]:
    """For each hash of token ids: the file that has its states, and where; a file counts with its index.

    What a full disk or a broken copy cut short doesn't count, and its rows are computed again.
    """
    index = {}
    for path in sorted(folder.glob("*.json")):
        try:
            np.load(path.with_suffix(".npy"), mmap_mode="r")  # It compares the file's size with its header.
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            path.unlink()  # `_compute` removes the states, which have no index now: the lock is ours.
            continue
        for name, (start, length) in found.items():
            index[name] = (path.stem, start, length)
    return index


def _compute(
    model: DHRDModel,
    rows: Sequence[Mapping[str, Any]],
    trunk_layers: int,
    max_batch_tokens: int,
    folder: Path,
) -> None:
    """Write one more file of states, and then its index, without which it isn't read."""
    for path in folder.glob("*.npy"):
        if not path.with_suffix(".json").is_file():
            path.unlink()  # Of a process that was killed: the lock is ours.
    lengths = [len(row["input_ids"]) for row in rows]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    path = folder / f"{_hash([token for row in rows for token in row['input_ids']])}.npy"
    hidden_size = model.config.backbone_config.get_text_config().hidden_size
    states = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(sum(lengths), hidden_size))
    _take_room(path)
    collate = DHRDCollator(model.tokenizer.pad_token_id)
    was_training = model.training
    model.eval()
    with tqdm(total=len(rows), desc=f"states of {trunk_layers} frozen layers", unit="row") as bar:
        for places in length_sorted_batches(lengths, max_batch_tokens):
            batch = collate([rows[place] for place in places])
            found = model.trunk_states(
                batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device), trunk_layers
            )
            for place, row in zip(places, found.float().cpu().numpy(), strict=True):
                states[starts[place] : starts[place] + lengths[place]] = row[: lengths[place]]
            bar.update(len(places))
    states.flush()
    model.train(was_training)
    index = {}
    for row, start in zip(rows, starts, strict=True):
        ids = row["input_ids"]
        index |= {_hash(part): (start, len(part)) for part in (ids[: row["input_length"]], ids)}
    write_json(path.with_suffix(".json"), index)


def _take_room(path: Path) -> None:
    """Take the disk for all of a file: where it is full, a write through the map would end the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise
