"""Export: a trained classifier as a folder for ONNX Runtime, OpenVINO, or transformers' own classes.

Backbone and classifier only, without the LM head; adapters are merged, batch and length stay free. The folder holds
all that `load_classifier` needs: the graph or the weights, the tokenizer, and a config.json with template, labels,
limits, format and precision. Tracing, the repair of what tracing breaks, and quantisation are
`transformers.exporters`'.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.exporters import (
    HfExporter,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
    OpenVINOConfig,
    OpenVINOExporter,
)

from dhrd_lib.backbones import layers_of, load_tokenizer, locked, new_folder, writing
from dhrd_lib.config import ConfigError
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import write_json
from dhrd_lib.sequences import encode_examples
from dhrd_lib.serving.classifier import (
    EXPORT_KEY,
    RUNNERS,
    ExportConfig,
    load_classifier,
    model_folder,
    read_config,
)
from dhrd_lib.tasks import load_task

# Inputs that share a scale in an int8 ONNX export; with 64 it is slower, and hardly nearer to float32.
_BLOCK = 128
# ONNX Runtime's accuracy level at which the products themselves are of 8-bit numbers.
_INT8_PRODUCTS = 4
# Decoders whose norms only multiply and stand right before the products that read them.
_SMOOTHED = ("llama", "mistral", "qwen2", "qwen3")
# Packaged tasks, and rows of each, on which their activations are looked at.
_TASKS_SEEN, _ROWS_SEEN = ("support_triage", "everyday_nli"), 24
_TINY = 1e-5  # What never acts counts as this large.


def export(source: str | Path, format: str, *, int8: bool = False, out: str | Path | None = None) -> Path:
    """Write a classifier to a folder that is enough by itself, and give that folder.

    Args:
        source: a finished run's folder, or one that `DHRDModel.save_pretrained` wrote.
        format: "onnx" or "openvino" (graphs for these engines), or "hf" (a plain folder of transformers'
            `AutoModelForSequenceClassification`, for `linear` heads on `last` pooling).
        int8: 8-bit weights, and activations that are quantised as they come. Processors with VNNI gain speed.
            It may cost accuracy: compare the two exports on your rows.
        out: a folder that doesn't exist yet; left out, one in `source` named after format and precision.

    Raises:
        ConfigError: an unknown format, a folder that exists, a classifier that the format can't hold, or a source
            that holds none.
    """
    if format not in RUNNERS:
        raise ConfigError(f"format is {format!r}; expected one of {', '.join(map(repr, RUNNERS))}.")
    if int8 and format == "hf":
        raise ConfigError("int8 is set with format 'hf', which has float32 weights; expected 'onnx' or 'openvino'.")
    out = Path(out or Path(source) / f"export-{format}{'-int8' if int8 else ''}")
    with writing(out.parent, "out may name another folder"):
        _refuse_there(out)
    model = _load(source)
    with writing(out.parent, "out may name another folder"), locked(Path(f"{out}.lock")):
        _refuse_there(out)
        with new_folder(out) as scratch:
            _WRITERS[format](model, scratch, int8)
            model.tokenizer.save_pretrained(scratch)
            _write_config(model, scratch, format, "int8" if int8 else "float32")
            scratch.chmod(0o755)  # mkdtemp's is the owner's alone
    if format == "openvino":
        load_classifier(out)  # Compiling takes seconds: it is done here, and a start on this machine finds it done.
    return out


def _refuse_there(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists already; expected a folder that doesn't.")


def _load(source: str | Path) -> DHRDModel:
    """The trained model on the CPU, in float32, its adapters merged."""
    folder = model_folder(source)
    if EXPORT_KEY in read_config(folder):
        raise ConfigError(f"{source} is an export already; expected a finished run or a saved DHRDModel.")
    model = DHRDModel.from_pretrained(folder).float()
    if not model.tokenizer.is_fast:
        raise ConfigError(f"{source} has a tokenizer without a tokenizer.json; expected a fast one.")
    _merge_adapters(model.backbone)
    # What is set here is saved with it, an attribute set later isn't: inputs are cut as they were in training.
    cut = {"truncation_side": "left", "model_max_length": model.config.max_input_tokens}
    model.tokenizer = load_tokenizer(folder, str(folder), trust_remote_code=False, **cut)
    return model


def _merge_adapters(backbone: nn.Module) -> None:
    """Put what LoRA and trained token rows have learned into the weights that they stand beside."""
    for name, module in list(backbone.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.token_adapter.merge()
            backbone.set_submodule(name, module.token_adapter.get_base_layer())
        elif isinstance(module, BaseTunerLayer) and not name.endswith("token_adapter"):
            module.merge()
            backbone.set_submodule(name, module.get_base_layer())


def _write_config(model: DHRDModel, folder: Path, format: str, precision: str) -> None:
    fmt = model.sequence_format
    config = ExportConfig(
        format=format,
        precision=precision,
        backbone=model.config.backbone_name,
        pooling=model.config.pooling,
        head=model.config.head,
        template=model.config.template,
        label_names=model.label_names,
        max_input_tokens=model.config.max_input_tokens,
        start_ids=fmt.encode_input("a")[0][: -len(fmt.encode("a"))],
        pad_token_id=model.tokenizer.pad_token_id,
    )
    path = folder / "config.json"
    own = read_config(folder) if path.is_file() else {}
    write_json(path, {**own, EXPORT_KEY: dataclasses.asdict(config)})


class _Classify(nn.Module):
    """The model under the two inputs of an exported graph."""

    def __init__(self, model: DHRDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(input_ids, attention_mask, input_mask=attention_mask).logits}


def _trace(model: DHRDModel, exporter: HfExporter, config: OnnxConfig | OpenVINOConfig, path: Path) -> None:
    """Trace, convert and save the graph, with batch and length free."""
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    config.dynamic_shapes = {"input_ids": free, "attention_mask": free}
    # Two rows of unlike length: a trace of a batch of one, or without padding, may take them for constants. Ids and
    # mask are two tensors: one alone would be traced as one input.
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    inputs = {"input_ids": torch.full_like(mask, 3), "attention_mask": mask}
    program, _ = exporter.export_program(_Classify(model), inputs, config)
    exporter.save_program(program, path)


class _Int8(OnnxRuntimeQuantizer):
    """The decoder's products of 8-bit weights with activations that are quantised as they come.

    Activations have outliers, against which one scale for a whole tensor rounds the rest away: a scale for each row
    and `_BLOCK` inputs keeps it. The MLPs' way in (gate and up, one product in the graph), which is half the work,
    bears one scale, and is faster so. Its weights have 7 bits, as sums of 8-bit products overflow on processors
    without VNNI. The classifier's products stay in float32.
    """

    def __init__(self) -> None:
        super().__init__(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True))

    def quantize(self, model: onnx_ir.Model, *arguments: Any) -> onnx_ir.Model:
        fast = [node.name for node in model.graph if self._leads_into_mlp(node)]
        others = _quantizer_in_blocks()(
            onnx_ir.to_proto(model),
            bits=8,
            block_size=_BLOCK,
            is_symmetric=True,
            accuracy_level=_INT8_PRODUCTS,
            nodes_to_exclude=fast,
        )
        others.process()
        model = onnx_ir.from_proto(others.model.model)
        self.config.nodes_to_quantize = fast
        return super().quantize(model, *arguments) if fast else model  # An empty list would mean every product.

    @staticmethod
    def _leads_into_mlp(node: onnx_ir.Node) -> bool:
        """Whether a product gives more than three times the width that it reads: query, key and value don't."""
        weight = node.inputs[1].const_value if node.op_type == "MatMul" else None
        return weight is not None and weight.shape[1] > 3 * weight.shape[0]


