"""Base and adapter as one plain transformers folder, which counts only once it has been loaded again and compared.

Shapes: O outputs, I inputs of a linear layer, D hidden size, K trained tokens.

The stages run one after the other, so that no more than one copy of the model is in memory: what base + adapter says on
a few sequences; the merge, on a copy of the base of its own; the same sequences through the export as it was written. A
resident base is never touched.

An adapter over a base in NF4 is merged onto the values that it was trained over: the weights are quantized as in
training, dequantized, and the update is added to that. Onto the weights as they were before quantization it would be
another model.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from luthier.base.adapter_files import read_adapter
from luthier.base.folder import weight_files
from luthier.base.identity import BaseKey, read_trained_over
from luthier.base.load import load_base
from luthier.base.model import DTYPES
from luthier.base.nf4 import dequantize_into
from luthier.checkpoints.peft_format import CLASSIFIER_FOLDER, check_writable, classifier_config, head_kind
from luthier.checkpoints.peft_read import slot_from_adapter
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RunError, StorageError
from luthier.export.compare import Tokens, distance, model_logits, random_sequences, slot_logits
from luthier.export.merge import merge
from luthier.export.nf4_card import nf4_card
from luthier.files import atomic_folder, write_text
from luthier.ops.nf4 import Nf4Weight
from luthier.types import HeadKind

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
GENERATION_FILE = "generation_config.json"

LENGTHS_TOKENS = (4, 17, 40)
"""Of the sequences that are compared."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Most that logits may differ, as a share of their spread, once weights are rounded to a type. Both sides compute in
float32 at least, so that the rounding of weights is all that is seen: a bfloat16 keeps 8 bits, a float16 11, and a deep
model adds the errors up (0.07 seen in bfloat16 with 30 layers). In float64 some models still take their softmax in
float32, and its errors depend on how sequences lie in a batch."""

Say = Callable[[str], None]


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def _tagger() -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification


_AUTO_CLASSES: dict[HeadKind | None, Callable[[], Any]] = {
    None: _causal,
    "sequence": _classifier,
    "multilabel": _classifier,
    "token": _tagger,
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What base + adapter says, and what an export has to say too.

    Attributes:
        sequences: What the models are asked.
        logits: As `slot_logits` gives them.
        columns: Tokens (or classes) that base + adapter knows.
        config: A classifier's config; None for a language model.
        nf4: The base's weights in NF4 by their layer's name; empty where it holds none.
    """

    sequences: list[Tokens]
    logits: list[Tensor]
    columns: Tensor
    config: Any
    nf4: Mapping[str, Nf4Weight] = field(default_factory=dict)

    def told_by(self, model: Any) -> Expected:
        """The same questions, with what `model` says to them."""
        classifies = head_kind(self.config) in ("sequence", "multilabel")
        return replace(self, logits=model_logits(model, self.sequences, classifies=classifies))

    def check(self, model: Any, dtype: torch.dtype, what: str) -> None:
        """Refuse a model that differs by more than the rounding of weights to `dtype` explains.

        Raises:
            ModelError: saying by how much.
        """
        far = distance(self.logits, self.told_by(model).logits, self.columns)
        if not far <= TOLERANCES[dtype]:  # so written that NaN is refused
            raise ModelError(
                f"{what} differs from base and adapter by {far:.2g} of the logits' spread, so it was thrown away",
                f"at most {TOLERANCES[dtype]:g} in {str(dtype).removeprefix('torch.')}",
                "export with --dtype float32; if it differs still, use the adapter itself through peft, and report it",
            )


def export_merged(
    base_folder: Path,
    adapter_folder: Path,
    output: Path,
    *,
    dtype: str | None = None,
    on_progress: Say | None = None,
) -> Path:
    """Write base and adapter as one model that transformers loads by itself, and prove that it is the same model.

    A language model loads with `AutoModelForCausalLM`, a classifier with `AutoModelForSequenceClassification`, a
    tagger with `AutoModelForTokenClassification`; the tokenizer, chat template and stop tokens come from
    the adapter's folder, else from the base's.

    Args:
        base_folder: The base's folder; read only.
        adapter_folder: PEFT's files, or a run's folder with an `adapter` in it.
        output: Missing or empty. It appears whole, or not at all.
        dtype: "float32", "bfloat16", "float16" or "float64"; None takes the type that the base is stored in.
        on_progress: Hears of each stage.

    Returns:
        `output`.

    Raises:
        ModelError: for an adapter that does not fit the base, or an export whose logits differ; nothing is left then.
        RunError: for an output that is not empty, or an unknown dtype.
        StorageError: where writing fails; nothing is left then.
    """
    say = on_progress or (lambda message: None)
    check_free(output)
    files = read_adapter(adapter_folder)
    saved_dtype = stored_dtype(base_folder, dtype)
    key = read_trained_over(files.folder)
    is_nf4 = key is not None and key.quantization == "nf4"
    # bitsandbytes computes in float32 at most.
    wide = torch.float32 if is_nf4 else torch.promote_types(saved_dtype, torch.float32)
    say("Reading what base and adapter say")
    slot, expected = _tuned(base_folder, files.folder, wide, key if is_nf4 else None)
    say("Merging onto the dequantized base" if is_nf4 else "Merging")
    model = load_plain(base_folder, wide, expected.config)
    dequantize_into(model, expected.nf4)
    merge(model, slot)
    tokenizer = files.folder if (files.folder / "tokenizer.json").is_file() else base_folder
    card = nf4_card(key) if key is not None and is_nf4 else None
    return write_checked(model, expected, saved_dtype, output, tokenizer, (files.folder, base_folder), say, card)


