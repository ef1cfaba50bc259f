"""One recipe with several methods: each trained and judged in a process of its own, one after another, side by side.

    DIR/full/ DIR/lora/ ...    a run folder a method
    DIR/compare.json           the rows, for programs
    DIR/compare.md             the table, for people
    DIR/compare.png            the same as a picture

Nothing here loads torch: the process that compares stays small beside those that train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from luthier.errors import RecipeError, RunError, nearest
from luthier.evaluate.comparison import MethodRow, common_metric, markdown, read_row
from luthier.evaluate.comparison_chart import comparison_chart
from luthier.files import write_bytes, write_text
from luthier.methods.config import MethodConfig
from luthier.recipe import Recipe, load_recipe
from luthier.worker.children import Children
from luthier.worker.interrupts import interrupts
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.result import kept_result
from luthier.worker.run_folder import RunFolder

FORMAT = 1
POLL_SECONDS = 0.05

LOW_RANK = ("lora", "qlora", "dora")
"""Methods that mean the same by their fields: what the recipe says of one holds for the others that have the field."""

BUDGET = ("epochs", "max_steps", "batch_size", "max_length", "truncation", "early_stopping", "keep_best", "seed")
"""Fields of `train` that are the same for all, so that methods differ and nothing else."""

METHODS: dict[str, Any] = {
    config.model_fields["type"].default: config for config in get_args(get_args(MethodConfig)[0])
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        folder: Holds a run folder a method, and the files below.
        rows: One a method, in the order asked for.
        table, chart: compare.md and compare.png; no chart where no method finished.
    """

    folder: Path
    rows: tuple[MethodRow, ...]
    table: Path
    chart: Path | None

    @property
    def failed(self) -> list[str]:
        """The methods that came to nothing."""
        return [row.method for row in self.rows if row.problem]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "folder": str(self.folder),
            "table": str(self.table),
            "chart": str(self.chart) if self.chart else None,
            "metric": common_metric(self.rows),
            "rows": [row.to_json() for row in self.rows],
        }


