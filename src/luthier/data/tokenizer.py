"""Reading the tokenizer files of a model folder, and writing them so that transformers reads the same.

Only `tokenizers` is used: transformers' AutoTokenizer imports torch, and a file check must not wait for that.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from luthier.data.encoders import is_encoder, num_positions
from luthier.errors import ModelError, StorageError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The named special tokens, which chat templates see under these names."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokens.

    Attributes:
        tokenizer: The tokenizer, with every special token known to it, without truncation or padding.
        special_tokens: Name ("eos_token") -> token text.
        templates: Name -> chat template source; "default" and possibly "tool_use". Empty where the base has none.
        eos_ids: Ids at which generation_config.json and config.json say that generation ends.
        pad_id: The padding id that config.json names, if any.
        settings: tokenizer_config.json as it was read.
        generation: generation_config.json as it was read.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    templates: dict[str, str]
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json and its neighbours from a model folder.

    Raises:
        ModelError: where tokenizer.json is missing or a file does not hold what its name says.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"there is no tokenizer.json in {folder}",
            "a model folder with a fast tokenizer",
            "take tokenizer.json from the same model, or save it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read: {error}", "a tokenizer.json of the tokenizers library") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(settings, _read_json(folder / "special_tokens_map.json"))
    config = _read_json(folder / "config.json")
    if is_encoder(config):
        special_tokens = _special_tokens_of_encoder(tokenizer, config) | special_tokens
        settings = settings | _longest_text(settings, config)
    _add_declared_tokens(tokenizer, settings, special_tokens)
    config = {**config, **(config.get("text_config") or {})}
    generation = _read_json(folder / "generation_config.json")
    eos_ids = [*_as_ids(generation.get("eos_token_id")), *_as_ids(config.get("eos_token_id"))]
    pad_ids = _as_ids(config.get("pad_token_id"))
    return TokenizerFiles(
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        templates=_read_templates(folder, settings),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        pad_id=pad_ids[0] if pad_ids else None,
        settings=settings,
        generation=generation,
    )


def write_tokenizer(folder: Path, files: TokenizerFiles, stop_ids: Sequence[int]) -> None:
    """Write the tokenizer, its settings, the chat template and the ids at which generation stops.

    `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids and the same chat text. The class is written
    as the generic fast tokenizer: it takes tokenizer.json as it stands, while model-specific classes rebuild parts.

    Raises:
        StorageError: where writing fails; a file that was there before is then still whole.
    """
    left_out = {"chat_template", "auto_map", "added_tokens_decoder", "name_or_path", "is_local", "local_files_only"}
    settings = {key: value for key, value in files.settings.items() if key not in left_out}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **files.special_tokens}
    texts = {
        "tokenizer.json": files.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": _to_json(settings),
        "special_tokens_map.json": _to_json(files.special_tokens),
        "generation_config.json": _to_json({**files.generation, "eos_token_id": list(stop_ids)}),
    }
    for name, template in files.templates.items():
        texts["chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"] = template
    for name, text in texts.items():
        _write_text(folder / name, text)


def _special_tokens(settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    # special_tokens_map.json is the older place; transformers reads it only where the newer one is not in use.
    found = dict(settings) if "added_tokens_decoder" in settings else {**settings, **special_map}
    texts = {name: _token_text(found.get(name)) for name in SPECIAL_NAMES}
    return {name: text for name, text in texts.items() if text}


def _special_tokens_of_encoder(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that an encoder's tokenizer puts around a text and pads it with.

    Many such folders name none: transformers knows them by the tokenizer's class.
    """
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    found: dict[str, str] = {}
    if len(full) == len(bare) + 2 and full[1:-1] == bare:
        ends = {"cls_token": tokenizer.id_to_token(full[0]), "sep_token": tokenizer.id_to_token(full[-1])}
        found |= {name: text for name, text in ends.items() if text is not None}
    padding = config.get("pad_token_id")
    if isinstance(padding, int) and (text := tokenizer.id_to_token(padding)):
        found["pad_token"] = text
    for name, texts in (("mask_token", ("[MASK]", "<mask>")), ("unk_token", ("[UNK]", "<unk>"))):
        if known := [text for text in texts if tokenizer.token_to_id(text) is not None]:
            found[name] = known[0]
    return found


def _longest_text(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """`model_max_length`, where the base has fewer positions than its tokenizer says."""
    positions, said = num_positions(config), settings.get("model_max_length")
    if positions is None or (isinstance(said, int) and said <= positions):
        return {}
    return {"model_max_length": positions}


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, Mapping) else value if isinstance(value, str) else None


def _add_declared_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Make the tokenizer know tokens that only its settings declare, as transformers does."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = settings.get("added_tokens_decoder") or {}
    for _, value in sorted(declared.items(), key=lambda item: int(item[0])):
        if value["content"] not in known:
            flags = {key: bool(value.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_tokens([AddedToken(value["content"], special=bool(value.get("special")), **flags)])
            known.add(value["content"])
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, Mapping) else extra
    for text in [*special_tokens.values(), *(_token_text(token) for token in extra)]:
        if text and text not in known:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            known.add(text)


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        templates |= {entry["name"]: entry["template"] for entry in inside}
    elif isinstance(inside, Mapping):
        templates |= dict(inside)
    # Files of their own take the place of what the settings hold, all of it, as in transformers.
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return templates


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [int(entry) for entry in values if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", "a JSON object", "copy the file anew from the base"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}", "a JSON object", "copy the file anew from the base")
    return value


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=_token_text) + "\n"


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}", fix="free some space or choose another folder"
        ) from None