def write_checked(
    model: Any,
    expected: Expected,
    saved_dtype: torch.dtype,
    output: Path,
    tokenizer: Path,
    generation: tuple[Path, ...],
    say: Say,
    card: str | None = None,
) -> Path:
    """Round a model, write it, load it again, and hold it against what it should say at each turn.

    Args:
        model: In float32 or wider; rounded in place.
        tokenizer: The folder whose tokenizer and chat template go along.
        generation: Folders that may hold stop tokens, the first that does wins.
        card: What the export's README.md says, where there is one.

    Raises:
        ModelError: where it says something else; nothing is left then.
    """
    wide = torch.promote_types(saved_dtype, torch.float32)
    expected.check(model, wide, "the merged model")
    _round(model, saved_dtype)
    narrow = min(saved_dtype, wide, key=lambda dtype: dtype.itemsize)
    expected.check(model, narrow, f"the merged model in {str(saved_dtype).removeprefix('torch.')}")
    # The files are held against the rounded model, so that what is written is checked tightly in any type.
    rounded = expected.told_by(model)
    with atomic_folder(output) as temporary:
        say("Writing")
        _save(model.to(saved_dtype), temporary)
        del model
        _copy_tokenizer(tokenizer, temporary)
        _copy_generation(generation, temporary)
        if card is not None:
            write_text(temporary / "README.md", card)
        say("Loading the export again and comparing")
        again = load_plain(temporary, wide, kind=head_kind(expected.config))
        rounded.check(again, wide, f"the export {output}")
    return output


def check_free(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        RunError: when `output` is a file or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output} is not empty", "a new or empty folder", "choose another with --output")


# -- stages


def _tuned(base_folder: Path, adapter_folder: Path, wide: torch.dtype, nf4: BaseKey | None) -> tuple[Slot, Expected]:
    """The slot, and what base + adapter says.

    Args:
        nf4: The base that the adapter was trained over, if it was in NF4.
    """
    if nf4 is None:
        base = load_base(base_folder, dtype=wide)
    else:
        base = load_base(base_folder, dtype=wide, quantization="nf4", quantized_from=nf4.dtype)
    slot = slot_from_adapter(base, adapter_folder)
    config, pad_token = None, None
    num_columns, own = base.vocabulary_size, list(slot.token_rows.ids_K) if slot.token_rows is not None else []
    if slot.head is not None:
        check_writable(slot, base)
        config = _classifier_config(base, slot, adapter_folder)
        assert slot.spec.num_classes is not None
        pad_token, num_columns = config.get_text_config().pad_token_id, slot.spec.num_classes
    lengths = [min(length, base.max_positions or length) for length in LENGTHS_TOKENS]
    ids = [int(token) for token in own]
    # Short and random alike, and once more with the slot's own tokens.
    sequences = random_sequences(lengths, base.vocabulary_size, avoid=pad_token)
    if ids:
        sequences += random_sequences(lengths, base.vocabulary_size, include=[i for i in ids if i != pad_token])
    new_columns = [token for token in ids if token >= num_columns] if slot.head is None else []
    columns = torch.tensor([*range(num_columns), *new_columns])
    return slot, Expected(sequences, slot_logits(base, slot, sequences), columns, config, base.nf4_weights)


def _classifier_config(base: Any, slot: Slot, adapter_folder: Path) -> Any:
    from transformers import AutoConfig

    assert slot.spec.num_classes is not None
    if (adapter_folder / CLASSIFIER_FOLDER / "config.json").is_file():
        config = AutoConfig.from_pretrained(adapter_folder, subfolder=CLASSIFIER_FOLDER, local_files_only=True)
        if config.num_labels != slot.spec.num_classes:
            raise ModelError(
                f"{adapter_folder / CLASSIFIER_FOLDER} names {config.num_labels} classes",
                f"{slot.spec.num_classes}, as the head has",
            )
        return config
    return classifier_config(base, slot.spec.num_classes, kind=slot.spec.head)


def load_plain(folder: Path, dtype: torch.dtype, config: Any = None, *, kind: HeadKind | None = None) -> Any:
    """A model of its own, as a user loads the folder. With a classifier's `config`, its head is yet to be filled.

    Args:
        kind: What the head of the folder's model says a class of; None for a language model. A `config` says it itself.
    """
    from transformers import logging

    auto_class = _AUTO_CLASSES[head_kind(config) if config is not None else kind]()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the classifier's head is missing in the base by intent
    try:
        model = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **({"config": copy.deepcopy(config)} if config is not None else {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} does not load: {error}", "a model that transformers knows") from error
    finally:
        logging.set_verbosity(level)
    return model.eval()


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all that is saved as if it had been saved in `dtype`; `model.to` would round the rotary frequencies too."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _save(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate():
        model.generation_config = GenerationConfig()  # the right one is copied, whatever transformers thinks of it
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, as safetensors puts it
        raise StorageError(
            f"{folder} could not be written: {error}", "room and permission to write there", "free some space"
        ) from error
    (folder / GENERATION_FILE).unlink(missing_ok=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _copy_generation(sources: tuple[Path, ...], target: Path) -> None:
    found = next((source for source in sources if (source / GENERATION_FILE).is_file()), None)
    if found is not None:
        shutil.copyfile(found / GENERATION_FILE, target / GENERATION_FILE)


def stored_dtype(base_folder: Path, asked: str | None) -> torch.dtype:
    if asked is not None:
        if asked not in DTYPES:
            raise RunError(f"dtype is {asked!r}", f"one of {', '.join(DTYPES)}", "choose one with --dtype")
        return DTYPES[asked]
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    with safe_open(weight_files(base_folder)[0], framework="pt") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    # The narrowest that is there: single tensors, such as norms, may be kept wider.
    found = next((names[name] for name in ("BF16", "F16", "F32", "F64") if name in stored), "float32")
    return DTYPES[found]
