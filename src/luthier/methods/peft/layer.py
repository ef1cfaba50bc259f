"""Bases with a method of `peft` in them: layers put into the model, or virtual tokens before every sequence.

Shapes: N sequences, L longest sequence, V virtual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.base.adapter_files import CONFIG_FILE, check_same_head, read_head_kind
from luthier.base.folder import read_json
from luthier.base.own import OwnBase
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackedBatch
from luthier.errors import ModelError, RecipeError
from luthier.methods.peft.adalora import AdaloraHooks
from luthier.methods.peft.fields import VIRTUAL_TOKENS, first_line, make_config
from luthier.types import ExclusiveSpec

ADAPTER = "default"
"""The one adapter's name within peft's model."""

HEAD_NAME = "score"
"""What transformers calls a decoder's classifier head."""


class PeftBase(OwnBase):
    """A base with a method of peft.

    Attributes:
        peft_model: peft's own model, which knows how to save itself.
    """

    def __init__(
        self, peft_model: Any, folder: Path | None, spec: ExclusiveSpec, num_parameters: int, seed: int
    ) -> None:
        self.peft_model = peft_model
        # peft trains AdaLoRA's divisor `ranknum` and does not save it, so that its files would give other logits.
        live = {name: p for name, p in peft_model.named_parameters() if p.requires_grad and ".ranknum." not in name}
        peft_model.requires_grad_(False)
        slot = OwnSlot(spec, live)
        if spec.peft_type == "ADALORA":
            slot.method_hooks = AdaloraHooks(peft_model.base_model, ADAPTER)
        super().__init__(peft_model.get_base_model(), folder, slot, num_parameters, seed)

    def start_from(self, folder: Path) -> None:
        """Take the values of an adapter that peft or Luthier wrote.

        Raises:
            RecipeError: where it is of another method or shape, or its files hold less than training goes on from.
        """
        from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

        spec = self.slot.spec
        problem = _no_start(spec) or _other_method(spec, folder)
        if problem:
            raise RecipeError(f"start_from: {folder} {problem}", fix="leave start_from out, or name another adapter")
        try:
            set_peft_model_state_dict(self.peft_model, load_peft_weights(str(folder), device="cpu"), ADAPTER)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise RecipeError(
                f"start_from: {folder} does not fit the recipe's method: {first_line(error)}",
                "an adapter with the same fields",
            ) from None
        _load_head(self.slot, folder)


