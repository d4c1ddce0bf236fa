"""Export: backbone and classifier as a folder for ONNX Runtime, OpenVINO, or transformers' own classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import onnx_ir
import torch
from filelock import FileLock
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeQuantizer, OpenVINOConfig, OpenVINOExporter

from dhrd_lib.config import ConfigError, read_json
from dhrd_lib.data.embedded import new_folder
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import write_json
from dhrd_lib.serving.classifier import EXPORT_KEY, ExportConfig, Format, classifier_folder, load_classifier


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
        problem = f"pooling is {pooling!r} and head {head!r}"
        raise ConfigError(f"{problem}; expected 'last' and 'linear', all that transformers' classifier has.")
    shared = ("pooling", "head", "template", "max_input_tokens", "truncation_side")
    config = ExportConfig(
        format=format,
        precision="int8" if int8 else "float32",
        backbone=model.config.backbone_name,
        label_names=model.label_names,
        start_ids=model.sequence_format.start_ids,
        pad_token_id=model.tokenizer.pad_token_id,
        **{name: getattr(model.config, name) for name in shared},
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
    limits = {"truncation_side": model.config.truncation_side, "model_max_length": model.config.max_input_tokens}
    options = {"trust_remote_code": False, "split_special_tokens": True, **limits}
    model.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return model


class _Int8Quantizer(OnnxRuntimeQuantizer):
    """8-bit products in the decoder; activations, which have outliers, get a scale for each 128 inputs of a row."""

    def quantize(self, model: onnx_ir.Model, *_: Any) -> onnx_ir.Model:
        with mock.patch("logging.basicConfig"):  # which the module calls at its import
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        # Accuracy level 4: the products themselves are of 8-bit numbers.
        settings = {"bits": 8, "block_size": 128, "is_symmetric": True, "accuracy_level": 4}
        quantizer = MatMulNBitsQuantizer(onnx_ir.to_proto(model), **settings)
        quantizer.process()
        return onnx_ir.from_proto(quantizer.model.model)


def _write_graph(model: DHRDModel, format: Format, int8: bool, folder: Path) -> None:
    if format == "onnx":
        exporter, path = OnnxExporter(), folder / "model.onnx"
        config = OnnxConfig(ort_fusions="cpu", quantizer=_Int8Quantizer() if int8 else None)
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
    program, _ = exporter.export_program(model, inputs, config)
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
