"""An encoder as a base: transformers' bidirectional body alone, and the heads that transformers puts on it.

Shapes: T tokens, C places where a class is read, D hidden size, K classes.

Every job on an encoder has a head of its own, so the base is the body without one, held under the name that it has
within transformers' classifiers ("bert", "roberta", "model"): an adapter's layers are then called as peft calls them.

A head is transformers' own classifier of the architecture with its body taken out, so that what is trained is what a
reload computes: BERT's pooler and classifier, RoBERTa's two layers, DistilBERT's pre_classifier, ModernBERT's
prediction head. It reads the first token of a text, or each tagged token. What of it the base's files hold besides the
classes (a pooler, ModernBERT's `head`) begins as it is there; the rest is drawn from the job's seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from luthier.base.folder import weight_files
from luthier.data.encoders import counts_from_padding
from luthier.errors import ModelError, RecipeError
from luthier.types import HeadKind


class Encoder(nn.Module):
    """The body, with what of transformers' models a base is asked for.

    Args:
        body: As `AutoModel` gives it. Its pooler, which belongs to a head, is taken off.
        pretrained: What the base's files hold of heads, by the names within transformers' classifiers.
    """

    def __init__(self, body: Any, pretrained: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        if getattr(body, "pooler", None) is not None:
            body.pooler = None
        self.config: Any = body.config
        self.base_model_prefix: str = body.base_model_prefix
        self.pretrained = dict(pretrained or {})
        self.add_module(self.base_model_prefix, body)
        self.eval()

    @property
    def base_model(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base_model.get_input_embeddings())

    def get_output_embeddings(self) -> None:
        """There is no output layer."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward.

        Raises:
            RecipeError: for an architecture that cannot.
        """
        if not self.base_model.supports_gradient_checkpointing:
            raise RecipeError(
                f"{self.config.model_type} cannot compute its activations again in the backward",
                "an encoder that can, or enough memory to keep them",
                "set train.gradient_checkpointing: off, and lower train.micro_batch_tokens where memory is short",
            )
        self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.base_model.is_gradient_checkpointing)

    def position_ids(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """int64 [T]: what the architecture calls the positions of packed sequences.

        RoBERTa's rule, of each sequence by itself (transformers' `create_position_ids_from_input_ids`): with the
        padding token's id p, a token's position is p plus the number of tokens up to it that are not padding, and p of
        padding.

        Args:
            positions_T: Each token's place within its own sequence.
        """
        if not counts_from_padding(self.config.model_type):
            return positions_T
        is_text_T = (tokens_T != self.config.pad_token_id).long()
        count_T1 = torch.cat([is_text_T.new_zeros(1), is_text_T.cumsum(0)])
        before_T = count_T1[torch.arange(len(tokens_T), device=tokens_T.device) - positions_T]
        return (count_T1[1:] - before_T) * is_text_T + self.config.pad_token_id

    def empty_head(self, num_classes: int, kind: HeadKind) -> nn.Module:
        """transformers' head of so many classes, on the meta device; it holds no values."""
        config = copy.deepcopy(self.config)
        config.num_labels = num_classes
        config.problem_type = None
        reads_first(config)
        config._attn_implementation = "eager"  # nothing attends in a head
        with torch.device("meta"):
            head = _classifier_class(config, kind)(config)
        pooler = getattr(head.base_model, "pooler", None)
        setattr(head, head.base_model_prefix, _GivenStates(pooler))
        return cast(nn.Module, head.eval())

    @torch.no_grad()
    def fresh_head(self, num_classes: int, kind: HeadKind, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        """A head to be trained, on the CPU: what the base's files hold of it, and the rest drawn.

        Weights are drawn from a normal distribution of the config's `initializer_range`; a norm begins at 1, a bias
        at 0.
        """
        head = self.empty_head(num_classes, kind).to(dtype).to_empty(device="cpu")
        std = getattr(self.config, "initializer_range", None) or 0.02
        for name, parameter in head.named_parameters():
            known = self.pretrained.get(name)
            if known is not None and known.shape == parameter.shape:
                parameter.copy_(known)
            elif name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
        return head.requires_grad_(True)


class _GivenStates(nn.Module):
    """In a head, in place of its body: gives back the hidden states that it is given as embeddings, pooled too."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        if pooler is not None:
            self.pooler = pooler

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled = self.pooler(inputs_embeds) if hasattr(self, "pooler") else None
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)  # type: ignore[arg-type]


def head_logits(head: nn.Module, hidden_CD: Tensor) -> Tensor:
    """Logits [C, K], in the head's dtype, of a head that an encoder made."""
    given_C1D = hidden_CD[:, None].to(next(head.parameters()).dtype)
    logits: Tensor = head(inputs_embeds=given_C1D).logits
    return logits.reshape(hidden_CD.shape[0], -1)


def head_modules(head: nn.Module) -> list[str]:
    """The modules that a head consists of, by the names within transformers' classifier: ["bert.pooler", ...]."""
    names = dict.fromkeys(_module_of(name) for name, _ in head.named_parameters())
    return list(names)


def _module_of(parameter: str) -> str:
    """ "bert.pooler" of "bert.pooler.dense.weight", "classifier" of "classifier.dense.weight"."""
    parts = parameter.split(".")
    return ".".join(parts[: parts.index("pooler") + 1]) if "pooler" in parts else parts[0]


def reads_first(config: Any) -> None:
    """Let the architecture's sequence classifier pool at the first token, where its config leaves it open."""
    if hasattr(config, "classifier_pooling"):
        config.classifier_pooling = "cls"


def load_encoder(folder: Path, dtype: torch.dtype) -> Encoder:
    """An encoder from a folder of safetensors, on the CPU.

    Raises:
        OSError, ValueError, KeyError: as transformers has it, where the folder holds none.
        ModelError: where the body's weights are not all there.
    """
    from transformers import AutoModel, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the files hold a head besides is no news
    try:
        body, found = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name.split("."))
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of its encoder, such as {missing[0]}",
            "all weights of the architecture that config.json names",
            "fetch the base again",
        )
    return Encoder(body, _read_heads(folder, body.base_model_prefix))


def encoder_without_weights(config: Any) -> Encoder:
    """The architecture that a config describes, on the meta device."""
    from transformers import AutoModel

    with torch.device("meta"):
        return Encoder(AutoModel.from_config(config, trust_remote_code=False))


def _read_heads(folder: Path, prefix: str) -> dict[str, Tensor]:
    """What the files hold of heads besides the classes, which are each job's own."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                parts = name.split(".")
                if parts[0] == "pooler":  # the files hold a body by itself
                    tensors[f"{prefix}.{name}"] = file.get_tensor(name)
                elif parts[:2] == [prefix, "pooler"] or parts[0] in ("head", "pre_classifier"):
                    tensors[name] = file.get_tensor(name)
    return tensors


def _classifier_class(config: Any, kind: HeadKind) -> Any:
    """transformers' sequence or token classifier of an encoder; all that are known here have both."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    classes: Any = (
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING if kind == "token" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    return classes[type(config)]
