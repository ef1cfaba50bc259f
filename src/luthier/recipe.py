"""The recipe: everything that a run is, in one small typed file.

`JobSpec` is what an API accepts: base, task, method, train, judge. It holds no path. `Recipe` adds what only a file on
your own machine can say: data paths, the starting adapter, the device and the output folder. Both are strict: an
unknown field is an error that names its nearest neighbour.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from luthier.compute import ComputeConfig, filled_from_file
from luthier.errors import RecipeError, nearest
from luthier.methods.config import MethodConfig
from luthier.strict import Strict
from luthier.tasks.config import TaskConfig
from luthier.types import LEAST_MICRO_BATCH_TOKENS, OptimizerName, TrainSpec

Model = TypeVar("Model", bound=BaseModel)

MAX_SEED = 2**63 - 1
"""The largest that torch's generators take."""


class ReplayConfig(Strict):
    """General text that `task: text` mixes into its training, so that the model forgets less of what it could do."""

    file: str | list[str] = Field(min_length=1)
    """One file or several of texts, as `data.train` takes them."""
    share: float = Field(default=0.1, gt=0, le=0.9)
    """The replayed text's share of the tokens that an epoch trains on."""
    validation: float = Field(default=0.1, ge=0, le=0.5)
    """The share of its rows that is held out, to measure what of the general ability is kept."""


