"""Real sets for the benchmarks, read from the folder that `--data` names, and rendered once for every side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.template import Renderer
from luthier.recipe import Recipe
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import Shaper
from luthier.types import Example


@dataclass(frozen=True)
class BenchmarkSet:
    """A set as a recipe reads it.

    Attributes:
        path: Its folder under `--data`.
        task: The recipe's task.
        template: The recipe's data.template.
    """

    path: str
    task: str
    template: dict[str, str]


SETS = {
    "banking77": BenchmarkSet(
        "classification/banking77",
        "completion",
        {"prompt": "Query: {{ text }}\nIntent:", "completion": " {{ label }}"},
    ),
    "banking77-head": BenchmarkSet("classification/banking77", "classification", {}),
    "short_instructions": BenchmarkSet("chat/short_instructions", "chat", {}),
}


def read_rows(data: Path, name: str, part: str) -> list[dict[str, Any]]:
    """The raw rows of a set's part ("train" or "test")."""
    path = data / SETS[name].path / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def recipe_values(data: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A recipe over the set's own train and test parts."""
    chosen = SETS[name]
    folder = data / chosen.path
    return {
        "task": chosen.task,
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "test.jsonl"),
            "template": chosen.template,
        },
        **sections,
    }


def render(data: Path, name: str, part: str, renderer: Renderer, num_rows: int | None = None) -> list[Example]:
    """The part's rows as examples, exactly as a recipe would render them."""
    recipe = Recipe.model_validate(recipe_values(data, name))
    task = task_for(recipe.task)
    shaper = Shaper(task.name, template=SETS[name].template)
    records = [task.parse(shaper.shape(row)) for row in read_rows(data, name, part)]
    if task.objective == "sequence_head":
        task = task.with_labels(sorted({label for record in records for label in task.labels_of(record)}))
    examples: list[Example] = []
    for index, record in enumerate(records[:num_rows]):
        examples += task.examples(record, renderer, recipe.train.max_length, "end", index)
    return examples
