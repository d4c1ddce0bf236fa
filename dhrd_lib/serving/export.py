"""Export: backbone and classifier as a folder for ONNX Runtime, OpenVINO, or transformers' own classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import torch
from filelock import FileLock
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter

from dhrd_lib.config import ConfigError, read_json
from dhrd_lib.data.embedded import new_folder
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import write_json
from dhrd_lib.serving.classifier import EXPORT_KEY, ExportConfig, Format, classifier_folder, load_classifier
from dhrd_lib.serving.quantization import Int8Quantizer, smooth


def export(source: str | Path, format: Format, *, int8: bool = False, out: str | Path | None = None) -> Path:
    """Write the classifier of a finished run or a saved `DHRDModel` to a new, self-contained folder; return it.

    "onnx" and "openvino" are graphs, "hf" a folder of transformers' `AutoModelForSequenceClassification` (`linear`
    heads on `last` pooling). `int8`: 8-bit weights, and activations quantized on the fly; faster with VNNI, perhaps
    less accurate. `out` is by default a folder in `source` named after format and precision. Raises `ConfigError`.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format is {format!r}; expected one of {', '.join(map(repr, get_args(Format)))}.")
    if int8 and format == "hf":
        raise ConfigError("int8 is set with format 'hf', which has float32 weights; expected 'onnx' or 'openvino'.")
    folder = classifier_folder(source)
    if EXPORT_KEY in read_json(folder / "config.json"):
        raise ConfigError(f"{source} is an export already; expected a finished run or a saved DHRDModel.")
    out = Path(out or Path(source) / f"export-{format}{'-int8' if int8 else ''}")
    if out.exists():
        raise ConfigError(f"{out} exists already; expected a folder that doesn't.")
    model = _load(folder)
    pooling, head = model.config.pooling, model.config.head
    if format == "hf" and (pooling, head) != ("last", "linear"):
        found = f"pooling is {pooling!r} and head {head!r}"
        raise ConfigError(f"{found}; expected 'last' and 'linear', all that transformers' classifier has.")
    config = ExportConfig(
        format=format,
        precision="int8" if int8 else "float32",
        backbone=model.config.backbone_name,
        pooling=pooling,
        head=head,
        template=model.config.template,
        label_names=model.label_names,
        max_input_tokens=model.config.max_input_tokens,
        truncation_side=model.config.truncation_side,
        start_ids=model.sequence_format.start_ids,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"), new_folder(out) as scratch:
        path, written = scratch / "config.json", {}
        if format == "hf":
            sequence_classifier(model).save_pretrained(scratch)
            written = read_json(path)
        else:
            _write_graph(model, format, int8, scratch)
        model.tokenizer.save_pretrained(scratch)
        write_json(path, {**written, EXPORT_KEY: config.to_dict()})
    if format == "openvino":
        load_classifier(out)  # Compiling takes seconds: its cache serves the first start on this machine.
    return out


def _load(folder: Path) -> DHRDModel:
    """Return the trained model on the CPU, in float32, its adapters merged."""
    model = DHRDModel.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.backbone.set_submodule(name, module.get_base_layer())
    # Set here, these are saved with the tokenizer: transformers' pipeline then encodes inputs as in training.
    model.tokenizer = AutoTokenizer.from_pretrained(
        folder,
        trust_remote_code=False,
        truncation_side=model.config.truncation_side,
        model_max_length=model.config.max_input_tokens,
        split_special_tokens=True,
    )
    return model


class _Classify(nn.Module):
    """The model under the two inputs of an exported graph."""

    def __init__(self, model: DHRDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(input_ids, attention_mask, input_mask=attention_mask).logits}


def _write_graph(model: DHRDModel, format: Format, int8: bool, folder: Path) -> None:
    if format == "onnx":
        if int8:
            smooth(model)
        exporter, path = OnnxExporter(), folder / "model.onnx"
        config = OnnxConfig(ort_fusions="cpu", quantizer=Int8Quantizer() if int8 else None)
    else:
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

        exporter, path = OpenVINOExporter(), folder / "openvino_model.xml"
        config = OpenVINOConfig(quantizer=NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if int8 else None)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # batch and length
    config.dynamic_shapes = {"input_ids": free, "attention_mask": free}
    # Two rows of different length: a trace of a batch of one, or without padding, may take them for constants.
    # Ids and mask are two tensors: one alone would be traced as one input.
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    inputs = {"input_ids": torch.full_like(mask, 3), "attention_mask": mask}
    program, _ = exporter.export_program(_Classify(model), inputs, config)
    exporter.save_program(program, path)


def sequence_classifier(model: DHRDModel) -> PreTrainedModel:
    """Return transformers' `AutoModelForSequenceClassification` on the weights of a model with `last` pooling."""
    config = copy.deepcopy(model.backbone.config)
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    config.pad_token_id = model.tokenizer.pad_token_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.backbone.base_model)
    classifier.score = model.classifier
    return classifier.eval()