class DataConfig(Strict):
    """Where the examples are, and how their columns map onto the task's record."""

    train: str | list[str] = Field(min_length=1)
    """One file or several: .jsonl, .json, .csv, .tsv, .parquet, or .txt for `task: text`."""
    validation: float | str | None = 0.1
    """A share of the training rows to hold out (0 to 0.5), a file, or null for none."""
    format: Literal[
        "auto",
        "chat",
        "prompt",
        "instruction",
        "sharegpt",
        "dpo",
        "preference",
        "qa",
        "translation",
        "tokens",
        "spans",
        "abc",
        "svg",
        "text",
        "classification",
    ] = "auto"
    """How rows are shaped; `auto` recognizes it from the columns."""
    fields: dict[str, str] = Field(default_factory=dict)
    """The task's field name -> the file's column name, where they differ, as in {prompt: question}."""
    template: dict[str, str] = Field(default_factory=dict)
    """The task's field name -> a jinja2 template over the columns, as in {prompt: "Q: {{ question }}\\nA:"}."""
    replay: ReplayConfig | None = None
    """With `task: text`: general text against forgetting; null for none."""

    @field_validator("validation")
    @classmethod
    def _share_in_range(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0.0 <= value <= 0.5:
            raise ValueError("a share of rows lies between 0 and 0.5")
        return value


class TrainConfig(Strict):
    """How the job learns."""

    epochs: float = Field(default=2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(default=16, ge=1)
    """Examples in one optimizer step, however it is split for memory."""
    micro_batch_tokens: int | None = Field(default=None, ge=LEAST_MICRO_BATCH_TOKENS)
    """Most tokens in one forward of this job; null lets the memory prediction choose."""
    optimizer: OptimizerName = "adamw"
    """adamw; with its moments in 8 bits; paged to the host when a GPU's memory is short; or both (luthier[qlora])."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """The schedule's floor, as a share of `learning_rate`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two averaging coefficients."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator constant."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the job's gradient to this 2-norm; 0 does not clip."""
    max_length: int = Field(default=2048, ge=8)
    """Most tokens in one example; `truncation` says what happens past it."""
    truncation: Literal["error", "drop", "end", "start"] = "end"
    """A longer example is an error, left out, or cut at its end or start. One left without a label is never trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The frozen base's precision; auto is bfloat16 on a GPU and float32 on a CPU. Adapters stay float32."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward; auto turns it on when memory would not suffice."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better validation loss; null never stops early."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, rather than the last."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; null means once an evaluation."""
    seed: int = Field(default=42, ge=0, le=MAX_SEED)
    """Seeds the adapter, the order of the data, the split and dropout."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError("each of the two lies from 0 to below 1")
        return value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `on` as true.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    def spec(self) -> TrainSpec:
        """The part of this section that the engine reads."""
        names = TrainSpec.__dataclass_fields__
        return TrainSpec(**{name: getattr(self, name) for name in names})


class EvaluationConfig(Strict):
    """How base and tuned model are judged on held-out rows."""

    rows: int | None = Field(default=None, ge=0)
    """Held-out rows to judge on; null chooses a number that costs less than the training; 0 does not judge."""
    generate: bool = True
    """Also generate replies and compare them with the references."""
    generate_rows: int | None = Field(default=None, ge=0)
    """Rows to generate for, of those judged; null chooses so that it costs less than the training."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest reply generated while judging."""
    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between validation losses; null means twice an epoch."""
    shots: int = Field(default=0, ge=0)
    """Also judge the base with this many training examples in its prompt."""


class JobSpec(Strict):
    """One fine-tuning job without any path: what the API accepts."""

    format: Literal[1] = 1
    """Version of this format."""
    base: str = "smollm2-135m-instruct"
    """A catalogue name, a Hub id, or (in a recipe) a folder."""
    task: TaskConfig = Field(default="chat", validate_default=True)  # type: ignore[assignment]
    """What is learnt: chat, completion, preference, qa, translation, text, classification, tagging, music or art; a
    name, or a mapping with `type` and options."""
    method: MethodConfig = Field(default="lora", validate_default=True)  # type: ignore[assignment]
    """How weights change; a name, or a mapping with `type` and options."""
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("task", "method", mode="before")
    @classmethod
    def _name_is_a_type(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _lora_unless_named(cls, value: Any) -> Any:
        return {"type": "lora", **value} if isinstance(value, dict) else value


class Recipe(JobSpec):
    """A job on your own machine: a JobSpec with its data, starting point, compute and output."""

    data: DataConfig
    start_from: str | None = None
    """A PEFT adapter's folder or an earlier run to go on from."""
    compute: ComputeConfig = ComputeConfig()
    output: str = "runs/first"
    """The run folder to write. It must be new, or hold a run to resume."""

    def to_yaml(self) -> str:
        """The whole recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: A YAML or JSON file's path, a mapping, or a Recipe. Relative data paths in a file are taken from the
            current folder first, then from the file's own.
        overrides: `--set` strings such as "train.epochs=3"; the value is read as YAML.

    Raises:
        RecipeError: for a missing file, broken YAML, an unknown field (the nearest known one is named), a wrong value,
            or a DeepSpeed file that cannot be read or says another stage.
    """
    if isinstance(source, Recipe):
        values: Any = source.model_dump(mode="json")
        where = "the recipe"
    elif isinstance(source, dict):
        values, where = _copied(source), "the recipe"
    else:
        path = Path(source)
        values, where = _read_yaml(path), str(path)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} holds {_YAML_KINDS.get(type(values), 'a single value')}",
            "a mapping of fields such as base, task, data",
            "write one `field: value` a line; `luthier init` writes a recipe that holds",
        )
    for override in overrides or []:
        _apply_override(values, override)
    recipe = validate(Recipe, values, where)
    if isinstance(source, str | Path):
        recipe = _resolve_paths(recipe, Path(source).resolve().parent)
    if recipe.compute.deepspeed is None:
        return recipe
    given = source.compute.model_fields_set if isinstance(source, Recipe) else recipe.compute.model_fields_set
    compute = validate(ComputeConfig, filled_from_file(recipe.compute, given), recipe.compute.deepspeed)
    return recipe.model_copy(update={"compute": compute})


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Validate `values`, turning pydantic's complaints into one RecipeError that names each field.

    Raises:
        RecipeError: naming every wrong field, what was found there and what was expected.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise RecipeError(
            f"{where} does not hold:\n" + "\n".join(f"  - {line}" for line in lines),
            fix="mend these fields; `luthier init` writes a recipe that holds",
        ) from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe at {path}", fix="name an existing file, or write one with `luthier init`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a YAML text file in UTF-8") from None
    try:
        return yaml.load(text, _RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{path} is not valid YAML{place}: {_yaml_problem(error)}", fix="mend that line") from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML's safe types, and no field twice: plain YAML lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if key.value in first and isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the field {key.value!r} stands here and in line {first[key.value].line + 1}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


_YAML_KINDS: dict[type, str] = {type(None): "nothing", list: "a list", str: "a text"}


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.reader.ReaderError):
        return f"it holds the character U+{error.character:04X}, which no text file should"
    return getattr(error, "problem", None) or str(error)


