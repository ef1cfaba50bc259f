"""From a GGUF file to a plain folder: safetensors in float32, tokenizer.json, chat template, configs.

transformers dequantizes the tensors, and puts Llama's interleaved query and key rows back in order. The tokenizer is
built here from the file's own vocabulary and merges: the pre-tokenizer is named in `tokenizer.ggml.pre`, and a generic
GPT-2 one in its place would split digits and spaces otherwise than the model was trained.
The file's format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from luthier.errors import ModelError

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
"""Values of `tokenizer.ggml.token_type`."""

TENSOR_NAMES = "tensor names"

Metadata = dict[str, Any]


def convert_gguf(gguf: Path, folder: Path, on_progress: Callable[[str], None] | None = None) -> None:
    """Write `folder` as a plain base that transformers loads without knowing of GGUF.

    Args:
        gguf: A GGUF file of a Llama-shaped model with a byte-level BPE.
        folder: Written into; made if missing. The caller moves it into place once it is whole.

    Raises:
        ModelError: for another architecture, tokenizer or pre-tokenizer than those known here.
    """
    say = on_progress or (lambda _: None)
    metadata = read_metadata(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(metadata, folder)
    say("converting the weights to safetensors (once)")
    _write_model(gguf, metadata, folder)


def read_metadata(gguf: Path) -> Metadata:
    """Every key of the file's header with its value, and under `TENSOR_NAMES` the names of its tensors.

    Raises:
        ModelError: if the file is not a GGUF, or not of a shape known here.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(gguf))
        metadata: Metadata = {name: field.contents() for name, field in reader.fields.items()}
        metadata[TENSOR_NAMES] = {tensor.name for tensor in reader.tensors}
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(f"{gguf.name} cannot be read as GGUF: {error}", fix="fetch the file again") from error
    _check_known(gguf, metadata)
    return metadata


def _check_known(gguf: Path, metadata: Metadata) -> None:
    known = {
        "general.architecture": ("llama",),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": tuple(_PRE_TOKENIZERS),
    }
    for key, values in known.items():
        if metadata.get(key) not in values:
            raise ModelError(
                f"{gguf.name} has {key} = {metadata.get(key)!r}",
                f"one of {', '.join(values)}",
                "use the model's own safetensors folder as the base",
            )


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _smollm_pre_tokenizer,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The byte-level BPE that the file describes, special tokens included. It prepends nothing by itself."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [_split_merge(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED_TOKEN:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them.

    Raises:
        ModelError: if the file asks for a BOS before every text, which no model known here does.
    """
    if metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_eos_token"):
        raise ModelError(
            "the GGUF's tokenizer adds tokens around every text",
            "a byte-level BPE that adds none",
            "use the model's own safetensors folder as the base",
        )
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{name}_token"] = None if index is None else tokens[index]
    config["model_max_length"] = metadata["llama.context_length"]
    config["clean_up_tokenization_spaces"] = False
    _write_json(folder / "tokenizer_config.json", config)
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


# --- weights and configs ----------------------------------------------------------------------------------------------


def _write_model(gguf: Path, metadata: Metadata, folder: Path) -> None:
    """Save model.safetensors, config.json and generation_config.json."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    config = _plain_config(metadata)
    with _no_progress_bars():
        # With a config at hand the file's header is not parsed once more, which takes longer than its tensors.
        loaded = LlamaForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, config=copy.deepcopy(config), dtype=torch.float32
        )
    # A model that came from GGUF carries a quantization config and refuses to be saved; a plain twin does not.
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    plain.generation_config = GenerationConfig(**ends)
    with _no_progress_bars():
        plain.save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _plain_config(metadata: Metadata) -> Any:
    from transformers import LlamaConfig

    def number(key: str) -> Any:
        return metadata[f"llama.{key}"]

    def token(key: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{key}_token_id")

    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        # The header keeps float32; the model's own config says 1e-05.
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(number("rope.freq_base"))},
        tie_word_embeddings="output.weight" not in metadata[TENSOR_NAMES],
        bos_token_id=token("bos"),
        eos_token_id=token("eos"),
        pad_token_id=token("padding"),
        dtype="float32",
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
