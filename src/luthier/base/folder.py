"""What makes a folder a base: config.json, whole safetensors weights, an architecture that needs no code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.errors import ModelError

SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
RESULT_MODEL = "model"
"""Where a run that trained the base's own weights keeps its result, which is a base itself."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the base consists of, by name.

    Raises:
        ModelError: if there are none, if the index does not parse, or if a shard that it names is missing.
    """
    if (folder / SINGLE_WEIGHTS).is_file():
        return [folder / SINGLE_WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise _no_safetensors(folder)
    index = read_json(folder / WEIGHTS_INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{folder / WEIGHTS_INDEX} has no `weight_map`", fix="fetch the base again")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}",
            f"every file that {WEIGHTS_INDEX} names",
            "fetch the base again",
        )
    return [folder / name for name in names]


def check_base_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded safely as a base; reads only small files.

    Raises:
        ModelError: saying what is missing and how to mend it.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "a folder with config.json and safetensors weights")
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    config = read_json(folder / "config.json")
    weight_files(folder)
    if config.get("auto_map"):
        _check_native(folder, config)


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without tokenizer.json.

    Raises:
        ModelError: saying how to make one.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json",
            "the tokenizer in the format of the `tokenizers` library",
            "write it once with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: if it cannot be read, does not parse, or is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "a JSON object in UTF-8", "fetch the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}", "a JSON object", "fetch the file again")
    return value


def _no_config(folder: Path) -> ModelError:
    if (folder / "adapter_config.json").is_file():
        names = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return ModelError(
            f"{folder} is an adapter, not a base" + (f"; it was trained over {names}" if names else ""),
            "a folder with config.json and safetensors weights",
            "name its base under `base`, and this folder under `start_from`",
        )
    if (folder / "adapter" / "adapter_config.json").is_file():
        return ModelError(
            f"{folder} is a run, not a base",
            "a folder with config.json and safetensors weights",
            "export it with `luthier export RUN --merged`, or go on from it with `start_from`",
        )
    return ModelError(
        f"{folder} has no config.json",
        "a model's folder as `save_pretrained` writes it: config.json, *.safetensors, tokenizer.json",
    )


def _no_safetensors(folder: Path) -> ModelError:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.startswith("training_args")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    expected = f"safetensors weights ({SINGLE_WEIGHTS}, or shards with {WEIGHTS_INDEX})"
    if pickles:
        return ModelError(
            f"{folder} has its weights in {pickles[0]}, and loading such a file can run code hidden in it",
            expected,
            "if you trust its author, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the tokenizer likewise",
        )
    if ggufs:
        return ModelError(
            f"{folder} has its weights in {ggufs[0]}",
            expected,
            "fetch the model's own safetensors; GGUF files are for running, not for tuning",
        )
    return ModelError(f"{folder} has no weights", expected, "fetch the base again")


def _check_native(folder: Path, config: dict[str, Any]) -> None:
    """`auto_map` names code in the folder; it is never run, so transformers must know the architecture by itself."""
    # Imported here: it takes seconds, and only such folders need it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{folder} brings its own code for the architecture {config.get('model_type')!r}",
            "an architecture that transformers itself knows; code from a model's folder is never run",
            "choose another base, or install a newer transformers that knows this one",
        )