def _copied(value: Any) -> Any:
    """The mapping as YAML would have given it: its own copy, with texts for paths and lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {override!r}", "the form FIELD=VALUE, as in --set train.epochs=3")
    *parents, last = name.strip().split(".")
    section: Any = values
    for parent in parents:
        child = section.get(parent)
        if isinstance(child, str) and parent in ("task", "method"):
            child = {"type": child}
        section[parent] = child if child is not None else {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {parent} holds a single value", "a section with fields")
    try:
        section[last] = yaml.load(text, _RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(
            f"--set {override!r}: the value is not valid YAML", "a number, a word, or a quoted text"
        ) from None


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Let data that stands beside the recipe be found from any current folder."""

    def resolve(name: str) -> str:
        beside = folder / name
        return str(beside) if not Path(name).exists() and beside.exists() else name

    data = recipe.data
    train = [resolve(name) for name in data.train] if isinstance(data.train, list) else resolve(data.train)
    validation = resolve(data.validation) if isinstance(data.validation, str) else data.validation
    replay = data.replay
    if replay is not None:
        files = [resolve(name) for name in replay.file] if isinstance(replay.file, list) else resolve(replay.file)
        replay = replay.model_copy(update={"file": files})
    data = data.model_copy(update={"train": train, "validation": validation, "replay": replay})
    compute = recipe.compute
    if compute.deepspeed is not None:
        compute = compute.model_copy(update={"deepspeed": resolve(compute.deepspeed)})
    return recipe.model_copy(update={"data": data, "compute": compute})


def _explain(model: type[BaseModel], problem: Any) -> str:
    # A discriminated union puts the chosen tag into the location; the user never wrote it as a level.
    path = [str(part) for part in problem["loc"]]
    if len(path) > 2 and path[0] in ("task", "method"):
        path = [path[0], *path[2:]]
    name = ".".join(path) or "the whole"
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        hint = _elsewhere(model, path) or nearest(path[-1], known)
        return f"{name} is not a field{hint}; known here: {', '.join(known)}"
    if kind == "missing":
        return f"{name} is missing"
    if kind == "union_tag_invalid":
        tag, expected = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        known = [part.strip().strip("'") for part in expected.split(",")]
        return f"{name}: {tag!r} is not known{nearest(tag, known)}; known: {', '.join(known)}"
    if kind == "union_tag_not_found":
        return f"{name} needs a `type`, as in `{name}: {{type: ...}}`, or its name alone"
    if kind in ("model_type", "model_attributes_type"):
        return f"{name}: found {problem['input']!r}; expected a section, as in `{name}: {{field: value}}`"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: found {problem['input']!r}; {message[:1].lower()}{message[1:]}"


def _elsewhere(model: type[BaseModel], path: list[str]) -> str:
    """A hint for a field that was written outside its section, as `epochs` for `train.epochs`."""
    if len(path) > 1:
        return ""
    homes = [f"{section}.{path[0]}" for section in model.model_fields if path[0] in _fields_at(model, (section,))]
    return f" (did you mean '{homes[0]}'?)" if homes else ""


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(current, dict):  # a union's tag -> its class
            current = current.get(part, model)
            continue
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is None:
            continue
        if field.discriminator:
            current = {choice.model_fields["type"].default: choice for choice in _choices(field.annotation)}
        else:
            current = field.annotation
    return list(current.model_fields) if hasattr(current, "model_fields") else []


def _choices(annotation: Any) -> list[type[BaseModel]]:
    return list(getattr(annotation, "__args__", ())) or [annotation]
