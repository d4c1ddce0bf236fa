"""Frozen-trunk cache: the states that leave frozen layers are computed once a row, and mapped from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dhrd_lib.backbones import autocast, compute_dtype, layers_of, lowest_layers
from dhrd_lib.config import cache_dir
from dhrd_lib.data.embedded import new_folder
from dhrd_lib.inputs import MAX_TOKENS_PER_CPU_BATCH, length_sorted_batches
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.progress import Progress
from dhrd_lib.sequences import DHRDCollator

Rows = Sequence[Mapping[str, Any]]


class _SkippedLayer(nn.Module):
    """Takes the place of a decoder layer, and returns `output`, or what it reads."""

    def __init__(self, layer: nn.Module, output: torch.Tensor | None) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.output = output

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.output is None else self.output


@contextmanager
def skip_layers(model: DHRDModel, skipped: range, output: torch.Tensor | None = None) -> Iterator[None]:
    """Skip decoder layers while this is open: they return `output (B, S, H)`, or what they read.

    They are replaced, not left out, because what a decoder does around its layers differs between architectures.
    """
    layers = layers_of(model.backbone)
    originals = list(layers)
    try:
        for i in skipped:
            layers[i] = _SkippedLayer(originals[i], output)
        yield
    finally:
        for i in skipped:
            layers[i] = originals[i]


@torch.no_grad()
def trunk_states(model: DHRDModel, batch: Mapping[str, torch.Tensor], n_layers: int) -> torch.Tensor:
    """Return the states `(B, S, H)` that leave the lowest `n_layers` layers; the others aren't run."""
    layers, recorded = layers_of(model.backbone), []
    hook = layers[n_layers - 1].register_forward_hook(lambda layer, inputs, output: recorded.append(output))
    with autocast(model.backbone), skip_layers(model, range(n_layers, len(layers))):
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        model.backbone.get_decoder()(ids, attention_mask=mask, use_cache=False)
    hook.remove()
    return recorded[0]


def cached_trunk_states(model: DHRDModel, splits: Mapping[str, Rows], n_layers: int) -> dict[str, list[np.ndarray]]:
    """Return, for each split's rows, the float32 states `(S_i, H)` that leave the lowest `n_layers` layers.

    They are computed once, in evaluation mode, and kept by a hash of the frozen weights, the dtype that computes,
    and the row's `input_ids`.
    Attention is causal: a row also serves for its input alone.
    """
    folder, cached = cache_dir() / "trunk" / _hash_weights(model, n_layers), {}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        for split, rows in splits.items():
            names, index = [_hash_ids(row["input_ids"]) for row in rows], _read_index(folder)
            missing = {name: row for name, row in zip(names, rows, strict=True) if name not in index}
            if missing:
                title = f"{split}: computing the states of {n_layers} frozen layers"
                _compute(model, list(missing.values()), n_layers, folder, Progress(title, "row"))
                index = _read_index(folder)
            files = {path: np.load(path, mmap_mode="r") for path, _, _ in index.values()}
            places = (index[name] for name in names)
            cached[split] = [files[path][start : start + length] for path, start, length in places]
    return cached


def _read_index(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Map the hash of a row's ids to the file that has its states, their start in it and their number."""
    index = {}
    for path in sorted(folder.glob("*/index.json")):
        for name, (start, length) in json.loads(path.read_text(encoding="utf-8")).items():
            index[name] = (path.with_name("states.npy"), start, length)
    return index


def _hash_ids(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).data).hexdigest()[:32]


def _hash_weights(model: DHRDModel, n_layers: int) -> str:
    digest = hashlib.sha256()
    for module in lowest_layers(model.backbone, n_layers):
        for parameter in module.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    shape = {**model.config.backbone_config.to_dict(), "dtype": compute_dtype(model.backbone)}
    shape.pop("_name_or_path", None)  # The same backbone may lie in another folder.
    digest.update(json.dumps([shape, n_layers], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _compute(model: DHRDModel, rows: Rows, n_layers: int, folder: Path, progress: Progress) -> None:
    """Write the states of rows and their index to a new folder, under another name until both are whole."""
    lengths = [len(row["input_ids"]) for row in rows]
    shape = (sum(lengths), model.config.backbone_config.get_text_config().hidden_size)
    collate = DHRDCollator(model.tokenizer.pad_token_id)
    model.eval()
    target = folder / _hash_ids([token for row in rows for token in row["input_ids"]])
    starts, start, index = {}, 0, {}
    # Written, and not mapped: on a full disk a write raises, where a mapped page would end the process.
    with new_folder(target) as part, (part / "states.npy").open("wb") as file, closing(progress):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for places in length_sorted_batches(lengths, MAX_TOKENS_PER_CPU_BATCH):
            batch = collate([rows[place] for place in places])
            states = trunk_states(model, batch, n_layers).float().cpu().numpy()  # (B, S, H)
            for place, of in zip(places, states, strict=True):
                file.write(of[: lengths[place]].tobytes())
                starts[place], start = start, start + lengths[place]
            progress.update(len(starts), len(rows))
        for place, row in enumerate(rows):
            for ids in (row["input_ids"][: row["input_length"]], row["input_ids"]):
                index[_hash_ids(ids)] = (starts[place], len(ids))
        (part / "index.json").write_text(json.dumps(index))


def logits_from_states(model: DHRDModel, rows: Rows, states: Sequence[np.ndarray], n_layers: int) -> np.ndarray:
    """Return class logits `(N, K)`, float32, of encoded inputs whose trunk states are known, in their order."""
    logits = np.zeros((len(rows), model.config.num_labels), dtype=np.float32)
    for places in length_sorted_batches([len(row["input_ids"]) for row in rows], MAX_TOKENS_PER_CPU_BATCH):
        batch = pad_sequence([torch.tensor(states[i]) for i in places], batch_first=True)
        with skip_layers(model, range(n_layers), batch.to(model.device)):
            logits[places] = model.logits([rows[i] for i in places], MAX_TOKENS_PER_CPU_BATCH)
    return logits
