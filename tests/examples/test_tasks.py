"""The small examples of the tasks: every recipe holds, every row of it checks, and they stay small."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_templates import write_family

from luthier.data.check import check_data
from luthier.data.template import Renderer
from luthier.recipe import load_recipe
from luthier.tasks.registry import task_for

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))


def test_there_is_an_example_for_each_new_task() -> None:
    tasks = {load_recipe(path).task.type for path in RECIPES}
    assert tasks == {"tagging", "qa", "translation", "classification", "text", "preference", "music", "art"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_row_checks(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    report = check_data(recipe.data, task_for(recipe.task), renderer, max_length=2048)
    assert report.problems == []
    assert report.warnings == []
    assert report.validation is not None
    assert 20 <= report.train.num_rows + report.validation.num_rows <= 60