def _quantizer_in_blocks() -> type:
    """ONNX Runtime's own, whose import makes every library of the process log what it does; that is taken back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    return MatMulNBitsQuantizer


def _smooth(model: DHRDModel) -> None:
    """Share activations' outliers with the weights that they meet, as both will have 8 bits (SmoothQuant).

    What is large beside its weights is divided where it is made, and the weights are multiplied (Xiao et al. 2023,
    equation 4, with alpha = 0.5): in float32 the model says what it said. Decoders of other families stay as they
    are.
    """
    if model.config.backbone_config.model_type not in _SMOOTHED:
        return
    layers = layers_of(model.backbone)
    largest = _largest_inputs(model, layers)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for maker, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        ):
            weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
            share = (largest[readers[0]].clamp(min=_TINY) / weights.clamp(min=_TINY)).sqrt()
            for reader in readers:
                reader.weight.data *= share
            for parameter in maker.parameters():
                parameter.data /= share.view(-1, *[1] * (parameter.dim() - 1))


def _largest_inputs(model: DHRDModel, layers: nn.ModuleList) -> dict[nn.Module, torch.Tensor]:
    """The largest magnitude of each input of the layers' products, over texts of the packaged tasks."""
    largest: dict[nn.Module, torch.Tensor] = {}

    def see(product: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        seen = arguments[0].abs().flatten(0, -2).amax(0)
        largest[product] = torch.maximum(largest.get(product, seen), seen)

    products = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    hooks = [product.register_forward_pre_hook(see) for product in products]
    texts = [text for name in _TASKS_SEEN for text in load_task(name)[1]["train"]["input_text"][:_ROWS_SEEN]]
    for row in encode_examples(model.sequence_format, texts):
        model.logits([row])  # One by one: what padding is like doesn't count.
    for hook in hooks:
        hook.remove()
    return largest


def _write_onnx(model: DHRDModel, folder: Path, int8: bool) -> None:
    if int8:
        _smooth(model)
    config = OnnxConfig(ort_fusions="cpu", quantizer=_Int8() if int8 else None)
    _trace(model, OnnxExporter(), config, folder / "model.onnx")


def _write_openvino(model: DHRDModel, folder: Path, int8: bool) -> None:
    quantizer = None
    if int8:
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

        quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig())
    _trace(model, OpenVINOExporter(), OpenVINOConfig(quantizer=quantizer), folder / "openvino_model.xml")


def _write_hf(model: DHRDModel, folder: Path, int8: bool) -> None:
    sequence_classifier(model).save_pretrained(folder)


def sequence_classifier(model: DHRDModel) -> PreTrainedModel:
    """transformers' `AutoModelForSequenceClassification` around the model's own weights, which it shares.

    It pools the last token that isn't padding and has one linear layer; raises `ConfigError` for other models.
    """
    if model.config.pooling != "last" or model.config.head != "linear":
        raise ConfigError(
            f"pooling is {model.config.pooling!r} and head {model.config.head!r}; expected 'last' and 'linear', "
            "which are all that transformers' classifier has."
        )
    config = copy.deepcopy(model.backbone.config)
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    config.pad_token_id = model.tokenizer.pad_token_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.backbone.base_model)
    classifier.score = model.classifier
    return classifier.eval()


_WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino, "hf": _write_hf}
