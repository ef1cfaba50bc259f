"""`luthier jobs create` without a server: from its arguments to the recipe of a run on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.base.catalogue import DEFAULT_BASE
from luthier.cli.check import RECIPE_ENDINGS
from luthier.cli.local_runs import RUNS, recipe_values, tuned_folder
from luthier.data.check import train_files
from luthier.data.files import KINDS, open_rows
from luthier.errors import RecipeError, RunError, StorageError
from luthier.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for.

    Attributes:
        file: A recipe, or a training file.
        model: A base, or a run to go on from; None for the default base.
        spec: A recipe's fields; its `validation` is a share of the rows to hold out, as on a server.
    """

    file: str
    model: str | None = None
    validation: str | None = None
    suffix: str | None = None
    seed: int | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def is_recipe(file: str) -> bool:
    return Path(file).suffix.lower() in RECIPE_ENDINGS


def wanted_recipe(wanted: Wanted, runs: Path | None) -> Recipe:
    """The recipe, with the folder that its run will have; one that is named after a data file is made, to be taken.

    Args:
        runs: Where the run folder of a data file goes.

    Raises:
        RecipeError: for what does not hold, or options that the recipe says itself.
        DataError: for a data file that is not there, or empty.
        RunError: where `model` is a run that cannot be gone on from.
    """
    if is_recipe(wanted.file):
        _refuse_options(wanted, runs)
        return _with_files(load_recipe(wanted.file, wanted.overrides))
    recipe = _with_files(load_recipe(_values(wanted), wanted.overrides))
    if any(override.partition("=")[0].strip() == "output" for override in wanted.overrides):
        return recipe
    return recipe.model_copy(update={"output": str(_free_folder(runs or Path(RUNS), _name(wanted)))})


def _with_files(recipe: Recipe) -> Recipe:
    """The recipe, once its data files are there: that is told before torch is loaded."""
    held_out = recipe.data.validation
    for file in [*train_files(recipe.data), *([held_out] if isinstance(held_out, str) else [])]:
        open_rows(file)
    return recipe


def _refuse_options(wanted: Wanted, runs: Path | None) -> None:
    says = {
        "--model": ("base", wanted.model),
        "--validation": ("data.validation", wanted.validation),
        "--suffix": ("output", wanted.suffix),
        "--seed": ("train.seed", wanted.seed),
        "--spec": ("train.epochs", wanted.spec or None),
        "--runs": ("output", runs),
    }
    for option, (name, value) in says.items():
        if value is not None:
            raise RecipeError(f"{option} is for a data file, and a recipe says it itself", fix=f"use --set {name}=...")


def _values(wanted: Wanted) -> dict[str, Any]:
    values = dict(wanted.spec)
    for name in ("base", "output"):
        if name in values:
            option = "--model" if name == "base" else "--suffix, or --set output=..."
            raise RecipeError(f"the spec names {name!r}", f"it in {option}")
    share = values.pop("validation", None)
    if share is not None and wanted.validation is not None:
        raise RecipeError("--validation and the spec's `validation` say the same thing twice", "one of them")
    held_out = wanted.validation if wanted.validation is not None else share
    data = {**_section(values, "data"), "train": wanted.file}
    values["data"] = data if held_out is None else {**data, "validation": held_out}
    if wanted.seed is not None:
        values["train"] = {**_section(values, "train"), "seed": wanted.seed}
    return values | _beginning(wanted.model or DEFAULT_BASE, values)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise RecipeError(f"the spec's {name} is {section!r}", f"a section, as in {{{name!r}: {{...}}}}")
    return section


def _beginning(model: str, values: dict[str, Any]) -> dict[str, Any]:
    """The base; where a run is named, what it made, with its own task and method unless others are named."""
    run = Path(model)
    if not (run / "state.json").exists():
        return {"base": model}
    tuned, before = tuned_folder(run), recipe_values(run)
    if tuned is None or "base" not in before:
        raise RunError(f"{model} has made no model yet", "a run that is done", f"look at it: luthier jobs show {model}")
    if tuned.name == "model":
        return {"base": str(tuned)}
    # How it began does not matter any more: its values are there.
    method = {name: value for name, value in before["method"].items() if name != "init"}
    inherited = {"task": before["task"], "method": method}
    return {"base": before["base"], "start_from": str(run)} | {k: values.get(k, v) for k, v in inherited.items()}


def _name(wanted: Wanted) -> str:
    name = Path(wanted.file).name
    for ending in (".gz", *KINDS):
        name = name.removesuffix(ending)
    return f"{name}-{wanted.suffix}" if wanted.suffix else name


def _free_folder(runs: Path, name: str) -> Path:
    """A new folder under `runs`, named as asked or with a number behind it."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise RecipeError(f"{name!r} is no folder's name", "a suffix without slashes")
    number = 1
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error.strerror}", fix="choose another with --runs") from None
        else:
            return folder
