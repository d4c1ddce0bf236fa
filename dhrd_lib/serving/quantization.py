"""int8 for ONNX Runtime: which products get 8 bits, and how activations' outliers are smoothed first."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir
import torch
from torch import nn
from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from dhrd_lib.backbones import layers_of
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.sequences import encode_examples
from dhrd_lib.tasks import load_task

BLOCK_SIZE = 128  # inputs that share a scale; with 64 it is slower, and hardly closer to float32
INT8_PRODUCTS = 4  # ONNX Runtime's accuracy level at which the products themselves are of 8-bit numbers
SMOOTHED = ("llama", "mistral", "qwen2", "qwen3")  # their norms only multiply, right before the products
CALIBRATION_TASKS, CALIBRATION_ROWS = ("support_triage", "everyday_nli"), 24
EPSILON = 1e-5  # stands for the magnitude of inputs and weights that are always 0


class Int8Quantizer(OnnxRuntimeQuantizer):
    """8-bit weights for the decoder's products, with activations quantized on the fly.

    Activations have outliers, and one scale for a whole tensor would round the rest away: a scale for each row and
    `BLOCK_SIZE` inputs keeps it. The products that lead into the MLPs (gate and up, one in the graph), half of the
    work, tolerate one scale, and have 7 bits: sums of 8-bit products overflow on processors without VNNI. The
    classifier's products stay in float32.
    """

    def __init__(self) -> None:
        super().__init__(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True))

    def quantize(self, model: onnx_ir.Model, *arguments: Any) -> onnx_ir.Model:
        """Quantize in blocks all products but those that lead into an MLP, then those dynamically."""
        weights = {node.name: node.inputs[1].const_value for node in model.graph if node.op_type == "MatMul"}
        # These are more than three times as wide as their input; query, key and value are not.
        into_mlp = [name for name, of in weights.items() if of is not None and of.shape[1] > 3 * of.shape[0]]
        settings = {"bits": 8, "block_size": BLOCK_SIZE, "is_symmetric": True, "accuracy_level": INT8_PRODUCTS}
        blockwise = matmul_nbits_quantizer()(onnx_ir.to_proto(model), nodes_to_exclude=into_mlp, **settings)
        blockwise.process()
        model = onnx_ir.from_proto(blockwise.model.model)
        self.config.nodes_to_quantize = into_mlp
        return super().quantize(model, *arguments) if into_mlp else model  # An empty list would mean all of them.


def matmul_nbits_quantizer() -> type:
    """Return ONNX Runtime's blockwise quantizer; its import configures the root logger, which is undone."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    return MatMulNBitsQuantizer


def smooth(model: DHRDModel) -> None:
    """Share activations' outliers with the weights that they meet, because both will have 8 bits (SmoothQuant).

    Large inputs are divided where they are computed, and their weights multiplied (Xiao et al. 2023, equation 4,
    alpha = 0.5): the model's function is the same. Decoders of other families are left as they are.
    """
    if model.config.backbone_config.model_type not in SMOOTHED:
        return
    largest: dict[nn.Module, torch.Tensor] = {}  # magnitude of each input of a product, over the packaged tasks

    def record(product: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        magnitudes = arguments[0].abs().flatten(0, -2).amax(0)
        largest[product] = torch.maximum(largest.get(product, magnitudes), magnitudes)

    layers = layers_of(model.backbone)
    products = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    hooks = [product.register_forward_pre_hook(record) for product in products]
    for task in CALIBRATION_TASKS:
        texts = load_task(task)[1]["train"]["input_text"][:CALIBRATION_ROWS]
        for row in encode_examples(model.sequence_format, texts):
            model.logits([row])  # one by one, because padding's states must not count
    for hook in hooks:
        hook.remove()
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for source, products in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        ):
            weights = torch.stack([product.weight.abs().amax(0) for product in products]).amax(0)
            scale = (largest[products[0]].clamp(min=EPSILON) / weights.clamp(min=EPSILON)).sqrt()
            for product in products:
                product.weight.data *= scale
            for parameter in source.parameters():
                parameter.data /= scale.view(-1, *[1] * (parameter.dim() - 1))