class InjectedBase(PeftBase):
    """peft has put its layers into the model: they act on each token by itself, so that sequences may run packed."""

    def __init__(
        self, peft_model: Any, folder: Path | None, spec: ExclusiveSpec, num_parameters: int, seed: int
    ) -> None:
        self._is_tuned = True
        super().__init__(peft_model, folder, spec, num_parameters, seed)

    def _serve(self, is_tuned: bool, *, training: bool) -> None:
        if is_tuned != self._is_tuned:
            change = self.peft_model.base_model
            change.enable_adapter_layers() if is_tuned else change.disable_adapter_layers()
            for parameter in self.slot.live.values():
                parameter.requires_grad_(True)  # disabling stops gradients besides
            self._is_tuned = is_tuned
        for module in self._method_modules():
            module.training = training

    def _method_modules(self) -> Iterator[nn.Module]:
        """peft's own modules, whose dropout follows the training; the base's own stay as they are in evaluation."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                yield layer  # type: ignore[misc]
                for name, child in layer.named_children():  # type: ignore[attr-defined]
                    if name != "base_layer":
                        yield from child.modules()


class PromptBase(PeftBase):
    """Virtual tokens stand before every sequence: as embeddings, or as keys and values of every layer (prefix).

    Sequences run padded, one a row. All that the virtual tokens shift is shifted here: `num_lead` says by how much.
    """

    def __init__(
        self, peft_model: Any, folder: Path | None, spec: ExclusiveSpec, num_parameters: int, seed: int
    ) -> None:
        self.num_virtual = int(peft_model.active_peft_config.num_virtual_tokens)
        self.is_prefix = spec.peft_type == "PREFIX_TUNING"
        self._is_tuned = False
        super().__init__(peft_model, folder, spec, num_parameters, seed)
        self.is_packed = False
        self.packing_problem = f"{spec.peft_type.lower()} puts virtual tokens before every sequence"

    @property
    def max_positions(self) -> int | None:
        most = super().max_positions
        return None if most is None else most - self.num_virtual

    @property
    def num_lead(self) -> int:  # type: ignore[override]
        """Virtual positions among the hidden states: a prefix has none there."""
        return self.num_virtual if self._is_tuned and not self.is_prefix else 0

    def _serve(self, is_tuned: bool, *, training: bool) -> None:
        self._is_tuned = is_tuned and self._is_ready  # the probe asks the base, which has no layer of the method's
        self.peft_model.prompt_encoder.train(training)

    def _padded_inputs(self, batch: PackedBatch) -> dict[str, Any]:
        inputs = super()._padded_inputs(batch)
        if not self._is_tuned:
            return inputs
        ids_NL, mask_NL = inputs["input_ids"], inputs["attention_mask"]
        seen_NV = mask_NL.new_ones(len(ids_NL), self.num_virtual)
        prompts: Any = self.peft_model.get_prompt(batch_size=len(ids_NL))
        mask = torch.cat([seen_NV, mask_NL], dim=1)
        if self.is_prefix:
            return {"input_ids": ids_NL, "attention_mask": mask, "past_key_values": prompts}
        embedded_NLD = self.model.get_input_embeddings()(ids_NL)
        return {
            "inputs_embeds": torch.cat([prompts.to(embedded_NLD.dtype), embedded_NLD], dim=1),
            "attention_mask": mask,
        }

    def classify_rotary(self, batch: PackedBatch, cache: Any) -> None:
        if not self._is_tuned:
            return super().classify_rotary(batch, cache)
        for rotary in self._rotaries:
            is_long_N = torch.tensor(batch.lengths) + self.num_virtual > rotary.short_positions
            num_positions = batch.max_length + self.num_lead
            rotary.is_long_BL = is_long_N[:, None].expand(-1, num_positions).to(self.device)
        return None

    def set_checkpointing(self, enabled: bool, num_layers: int | None = None) -> None:
        """As the base's.

        Raises:
            RecipeError: for a prefix, whose keys and values a recomputed block would not see.
        """
        if enabled and self.is_prefix:
            raise RecipeError(
                "train.gradient_checkpointing: prefix tuning cannot recompute activations",
                "off; if memory is short without it, shorter rows or another method",
                "lower train.max_length, set train.gradient_checkpointing: off, or use `method: prompt`",
            )
        super().set_checkpointing(enabled, num_layers)


def put_into(model: Any, spec: ExclusiveSpec, folder: Path | None, seed: int, *, is_meta: bool = False) -> Any:
    """peft's model of `model` with a fresh adapter, the same for the same seed.

    Raises:
        RecipeError: where peft does not take this base, with peft's reason.
    """
    from peft import get_peft_model

    if spec.peft_type == "BOFT":
        _without_compiling()
    config = make_config(spec, task_type="CAUSAL_LM", total_steps=spec.total_steps, tokenizer=str(folder or "") or None)
    try:
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=is_meta)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        NotImplementedError,
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:
        raise RecipeError(
            f"method: {spec.peft_type.lower()} cannot work on this base: {first_line(error)}",
            "an architecture and fields that peft takes together",
            "change its fields (often target_modules, or a size that must divide the layers')",
        ) from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise RecipeError(
            f"method: with these fields {spec.peft_type.lower()} trains nothing",
            fix="set the fields that say what trains",
        )
    return peft_model


def peft_base(peft_model: Any, folder: Path | None, spec: ExclusiveSpec, num_parameters: int, seed: int) -> PeftBase:
    """The engine's base around peft's model."""
    kind = PromptBase if spec.peft_type in VIRTUAL_TOKENS else InjectedBase
    return kind(peft_model, folder, spec, num_parameters, seed)


def read_peft(model: Any, base_folder: Path, folder: Path) -> PeftBase:
    """A base with an adapter as peft's files hold it, to ask and not to train.

    Raises:
        ModelError: for files that peft does not load over this base.
    """
    from peft import PeftConfig, PeftModel

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    _without_compiling()
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        head = read_head_kind(folder, config.task_type)
        # The engine keeps a classifier's head beside the model, so that bodies are loaded alike.
        config.task_type = "CAUSAL_LM"
        if head is not None:
            config.modules_to_save = [name for name in config.modules_to_save if name != HEAD_NAME] or None
        with _quiet():
            peft_model = PeftModel.from_pretrained(model, str(folder), config=config, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{folder} does not load over this base: {first_line(error)}", "an adapter of peft for this base"
        ) from error
    spec = ExclusiveSpec("peft", peft_type=str(config.peft_type.value))
    if head is not None:
        spec = replace(spec, num_classes=_head_tensors(folder)["weight"].shape[0], head=head)
    base = peft_base(peft_model, base_folder, spec, num_parameters, seed=0)
    _load_head(base.slot, folder)
    return base


def _no_start(spec: ExclusiveSpec) -> str:
    if spec.peft_type == "P_TUNING" or (spec.peft_type == "PREFIX_TUNING" and spec.options.get("prefix_projection")):
        return "holds what the encoder made, and training goes on from the encoder, which peft does not save"
    if spec.peft_type == "ADALORA":
        return "holds the ranks that are left, and AdaLoRA begins with all of them"
    return ""


def _other_method(spec: ExclusiveSpec, folder: Path) -> str:
    found = read_json(folder / CONFIG_FILE).get("peft_type")
    return "" if found == spec.peft_type else f"is of {found}, and the recipe asks for {spec.peft_type}"


def _load_head(slot: OwnSlot, folder: Path) -> None:
    if slot.head is None:
        return
    config = read_json(folder / CONFIG_FILE)
    check_same_head(str(folder), read_head_kind(folder, config.get("task_type")), slot.spec.head)
    tensors, own = _head_tensors(folder), dict(slot.head.named_parameters())
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in own.items()}:
        found = f"{tensors['weight'].shape[0]} classes{', with a bias' if 'bias' in tensors else ''}"
        raise RecipeError(f"start_from: {folder} has {found}", f"{slot.spec.num_classes}, as the data has")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _head_tensors(folder: Path) -> dict[str, Tensor]:
    """The head's weight and, where it has one, bias."""
    from luthier.base.adapter_files import PREFIX, WEIGHTS_FILE
    from luthier.checkpoints.tensor_file import read_tensors

    name = f"{PREFIX}{HEAD_NAME}."
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if f"{name}weight" not in tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no classifier head", f"{name}weight")
    return {key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)}


def _without_compiling() -> None:
    """peft would compile an extension for BOFT's further factors, which are refused; the first needs none."""
    from peft.tuners.boft import layer

    layer._FBD_CUDA = False  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
