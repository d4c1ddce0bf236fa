"""The model: one causal decoder, a pooled classifier on its input states, and its own LM head (paper, "Model")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from dhrd_lib import backbones, generation, losses
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, TrainingConfig
from dhrd_lib.inputs import MAX_TOKENS_PER_CPU_BATCH, Inputs, Predictions, length_sorted_batches, render_inputs
from dhrd_lib.sequences import ANSWER_MARKER, REASON_MARKER, DHRDCollator, SequenceFormat, encode_examples
from dhrd_lib.tasks import Task


class DHRDConfig(PreTrainedConfig):
    """What a saved model needs to be used alone: backbone, heads, label names, template, markers and limits.

    `lora` has the arguments of `peft.LoraConfig`; `verbalizers` are the labels as the LM head writes them. Where
    `classifier_trained` is False (beta was 0) only CoT predicts. `compute_dtype` may be "bfloat16 autocast".
    """

    model_type = "dhrd"
    keys_to_ignore_at_inference = [*losses.TERMS]  # noqa: RUF012
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, "llama")}  # noqa: RUF012

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name: str = ""
    pooling: str = "last"
    head: str = "mlp"
    template: str = "{text}"
    verbalizers: list[str] | tuple[str, ...] = ()
    reason_marker: str = REASON_MARKER
    answer_marker: str = ANSWER_MARKER
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    truncation_side: str = "left"
    lm_chunk_tokens: int = 512
    lora: dict | None = None
    classifier_trained: bool = True
    compute_dtype: str = "float32"
    tie_word_embeddings: bool = False


AutoConfig.register("dhrd", DHRDConfig)


@dataclass
class DHRDOutput(ModelOutput):
    """`loss` and its `TERMS` (float32 scalars, None where there are no labels), and `logits (B, K)`, float32."""

    loss: Tensor | None = None
    class_loss: Tensor | None = None
    lm_loss: Tensor | None = None
    privileged_class_loss: Tensor | None = None
    privileged_kl: Tensor | None = None
    logits: Tensor | None = None


def pool(hidden: Tensor, input_mask: Tensor, mode: str, query: Tensor | None = None) -> Tensor:
    """Reduce the states of each row's input span, and no others, to one vector (paper, "Model").

    `hidden (B, S, H)`, `input_mask (B, S)` with ones over the input; returns `(B, H)`. Modes: `last` (the paper's:
    the last input token), `mean`, `weightedmean` (weights 1, 2, 3, …: later states have seen more), `max`, and
    `attention` (softmax of `hidden @ query / sqrt(H)`, `query (H,)` learned).
    """
    mask = input_mask.bool()
    if mode == "last":
        last = input_mask.long().sum(1) - 1
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    if mode == "max":
        return hidden.masked_fill(~mask[..., None], float("-inf")).amax(1)
    if mode == "mean":
        weights = mask.to(hidden.dtype)
    elif mode == "weightedmean":
        weights = input_mask.long().cumsum(1).to(hidden.dtype) * mask
    else:
        scores = (hidden @ query.to(hidden.dtype)) / hidden.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(1)
    return torch.einsum("bsh,bs->bh", hidden, weights / weights.sum(1, keepdim=True))


class DHRDModel(PreTrainedModel):
    """A causal decoder with two heads: a pooled classifier, and its own pretrained LM head."""

    config_class = DHRDConfig
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # Small, and trained: in bfloat16 they would lose the small steps of training.
    _keep_in_fp32_modules_strict = ["classifier", "pooling_query", "lora_"]  # noqa: RUF012

    def __init__(self, config: DHRDConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.tokenizer = None  # `build_model` and `from_pretrained` set it.
        self.backbone = lm or AutoModelForCausalLM.from_config(config.backbone_config, trust_remote_code=False)
        if config.lora:
            inject_adapter_in_model(LoraConfig(**config.lora), self.backbone)
        size, n_labels = self.lm_head.weight.shape[1], config.num_labels
        if config.head == "linear":  # as in transformers
            self.classifier = nn.Linear(size, n_labels, bias=False)
        else:  # the paper's
            self.classifier = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, n_labels))
        self.privileged_classifier = None  # Serves training alone, and isn't saved.
        if config.pooling == "attention":
            self.pooling_query = nn.Parameter(torch.zeros(size))
        self.post_init()
        # Saved once, under the name of the weight that they are tied to.
        self._keys_to_ignore_on_save |= set(self.all_tied_weights_keys)

    @property
    def lm_head(self) -> nn.Linear:
        """The reasoning head: the backbone's own pretrained LM head."""
        return self.backbone.get_output_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's, which a saved model is loaded in, its float32 heads aside."""
        return self.backbone.dtype

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()

    @property
    def sequence_format(self) -> SequenceFormat:
        """The format of this model's token rows; `lm_span` and `order` belong to a run's configuration."""
        fields = ("reason_marker", "answer_marker", "max_input_tokens", "max_rationale_tokens", "truncation_side")
        return SequenceFormat(self.tokenizer, **{name: getattr(self.config, name) for name in fields})

    @property
    def label_names(self) -> list[str]:
        """The labels' names, in the order of the logits."""
        return [self.config.id2label[i] for i in range(self.config.num_labels)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        lm_labels: Tensor | None = None,
        rationale_end: Tensor | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        privileged_gamma: float | None = None,
        privileged_temperature: float = 2.0,
        counts: Tensor | None = None,
        class_weights: Tensor | None = None,
        record_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> DHRDOutput:
        """Run the decoder once for both heads (paper, "Model" and "Loss").

        `input_ids`, `attention_mask`, `input_mask` (default: attention's), `lm_labels`: `(B, S)` int64, padded on
        the right; `class_labels (B,)` int64; `class_weights (K,)` float32. Each term is summed over this batch and
        divided by its part of `counts (4,)`, by default its own (`losses.denominators`). With `privileged_gamma`, a
        classifier reads each rationale's last state, before `rationale_end (B,)` int64, and teaches the input's.
        `record_gradient` gets the gradients of class and LM loss at the states by name.
        """
        with backbones.autocast(self.backbone):
            outputs = self.backbone.get_decoder()(input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = outputs.last_hidden_state  # (B, S, H)
        class_hidden = lm_hidden = hidden
        if record_gradient is not None:
            class_hidden, lm_hidden = hidden.view_as(hidden), hidden.view_as(hidden)
            class_hidden.register_hook(partial(record_gradient, "class_loss"))
            lm_hidden.register_hook(partial(record_gradient, "lm_loss"))
        input_mask = attention_mask if input_mask is None else input_mask
        pooled = pool(class_hidden, input_mask, self.config.pooling, getattr(self, "pooling_query", None))  # (B, H)
        dtype = next(self.classifier.parameters()).dtype
        logits, sums = self.classifier(pooled.to(dtype)).float(), {}  # (B, K)
        if class_labels is not None:
            sums["class_loss"] = F.cross_entropy(logits, class_labels, weight=class_weights, reduction="sum")
        if lm_labels is not None and alpha > 0:
            sums["lm_loss"] = self.lm_loss_sum(lm_hidden, lm_labels)
        if privileged_gamma is not None:
            rows = rationale_end > 0
            states, labels = hidden[rows, rationale_end[rows] - 1], class_labels[rows]  # (R, H): causal; (R,)
            teacher = (self.privileged_classifier or self.classifier)(states.to(dtype)).float()  # (R, K)
            sums["privileged_class_loss"] = F.cross_entropy(teacher, labels, weight=class_weights, reduction="sum")
            sums["privileged_kl"] = losses.distillation_loss_sum(logits[rows], teacher, privileged_temperature)
        if sums:  # An export, which has none, keeps the batch size open.
            counts = losses.denominators(input_ids, lm_labels, rationale_end) if counts is None else counts
            divisors = dict(zip(losses.TERMS, counts.clamp(min=1), strict=True))
        weights = dict(zip(losses.TERMS, (beta, alpha, 1.0, privileged_gamma), strict=True))
        terms = {name: total / divisors[name] for name, total in sums.items()}
        return DHRDOutput(loss=losses.dhrd_loss(terms, weights), **terms, logits=logits)

    def lm_loss_sum(self, hidden: Tensor, lm_labels: Tensor) -> Tensor:
        """Return the LM loss summed over target tokens; training reads the head's weights here alone."""
        head = (self.lm_head.weight, getattr(self.lm_head, "bias", None))  # (V, H), (V,)
        options = (self.config.lm_chunk_tokens, backbones.logit_softcap(self.backbone))
        with backbones.autocast(self.backbone):
            return losses.lm_cross_entropy_sum(hidden, lm_labels, *head, *options)

    def encode(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Return token rows (see `encode_examples`) of inputs: dicts of the template's fields, or a str where it
        has one; many are a list or a DataFrame.
        """
        return encode_examples(self.sequence_format, render_inputs(self.config.template, inputs))

    @torch.inference_mode()
    def logits(self, rows: Sequence[Mapping[str, Any]], max_batch_tokens: int = 4096) -> np.ndarray:
        """Return class logits `(N, K)`, float32, of encoded inputs, in their order; the LM head isn't computed.

        A batch has at most `max_batch_tokens` tokens, padding counted. Raises `ConfigError` where beta was 0.
        """
        if not self.config.classifier_trained:
            raise ConfigError("the classifier is untrained (training had beta = 0); expected CoT decoding.")
        self.eval()
        if self.device.type == "cpu":
            max_batch_tokens = min(max_batch_tokens, MAX_TOKENS_PER_CPU_BATCH)
        logits = np.zeros((len(rows), self.config.num_labels), dtype=np.float32)
        for places in length_sorted_batches([len(row["input_ids"]) for row in rows], max_batch_tokens):
            batch = DHRDCollator(self.tokenizer.pad_token_id)([rows[i] for i in places])
            ids, mask = batch["input_ids"].to(self.device), batch["input_mask"].to(self.device)  # (B, S)
            logits[places] = self(ids, mask, mask).logits.cpu().numpy()  # (B, K)
        return logits

    def predict(self, inputs: Inputs, max_batch_tokens: int = 4096) -> Predictions:
        """Return label names and probabilities of inputs, in their order (see `encode` and `logits`)."""
        return Predictions.from_logits(self.logits(self.encode(inputs), max_batch_tokens), self.label_names)

    def generate_rationale(
        self, input: str | Mapping[str, Any], max_new_tokens: int = 128, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """Generate an explanation after `<REASON>` with the reasoning head; the prediction doesn't depend on it.

        Greedy unless `options` (of the backbone's `generate`) say otherwise; `stream` yields the text in pieces.
        Raises `ConfigError` where input and new tokens don't fit the context.
        """
        (row,) = self.encode(input)
        prompt = row["input_ids"] + self.sequence_format.encode(self.config.reason_marker)
        generation.check_context(self.backbone, [prompt], max_new_tokens)
        self.eval()
        marker, options = self.config.answer_marker, {"do_sample": False, **options}
        options |= {"max_new_tokens": max_new_tokens, "is_complete": lambda text: marker in text}

        def pieces() -> Iterator[str]:
            text, n_shown = "", 0
            with closing(generation.stream(self.backbone, self.tokenizer, prompt, **options)) as steps:
                for ids, _ in steps:
                    text = self.tokenizer.decode(ids, skip_special_tokens=True).split(marker)[0].strip()
                    # Hold back what may be the start of the marker, or a part of a character.
                    ready = max(len(text) - len(marker), n_shown)
                    if ready > n_shown:
                        yield text[n_shown:ready]
                        n_shown = ready
            yield text[n_shown:]

        return pieces() if stream else "".join(pieces())

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write configuration, weights (safetensors) and tokenizer to a folder that is enough by itself."""
        super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> DHRDModel:
        """Load a folder that `save_pretrained` wrote: a model in evaluation mode, with its tokenizer.

        After training in bfloat16 autocast it computes so where this CPU is faster at it and no `dtype` is named.
        Raises `FileNotFoundError` without a model, `ConfigError` on one of another kind, and `BackboneError` on
        weights that aren't safetensors of its own.
        """
        if not Path(folder, "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model; expected a folder of save_pretrained.")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, cls.config_class):
            raise ConfigError(f"{folder} holds a model of the type {config.model_type!r}; expected 'dhrd'.")
        backbones.check_own_weights(Path(folder))
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        model = super().from_pretrained(folder, config=config, **kwargs)
        model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if config.compute_dtype == "bfloat16 autocast" and "dtype" not in kwargs:
            backbones.autocast_if_faster(model.backbone)
        return model


def build_model(
    config: ModelConfig,
    task: Task,
    data: DataConfig | None = None,
    training: TrainingConfig | None = None,
    backbone: Backbone | None = None,
) -> DHRDModel:
    """Build a model for a task, ready to train: backbone loaded, new heads drawn with the seed, weights frozen.
    Raise `ConfigError` where the backbone has fewer layers than are frozen, or a context too short for the limits.
    """
    data, training = data or DataConfig(), training or TrainingConfig()
    lm, tokenizer, name = backbone or load_backbone(config.backbone, config.device, config.dtype)
    # Markers and label need a few positions beyond the two limits, and a label may be a whole sentence.
    fmt = SequenceFormat(tokenizer)
    after = len(fmt.encode(REASON_MARKER)) + max(len(fmt.encode_label(words)) for words in task.verbalizers)
    needed = data.max_input_tokens + data.max_rationale_tokens + max(after, 32)
    if needed > (context := generation.context_length(lm)):
        problem = f"max_input_tokens={data.max_input_tokens} and max_rationale_tokens={data.max_rationale_tokens}"
        raise ConfigError(f"{problem} need a context of {needed} tokens; the backbone's is {context}.")
    large, lora = lm.num_parameters() >= 500_000_000 and config.freeze_layers == 0, None
    if config.finetune == "lora" or (config.finetune == "auto" and large):
        lora = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        lora["target_modules"] = "all-linear"  # As in the paper on Llama and Qwen; the LM head is left out.
    elif config.dtype == "auto":
        lm.float()  # Weights that are trained stay in float32; on a GPU, autocast computes in bfloat16.
    model_config = DHRDConfig(
        backbone_config=lm.config,
        attn_implementation=lm.config._attn_implementation,  # Left out, it would be reset on the backbone's.
        backbone_name=name,
        **config.model_dump(include={"pooling", "head"}),
        template=task.template,
        verbalizers=list(task.verbalizers),
        **data.model_dump(include={"max_input_tokens", "max_rationale_tokens", "truncation_side"}),
        lm_chunk_tokens=training.lm_chunk_tokens,
        lora=lora,
        classifier_trained=training.beta > 0,
        compute_dtype=backbones.compute_dtype(lm),
        id2label=dict(enumerate(task.label_names)),
        label2id={name: i for i, name in enumerate(task.label_names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = DHRDModel(model_config, lm)
        if (
            training.privileged_head == "separate"
        ):  # Drawn last, so that the input's is the same with and without it.
            model.privileged_classifier = deepcopy(model.classifier).apply(model._init_weights)
    model.tokenizer = tokenizer
    model.to(lm.device)
    frozen = backbones.lowest_layers(lm, config.freeze_layers) if config.freeze_layers else []
    # A head whose loss has no weight gets no gradient, and weight decay must not move it either.
    if training.alpha == 0 and model.lm_head.weight is not model.get_input_embeddings().weight:
        frozen.append(model.lm_head)
    for module in frozen:
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if any(part in name for part in DHRDModel._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.float()
        if training.beta == 0 and ("classifier." in name or "pooling_query" in name):
            parameter.requires_grad_(False)
    return model
