"""What every task that writes has in common, asserted in one place."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_templates import write_family

from luthier.data.template import Renderer
from luthier.errors import RecipeError
from luthier.extras import require_for_scoring
from luthier.tasks.task import Task
from luthier.types import Prompt


def check_exchange(task: Task, row: dict[str, Any], answer: str, family: str, folder: Path) -> Prompt:
    """The prompt is the example's beginning, without loss; the answer carries it; the record survives its JSON."""
    renderer = Renderer.load(write_family(folder, family))
    record = task.parse(row)
    (example,) = task.examples(record, renderer, 2048, row=2)
    (prompt,) = task.prompts(record, renderer, row=2)
    size = len(prompt.tokens)
    assert example.tokens[:size].tolist() == prompt.tokens.tolist()
    assert not example.weights[:size].any()
    assert answer in renderer.decode(example.tokens[size:][example.weights[size:] > 0])
    assert task.from_json(record.to_json()) == record
    return prompt


def check_missing_packages(task: str, needs: Sequence[str], missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that are not installed are named with the extra that brings them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        require_for_scoring(task, needs)
    assert f"task: {task} is judged with {missing}" in str(caught.value)
    assert f"pip install 'luthier[{task}]'" in str(caught.value)