def compare(
    recipe: str | Path | dict[str, Any] | Recipe,
    methods: Sequence[str],
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Train one recipe with each of several methods, and set side by side what each took and gave.

    Called again, it goes on: finished methods are kept, others resume from their last checkpoint.

    Args:
        recipe: A recipe's path, a mapping or a `Recipe`.
        methods: Types of methods, as in `method: {type: ...}`.
        output: The folder to write; the recipe's `output` with "-compare" behind it by default.
        overrides: As `--set` takes them. One that begins with a method and a colon holds for that method alone, as in
            "lora:train.learning_rate=1e-3".
        progress: Hears how it goes; None for silence.

    Raises:
        RecipeError: for a recipe, a method or an override that does not hold, before anything is trained.
        RunError: when a method's folder was written for another recipe.
        KeyboardInterrupt: after Ctrl-C, once the present method is saved.
    """
    progress = progress or SilentProgress()
    recipes = recipes_for(recipe, methods, output, overrides)
    folder = Path(next(iter(recipes.values())).output).parent
    for name, one in recipes.items():
        _check_folder(name, one)
    rows: list[MethodRow] = []
    for number, (name, one) in enumerate(recipes.items(), 1):
        problem = ""
        if kept_result(RunFolder(Path(one.output))) is None:
            progress.stage(f"{name}, method {number} of {len(recipes)}")
            problem = _train_apart(one, progress)
        else:
            progress.note(f"{name} is done already")
        rows.append(read_row(name, Path(one.output), one.train.learning_rate, problem))
        _check_same_data(rows)
        comparison = _write(folder, rows)
    return comparison


def recipes_for(
    source: str | Path | dict[str, Any] | Recipe,
    methods: Sequence[str],
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Recipe]:
    """Each method's recipe: the same but for `method`, the learning rate where it must differ, and `output`.

    The recipe's `train.learning_rate` holds for its own method and those whose usual rate is the same; any other method
    takes its usual one. The recipe's fields of `method` hold for that method, and among `LOW_RANK` for each that has
    them.

    Raises:
        RecipeError: for a recipe, a method or an override that does not hold.
    """
    _check_names(methods)
    common, own = _split_overrides(overrides, methods)
    recipe = load_recipe(source, common)
    if recipe.start_from is not None:
        raise RecipeError(
            f"start_from names {recipe.start_from}, and methods are compared from the same start",
            "the base alone",
            "leave start_from out; a run that trained a whole model can be named under `base`",
        )
    folder = Path(output) if output is not None else Path(f"{recipe.output}-compare")
    recipes = {}
    for name in methods:
        values = recipe.model_dump(mode="json")
        values |= {"method": _method_section(recipe, name), "output": str(folder / name)}
        values["train"]["learning_rate"] = learning_rate_for(recipe, name)
        recipes[name] = load_recipe(values, own[name])
        _check_budget(name, recipe, recipes[name])
    return recipes


def learning_rate_for(recipe: Recipe, method: str) -> float:
    """The recipe's rate where the method usually learns at that of the recipe's own method, else its usual one."""
    usual = METHODS[method].usual_learning_rate
    return recipe.train.learning_rate if usual == recipe.method.usual_learning_rate else float(usual)


def _method_section(recipe: Recipe, method: str) -> dict[str, Any]:
    written = recipe.method.model_dump(mode="json")
    if method == recipe.method.type:
        return written
    if {method, recipe.method.type} <= set(LOW_RANK):
        # `init` and `quantization` are about what the two are not alike in.
        shared = set(METHODS[method].model_fields) - {"type", "init", "quantization"}
        return {"type": method, **{name: value for name, value in written.items() if name in shared}}
    return {"type": method}


def _check_names(methods: Sequence[str]) -> None:
    if not methods:
        raise RecipeError("there is no method to compare", "at least one", "name them, as in --methods full,lora,dora")
    for name in methods:
        if name not in METHODS:
            raise RecipeError(f"the method {name!r} is not known{nearest(name, METHODS)}", ", ".join(METHODS))
        if list(methods).count(name) > 1:
            raise RecipeError(f"the method {name!r} is named twice", "each method once")


def _split_overrides(overrides: Sequence[str], methods: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides for all, and those of each method."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in methods}
    for override in overrides:
        field = override.partition("=")[0]
        name, colon, own_field = field.partition(":")
        if not colon:
            common.append(override)
        elif own_field.strip() in ("method", "method.type"):
            raise RecipeError(f"--set {override!r} names another method", "fields of a method", "leave it out")
        elif name in own:
            own[name].append(override[len(name) + 1 :])
        else:
            raise RecipeError(
                f"--set {override!r}: {name!r} is none of the methods compared{nearest(name, methods)}",
                ", ".join(methods),
            )
    return common, own


def _check_budget(name: str, common: Recipe, recipe: Recipe) -> None:
    """An override of one method may change how it learns, and nothing that would make the comparison unfair."""
    before, after = common.model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [part for part in before if part not in ("method", "train", "output") and before[part] != after[part]]
    changed += [f"train.{part}" for part in BUDGET if before["train"][part] != after["train"][part]]
    if changed:
        raise RecipeError(
            f"--set {name}:... changes {', '.join(changed)} for {name} alone",
            "the same data, rows and budget for every method",
            f"leave out `{name}:`, so that it holds for all, or change fields of `method` or of the optimizer",
        )


def _check_folder(name: str, recipe: Recipe) -> None:
    folder = RunFolder(Path(recipe.output))
    if not folder.has_state or folder.is_unused:
        return
    try:
        RunFolder.open(folder.path).check_same(recipe)
    except RunError as error:
        raise RunError(
            error.found,
            error.expected,
            f"take the changes back, delete {folder.path} to train {name} anew, or compare into another --output",
        ) from None


def _train_apart(recipe: Recipe, progress: Progress) -> str:
    """Train in a process of its own; why it failed, or nothing."""
    folder = RunFolder(Path(recipe.output))
    resume = folder.has_state and not folder.is_unused
    children = Children([(recipe, 0)], resume=resume, progress=progress, way_on="the same comparison")
    try:
        with interrupts() as asked:
            children.admit(0, beside_others=False)
            while children.has_work:
                if asked:
                    raise KeyboardInterrupt
                children.poll()
                time.sleep(POLL_SECONDS)
    except BaseException:
        children.stop()
        raise
    result = children.results.get(recipe.output)
    if result is None:
        return "its process was told to stop; it has saved"
    if result.status == "done":
        return ""
    return children.errors[0].found if children.errors else str(result.result["stopped_because"])


def _check_same_data(rows: Sequence[MethodRow]) -> None:
    """Files may have changed between two calls: what was trained on other rows is not compared."""
    done = [row for row in rows if not row.problem]
    if done and done[-1].data_sha256 != done[0].data_sha256:
        raise RunError(
            f"{done[0].folder} and {done[-1].folder} were trained on different data: its files have changed between",
            "the same rows for every method",
            "compare into another --output",
        )


def _write(folder: Path, rows: Sequence[MethodRow]) -> Comparison:
    has_chart = any(not row.problem for row in rows)
    chart = folder / "compare.png" if has_chart else None
    comparison = Comparison(folder, tuple(rows), folder / "compare.md", chart)
    if chart is not None:
        write_bytes(chart, comparison_chart(rows))
    write_text(comparison.table, markdown(rows, chart.name if chart else None))
    write_text(folder / "compare.json", json.dumps(comparison.to_json(), indent=2, ensure_ascii=False) + "\n")
    return comparison
