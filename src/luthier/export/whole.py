"""Exports of exclusive runs: a trained model in another precision, or a base with an adapter that peft merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.base.adapter_files import CONFIG_FILE
from luthier.base.folder import read_json
from luthier.base.model import DTYPES
from luthier.checkpoints.peft_format import head_kind
from luthier.checkpoints.peft_names import HEAD
from luthier.errors import ModelError
from luthier.export.compare import Tokens, random_sequences, slot_logits
from luthier.export.merged import LENGTHS_TOKENS, Expected, Say, check_free, load_plain, stored_dtype, write_checked
from luthier.methods.formats import FORMATS
from luthier.methods.peft.fields import VIRTUAL_TOKENS, first_line
from luthier.methods.peft.layer import PeftBase, read_peft


def is_of_peft(adapter: Path) -> bool:
    """Whether an adapter's files are of a method that only peft knows."""
    if not (adapter / CONFIG_FILE).is_file():
        return False
    config = read_json(adapter / CONFIG_FILE)
    return "peft_type" in config and not any(form.claims(config) for form in FORMATS.values())


def export_model(folder: Path, output: Path, *, dtype: str | None = None, on_progress: Say | None = None) -> Path:
    """Write a trained model once more, in another precision; arguments, result and errors as `export_merged`."""
    say = on_progress or (lambda message: None)
    check_free(output)
    saved_dtype = stored_dtype(folder, dtype)
    wide = torch.promote_types(saved_dtype, torch.float32)
    config = _config(folder)
    kind = head_kind(config)
    model = load_plain(folder, wide, kind=kind)
    sequences = _sequences(config)
    columns = torch.arange(config.num_labels if kind else model.get_input_embeddings().weight.shape[0])
    expected = Expected(sequences, [], columns, config if kind else None).told_by(model)
    return write_checked(model, expected, saved_dtype, output, folder, (folder,), say)


def export_peft_merged(
    base_folder: Path, adapter: Path, output: Path, *, dtype: str | None = None, on_progress: Say | None = None
) -> Path:
    """Write base and adapter as one model, merged by peft; arguments, result and errors as `export_merged`."""
    say = on_progress or (lambda message: None)
    check_free(output)
    kind = str(read_json(adapter / CONFIG_FILE).get("peft_type"))
    if kind in VIRTUAL_TOKENS:
        raise ModelError(
            f"{adapter} is of {kind.lower()}: its virtual tokens stand beside the weights, not in them",
            "an adapter that changes weights",
            "use the adapter itself through peft",
        )
    saved_dtype = stored_dtype(base_folder, dtype)
    wide = torch.promote_types(saved_dtype, torch.float32)
    wide_name = next(name for name, value in DTYPES.items() if value == wide)
    say("Reading what base and adapter say")
    base = read_peft(load_plain(base_folder, wide), base_folder, adapter)
    sequences = _sequences(base.config)
    logits = slot_logits(base, base.slot, sequences)
    config = None
    columns = torch.arange(base.vocabulary_size)
    if base.slot.head is not None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(adapter, subfolder="classifier", local_files_only=True)
        columns = torch.arange(config.num_labels)
    expected = Expected(sequences, logits, columns, config)
    say(f"Merging in {wide_name}")
    model = _merged(base, base_folder, wide, config)
    tokenizer = adapter if (adapter / "tokenizer.json").is_file() else base_folder
    return write_checked(model, expected, saved_dtype, output, tokenizer, (adapter, base_folder), say)


def _merged(base: PeftBase, base_folder: Path, wide: torch.dtype, config: Any) -> Any:
    """A plain model with the merged weights; the engine's own wrappings are left behind."""
    merge = getattr(base.peft_model, "merge_and_unload", None)
    try:
        if merge is None:
            raise NotImplementedError("peft has no merge for it")
        merged = merge()
    except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"an adapter of {base.slot.spec.peft_type.lower()} does not merge into its base: {first_line(error)}",
            "a method whose change is one of weights",
            "use the adapter itself through peft",
        ) from error
    state = merged.state_dict()
    if base.slot.head is not None:
        state |= {f"{HEAD}.{name}": parameter.detach() for name, parameter in base.slot.head.named_parameters()}
    plain = load_plain(base_folder, wide, config)
    own = plain.state_dict()
    plain.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items() if name in own}, strict=True)
    return plain


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _sequences(config: Any) -> list[Tokens]:
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    lengths = [min(length, most or length) for length in LENGTHS_TOKENS]
    return random_sequences(lengths, text.vocab_size, avoid=text.pad_token_id)
