"""An adapter in PEFT's files, read without peft, torch or pickle: what it is, over which base, with which tensors.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.base.folder import read_json
from luthier.errors import ModelError, RecipeError
from luthier.methods.file_format import FileFormat, by_pattern
from luthier.methods.formats import FORMATS
from luthier.types import HEAD_SAYINGS, AdapterSpec, HeadKind

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

HEADS: dict[str, HeadKind] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
"""PEFT's task types with a head."""
CLASSIFIER_FOLDER = "classifier"
"""Where a head's config stands, beside the adapter."""
MULTILABEL = "multi_label_classification"
"""transformers' `problem_type` of a head that says any number of labels."""
TASK_TYPES = (None, "CAUSAL_LM", *HEADS)
HEAD_NAMES = ("score", "classifier")
"""What transformers calls the head of a classifier."""
_WRAPPERS = ("modules_to_save", "original_module", "default")
"""What peft may put into the name of a module that is trained in full."""
PARTS_OF_HEADS = (*HEAD_NAMES, "pre_classifier", "pooler", "head")
"""Modules that belong to a head: an encoder's has more than one."""

_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Fields of any method that are read here, or that change nothing once an adapter is trained."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A PEFT adapter's folder, checked.

    Attributes:
        folder: Where both files lie.
        config: adapter_config.json as it is.
        own: The bank's method and its own values, such as a rank.
        base_name: The base it says it was trained over (a Hub id or a path), or None.
        base_revision: That base's revision, or None.
        targets: "all-linear", or module-name suffixes; the modules' own names where the config gives a pattern.
        modules_to_save: Modules trained in full, without the classifier's head.
        new_tokens: Token ids with trained embedding rows.
        task_type: PEFT's, or None.
        num_classes: Rows of the head, or None.
        head: What the head says a class of; None without one.
        shapes: Tensor name as in the file -> its shape.
        dtypes: Tensor name -> the safetensors type, as in "F32".
    """

    folder: Path
    config: dict[str, Any]
    own: AdapterSpec
    base_name: str | None
    base_revision: str | None
    targets: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    new_tokens: tuple[int, ...]
    task_type: str | None
    num_classes: int | None
    head: HeadKind | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS_FILE

    @property
    def method(self) -> str:
        """The bank's method."""
        return self.own.method

    @property
    def format(self) -> FileFormat:
        """How this method's files look."""
        return FORMATS[self.method]

    def layer_spec(self, module: str) -> AdapterSpec:
        """The method's values for one layer: the config's, unless its rank or alpha pattern names the module."""
        rank = by_pattern(self.config.get("rank_pattern"), module, self.own.rank)
        alpha = by_pattern(self.config.get("alpha_pattern"), module, self.own.alpha)
        return replace(self.own, rank=rank, alpha=float(alpha))

    def spec(self) -> AdapterSpec:
        """The slot that this adapter fits into."""
        return replace(
            self.own,
            targets=self.targets,
            modules_to_save=self.modules_to_save,
            new_tokens=self.new_tokens,
            num_classes=self.num_classes,
            head=self.head or "sequence",
        )


def read_adapter(folder: Path) -> AdapterFiles:
    """Read and check a PEFT adapter's folder, or the `adapter` folder inside a run.

    Raises:
        ModelError: for missing or broken files, weights in a pickle, a method or an option that is not known here, or
            tensors that do not agree with the config.
    """
    folder = _adapter_folder(folder)
    config = read_json(folder / CONFIG_FILE)
    form = _format(folder, config)
    shapes, dtypes = _read_header(_weights(folder))
    own = form.spec(str(folder / CONFIG_FILE), config)
    modules = _check_tensors(folder, form, config, shapes)
    task_type = config.get("task_type")
    saved = tuple(config.get("modules_to_save") or ())
    if task_type in HEADS:  # PEFT lists the classifier's head among them
        saved = tuple(name for name in saved if name.rsplit(".", 1)[-1] not in PARTS_OF_HEADS)
    return AdapterFiles(
        folder=folder,
        config=config,
        own=own,
        base_name=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        targets=_targets(folder, config, modules),
        modules_to_save=saved,
        new_tokens=_new_tokens(folder, config),
        task_type=task_type,
        num_classes=_num_classes(folder, shapes) if task_type in HEADS else None,
        head=read_head_kind(folder, task_type),
        shapes=shapes,
        dtypes=dtypes,
    )


