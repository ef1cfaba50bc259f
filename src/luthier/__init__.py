"""Luthier: fine-tuning of open language models, as a service that you own and on your own compute.

    import luthier
    run = luthier.train("recipe.yaml")            # or a mapping, or a Recipe; a list of them trains together
    chat = luthier.open_chat(run.folder)
    print("".join(chat.reply([{"role": "user", "content": "Hello"}])))

Everything is loaded when it is first asked for: `import luthier` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier.imports import importing

__version__ = "0.1.0"

if TYPE_CHECKING:
    from luthier.errors import LuthierError
    from luthier.recipe import Recipe, load_recipe
    from luthier.worker.chat import open_chat
    from luthier.worker.compare import Comparison, compare
    from luthier.worker.export import export_run
    from luthier.worker.judge import evaluate_run
    from luthier.worker.progress import Progress
    from luthier.worker.result import RunResult

    RecipeSource = str | Path | dict[str, Any] | Recipe

_LAZY = {
    "Comparison": "luthier.worker.compare",
    "LuthierError": "luthier.errors",
    "Progress": "luthier.worker.progress",
    "Recipe": "luthier.recipe",
    "RunResult": "luthier.worker.result",
    "compare": "luthier.worker.compare",
    "evaluate_run": "luthier.worker.judge",
    "export_run": "luthier.worker.export",
    "load_recipe": "luthier.recipe",
    "open_chat": "luthier.worker.chat",
}

__all__ = [
    "Comparison",
    "LuthierError",
    "Progress",
    "Recipe",
    "RunResult",
    "__version__",
    "compare",
    "evaluate_run",
    "export_run",
    "load_recipe",
    "open_chat",
    "train",
]


@overload
def train(recipe: RecipeSource, *, resume: bool = ..., progress: Progress | None = ...) -> RunResult: ...


@overload
def train(recipe: list[RecipeSource], *, resume: bool = ..., progress: Progress | None = ...) -> list[RunResult]: ...


def train(
    recipe: RecipeSource | list[RecipeSource], *, resume: bool = False, progress: Progress | None = None
) -> RunResult | list[RunResult]:
    """Tune a base and judge it, as `luthier train` does.

    Args:
        recipe: A recipe's path, a mapping or a `Recipe`; or a list of them, whose jobs train together on one base.
        resume: Go on from the last checkpoint in the run folder.
        progress: Hears how it goes; None for silence.

    Returns:
        One result, or a list in the order of the recipes.

    Raises:
        LuthierError: for anything that the caller can mend.
    """
    from luthier.recipe import load_recipe

    several = isinstance(recipe, list)
    recipes = [load_recipe(source) for source in (recipe if isinstance(recipe, list) else [recipe])]
    # Only now: a recipe that does not hold is told without waiting for torch.
    with importing():
        from luthier.worker.train import train as train_recipes

    results = train_recipes(recipes, resume=resume, progress=progress)
    return results if several else results[0]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    with importing():
        value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
