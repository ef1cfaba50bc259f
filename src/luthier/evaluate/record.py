"""What a run folder holds, read for its report and its card. Every part may be missing; none may be changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.base.folder import RESULT_MODEL
from luthier.errors import RunError
from luthier.evaluate.metrics import RowScore, compare
from luthier.evaluate.summary import primary_metric


@dataclass(slots=True)
class RunRecord:
    """A run folder's content.

    Attributes:
        path: The folder.
        recipe_text: recipe.yaml as it stands; empty if missing.
        recipe: The same, parsed.
        steps: A mapping a training step, ascending in "step"; a step repeated after a resume counts once, the last.
        evaluations: A mapping a validation on the way, likewise.
        evaluation: eval.json, with "comparison" worked out from the predictions if it lacks one.
        predictions: A mapping a held-out row.
        result, versions, data: The JSON files of those names; empty if missing.
        notes: What could not be read, as sentences for the reader.
    """

    path: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def shown_path(self) -> str:
        """The folder as commands should name it: as the recipe does."""
        return str(self.recipe.get("output") or self.path)

    @property
    def task(self) -> str:
        return type_name(self.recipe.get("task"))

    @property
    def method(self) -> str:
        return type_name(self.recipe.get("method"))

    @property
    def result_folder(self) -> str:
        """The result's name within the run: `model` where the base's own weights were trained, else `adapter`."""
        return RESULT_MODEL if (self.path / RESULT_MODEL).is_dir() else "adapter"

    @property
    def is_whole_model(self) -> bool:
        """Whether the result is a model by itself."""
        return self.result_folder == RESULT_MODEL

    @property
    def is_classification(self) -> bool:
        tuned = self.evaluation.get("tuned")
        # Questions with a few answers to choose from have an accuracy too.
        return self.task == "classification" or (not self.task and isinstance(tuned, dict) and "accuracy" in tuned)

    @property
    def is_multilabel(self) -> bool:
        """Whether a text may have several labels or none."""
        task = self.recipe.get("task")
        return self.is_classification and isinstance(task, dict) and bool(task.get("multiple"))

    @property
    def is_by_words(self) -> bool:
        """Whether the classes are said by the language model itself."""
        task = self.recipe.get("task")
        return isinstance(task, dict) and task.get("head") == "words"

    @property
    def is_tagging(self) -> bool:
        return self.task == "tagging"

    @property
    def is_preference(self) -> bool:
        return self.task == "preference"

    @property
    def has_head(self) -> bool:
        """Whether the result says classes rather than words."""
        return (self.is_classification and not self.is_by_words) or self.is_tagging

    @property
    def cost(self) -> dict[str, Any]:
        """The numbers of result.json, those under its "cost" included."""
        nested = self.result.get("cost")
        return {**self.result, **(nested if isinstance(nested, dict) else {})}


def type_name(section: Any) -> str:
    """The name of a recipe's task or method, which is a word or a mapping with `type`."""
    return str(section.get("type", "")) if isinstance(section, dict) else str(section or "")


def read_run(run: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunError: if there is no such folder. A file that is missing or broken is a note, not an error: a report about
            a run that went wrong is when one is needed most.
    """
    run = Path(run)
    if not run.is_dir():
        raise RunError(f"there is no run folder at {run}", "the `output` folder of a training", "name an existing run")
    record = RunRecord(run)
    _read_recipe(record)
    for name in ("result", "versions", "data"):
        setattr(record, name, _read_json(record, f"{name}.json"))
    record.evaluation = _read_json(record, "eval.json")
    record.predictions = _read_lines(record, "predictions.jsonl")
    lines = _read_lines(record, "metrics.jsonl")
    record.steps = _by_step([line for line in lines if line.get("kind", "step") == "step"])
    record.evaluations = _by_step([line for line in lines if line.get("kind") == "evaluation"])
    if record.evaluation and "comparison" not in record.evaluation:
        record.evaluation["comparison"] = _compare_predictions(record)
    return record


def _read_recipe(record: RunRecord) -> None:
    path = record.path / "recipe.yaml"
    if not path.exists():
        return
    try:
        record.recipe_text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(record.recipe_text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        record.notes.append(f"recipe.yaml cannot be read: {error}")
        return
    if isinstance(recipe, dict):
        record.recipe = recipe


def _read_json(record: RunRecord, name: str) -> dict[str, Any]:
    path = record.path / name
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        record.notes.append(f"{name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        record.notes.append(f"{name} holds a {type(value).__name__} where a mapping was expected")
        return {}
    return value


def _read_lines(record: RunRecord, name: str) -> list[dict[str, Any]]:
    path = record.path / name
    if not path.exists():
        return []
    values, broken = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                values.append(value)
            else:
                broken.append(number)
    if broken:
        shown = ", ".join(str(number) for number in broken[:5]) + (", ..." if len(broken) > 5 else "")
        record.notes.append(f"{name}: {len(broken)} line(s) that are no JSON mapping were left out (line {shown})")
    return values


def _by_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        line for _, line in sorted({line["step"]: line for line in lines if isinstance(line.get("step"), int)}.items())
    ]


def _compare_predictions(record: RunRecord) -> dict[str, Any]:
    judged = [
        row
        for row in record.predictions
        if isinstance(row.get("base_correct"), bool) and isinstance(row.get("tuned_correct"), bool)
    ]
    metric = primary_metric(record.evaluation)
    if not judged or metric not in ("exact_match", "accuracy"):
        return {}
    base, tuned = (
        [RowScore(row=int(row.get("row", place)), is_exact=row[f"{model}_correct"]) for place, row in enumerate(judged)]
        for model in ("base", "tuned")
    )
    return {metric: compare(base, tuned)["exact_match"]}