def read_head_kind(folder: Path, task_type: str | None) -> HeadKind | None:
    """What the head of an adapter's folder says a class of; None for an adapter without one.

    Args:
        task_type: PEFT's word. Both kinds of heads on whole sequences have one; the classifier's config tells them
            apart, and an adapter from elsewhere without such a config is of one class a sequence.
    """
    kind = HEADS.get(task_type or "")
    config = folder / CLASSIFIER_FOLDER / "config.json"
    if kind == "sequence" and config.is_file() and read_json(config).get("problem_type") == MULTILABEL:
        return "multilabel"
    return kind


def check_same_head(start: str, found: HeadKind | None, asked: HeadKind | None) -> None:
    """Refuse to go on from a head with one of another kind; None stands for no head.

    Raises:
        RecipeError: saying what each of the two says.
    """
    if found is None or asked is None or found == asked:
        return
    raise RecipeError(
        f"start_from: the head of {start} says {HEAD_SAYINGS[found]}, and the recipe's task trains one that says "
        f"{HEAD_SAYINGS[asked]}",
        "an adapter whose head says the same",
        "set the task as it was when the adapter was trained (task.multiple), or leave start_from out to begin anew",
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


def _format(folder: Path, config: dict[str, Any]) -> FileFormat:
    """The method's, once nothing is set that would change its arithmetic."""
    where = folder / CONFIG_FILE
    form = next((form for form in FORMATS.values() if form.claims(config)), None)
    if form is None:
        raise ModelError(
            f"{where} has peft_type {config.get('peft_type')!r}",
            f"an adapter of {', '.join(FORMATS)}",
            "merge it into its base with peft (merge_and_unload), save that, and name the folder under `base`",
        )
    if config.get("task_type") not in TASK_TYPES:
        raise ModelError(f"{where} has task_type {config.get('task_type')!r}", "CAUSAL_LM, SEQ_CLS or null")
    known = _FIELDS | form.fields
    strange = {name: value for name, value in config.items() if name not in known and value} | form.strange(config)
    if strange:
        raise ModelError(
            f"{where} sets " + ", ".join(f"{name}={value!r}" for name, value in sorted(strange.items())),
            f"a plain adapter of {form.method}",
            "merge it into its base with peft (merge_and_unload), save that, and name the folder under `base`",
        )
    return form


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


def _check_tensors(
    folder: Path, form: FileFormat, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The names of the adapted modules, once every one has all its tensors, as the config says."""
    if not shapes:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no tensor", fix="train it again; its saving went wrong")
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for tensor in form.tensors:
            if name.endswith(f".{tensor}"):
                layers.setdefault(name.removesuffix(f".{tensor}"), {})[tensor] = shape
    for name, found in sorted(layers.items()):
        module = name.removeprefix(PREFIX)
        if missing := [tensor for tensor in form.tensors if tensor not in found]:
            raise ModelError(
                f"{folder / WEIGHTS_FILE} holds no {missing[0]} for {module}",
                f"{' and '.join(form.tensors)} for each module",
            )
        form.check(str(folder), config, module, found)
    return tuple(sorted(name.removeprefix(PREFIX) for name in layers))


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
        *parts, kind = (part for part in name.split(".") if part not in _WRAPPERS)
        is_last = parts[-1:] in ([head] for head in HEAD_NAMES) or parts[-2:] == ["classifier", "out_proj"]
        if kind == "weight" and is_last and len(shape) == 2:
            return shape[0]
    raise ModelError(
        f"{folder / WEIGHTS_FILE} holds no classifier head", f"{' or '.join(HEAD_NAMES)} in {WEIGHTS_FILE}"
    )
