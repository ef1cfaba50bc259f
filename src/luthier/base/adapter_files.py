"""An adapter in PEFT's files, read without peft, torch or pickle: what it is, over which base, with which tensors.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.base.folder import read_json
from luthier.errors import ModelError
from luthier.types import AdapterSpec

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

METHODS = {"LORA": "lora"}
"""`peft_type` -> the bank's method."""

TASK_TYPES = (None, "CAUSAL_LM", "SEQ_CLS")
HEAD_NAMES = ("score", "classifier")
"""What transformers calls the head of a sequence classifier."""

_UNDERSTOOD_FIELDS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)
"""Fields that are read here, or that change nothing once an adapter is trained. Any other that is set is refused: it
would change the arithmetic (use_dora, fan_in_fan_out ...)."""

_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base as it is; pissa, olora, corda, loftq and lora_ga change it."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A PEFT adapter's folder, checked.

    Attributes:
        folder: Where both files lie.
        config: adapter_config.json as it is.
        method: The bank's method ("lora").
        base_name: The base it says it was trained over (a Hub id or a path), or None.
        base_revision: That base's revision, or None.
        targets: "all-linear", or module-name suffixes; the modules' own names where the config gives a pattern.
        modules_to_save: Modules trained in full, without the classifier's head.
        new_tokens: Token ids with trained embedding rows.
        task_type: PEFT's, or None.
        num_classes: Rows of the sequence head, or None.
        shapes: Tensor name as in the file -> its shape.
        dtypes: Tensor name -> the safetensors type, as in "F32".
    """

    folder: Path
    config: dict[str, Any]
    method: str
    base_name: str | None
    base_revision: str | None
    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    targets: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    new_tokens: tuple[int, ...]
    task_type: str | None
    num_classes: int | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS_FILE

    def rank_of(self, module: str) -> int:
        """Rank of one module's update: the config's, unless its `rank_pattern` names the module."""
        return _by_pattern(self.config.get("rank_pattern"), module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Numerator of one module's scaling, likewise."""
        return float(_by_pattern(self.config.get("alpha_pattern"), module, self.alpha))

    def spec(self) -> AdapterSpec:
        """The slot that this adapter fits into."""
        return AdapterSpec(
            method=self.method,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            targets=self.targets,
            modules_to_save=self.modules_to_save,
            new_tokens=self.new_tokens,
            num_classes=self.num_classes,
        )


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check a PEFT adapter's folder, or the `adapter` folder inside a run.

    Raises:
        ModelError: for missing or broken files, weights in a pickle, a method or an option that is not known here, or
            tensors that do not agree with the config.
    """
    folder = _adapter_folder(folder)
    config = read_json(folder / CONFIG_FILE)
    _check_known(folder, config)
    shapes, dtypes = _read_header(_weights(folder))
    rank = _number(folder, config, "r", int)
    modules = _check_tensors(folder, shapes, rank, config.get("rank_pattern"))
    task_type = config.get("task_type")
    saved = tuple(config.get("modules_to_save") or ())
    if task_type == "SEQ_CLS":  # PEFT lists the classifier's head among them
        saved = tuple(name for name in saved if name not in HEAD_NAMES)
    return AdapterFiles(
        folder=folder,
        config=config,
        method=METHODS[config["peft_type"]],
        base_name=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        rank=rank,
        alpha=float(_number(folder, config, "lora_alpha", int | float)),
        dropout=float(config.get("lora_dropout") or 0.0),
        rank_stabilized=bool(config.get("use_rslora")),
        targets=_targets(folder, config, modules),
        modules_to_save=saved,
        new_tokens=_new_tokens(folder, config),
        task_type=task_type,
        num_classes=_num_classes(folder, shapes) if task_type == "SEQ_CLS" else None,
        shapes=shapes,
        dtypes=dtypes,
    )


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "a PEFT adapter's folder, or a run's", "check the path")
    raise ModelError(
        f"{folder} has no {CONFIG_FILE}",
        f"an adapter as PEFT saves it: {CONFIG_FILE} and {WEIGHTS_FILE}",
        "a whole model goes under `base`" if (folder / "config.json").is_file() else "check the path",
    )


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder} has its weights in adapter_model.bin, and loading such a file can run code hidden in it",
            WEIGHTS_FILE,
            "if you trust its author, convert it once with peft: load it with PeftModel.from_pretrained and save it "
            "with save_pretrained, which writes safetensors",
        )
    raise ModelError(f"{folder} has no {WEIGHTS_FILE}", f"{CONFIG_FILE} and {WEIGHTS_FILE} side by side")


def _check_known(folder: Path, config: dict[str, Any]) -> None:
    where = folder / CONFIG_FILE
    if config.get("peft_type") not in METHODS:
        raise ModelError(f"{where} has peft_type {config.get('peft_type')!r}", f"one of {', '.join(METHODS)}")
    if config.get("task_type") not in TASK_TYPES:
        raise ModelError(f"{where} has task_type {config.get('task_type')!r}", "CAUSAL_LM, SEQ_CLS or null")
    strange = {name: value for name, value in config.items() if name not in _UNDERSTOOD_FIELDS and value}
    if config.get("bias", "none") != "none":
        strange["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        strange["init_lora_weights"] = config["init_lora_weights"]
    if strange:
        raise ModelError(
            f"{where} sets " + ", ".join(f"{name}={value!r}" for name, value in sorted(strange.items())),
            "a plain LoRA adapter",
            "merge it into its base with peft (merge_and_unload), save that, and name the folder under `base`",
        )


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}", fix="fetch or train it again") from None
    return shapes, dtypes


def _check_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int, pattern: Any) -> tuple[str, ...]:
    """The names of the adapted modules, once every one has both factors in the rank that the config says."""
    pairs = {name.removesuffix(".lora_A.weight") for name in shapes if name.endswith(".lora_A.weight")}
    halves = {name.removesuffix(".lora_B.weight") for name in shapes if name.endswith(".lora_B.weight")}
    if not shapes:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no tensor", fix="train it again; its saving went wrong")
    if odd := sorted(pairs ^ halves):
        raise ModelError(f"{folder / WEIGHTS_FILE} holds half a pair for {odd[0]}", "lora_A and lora_B for each module")
    for name in sorted(pairs):
        found = shapes[f"{name}.lora_A.weight"][0], shapes[f"{name}.lora_B.weight"][1]
        expected = _by_pattern(pattern, name, rank)
        if found != (expected, expected):
            raise ModelError(
                f"{folder}: {name} has rank {found[0]} and {found[1]}", f"{expected}, as {CONFIG_FILE} says"
            )
    return tuple(sorted(name.removeprefix(PREFIX) for name in pairs))


def _by_pattern(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    for end, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({end})$", module):
            return value
    return default


def _targets(folder: Path, config: dict[str, Any], modules: tuple[str, ...]) -> str | tuple[str, ...]:
    targets = config.get("target_modules")
    if targets == "all-linear":
        return "all-linear"
    if targets is None:
        return ()
    if isinstance(targets, str) or config.get("layers_to_transform") is not None:
        return modules  # a pattern: the tensors say what it matched
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        return tuple(sorted(targets))
    raise ModelError(
        f"{folder / CONFIG_FILE} has target_modules {targets!r}", 'a list of module names, a pattern, or "all-linear"'
    )


def _new_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Every token with a trained row, of the embedding or of the output layer."""
    tokens = config.get("trainable_token_indices") or ()
    groups = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    try:
        return tuple(sorted({int(token) for group in groups for token in group}))
    except (TypeError, ValueError):
        raise ModelError(
            f"{folder / CONFIG_FILE} has trainable_token_indices {tokens!r}", "token ids, or module names with them"
        ) from None


def _num_classes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[-1] == "weight" and any(head in parts for head in HEAD_NAMES) and len(shape) == 2:
            return shape[0]
    raise ModelError(
        f"{folder / WEIGHTS_FILE} holds no classifier head", f"{' or '.join(HEAD_NAMES)} in {WEIGHTS_FILE}"
    )


def _number(folder: Path, config: dict[str, Any], name: str, kind: Any) -> Any:
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{folder / CONFIG_FILE} has {name} = {value!r}", "a positive number")
    return value
