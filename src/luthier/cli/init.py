"""`luthier init`: a few questions, and a recipe that holds."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from luthier.cli.console import err
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.cli.survey import Guess, Survey

DEFAULT_BASE = "smollm2-135m-instruct"


class TaskName(StrEnum):
    """The tasks a recipe can name."""

    chat = "chat"
    completion = "completion"
    preference = "preference"
    qa = "qa"
    translation = "translation"
    text = "text"
    classification = "classification"
    tagging = "tagging"
    music = "music"
    art = "art"


class Effort(StrEnum):
    """What matters more: an early answer, or the best one."""

    quick = "quick"
    best = "best"


_EFFORTS: dict[Effort, dict[str, Any]] = {
    Effort.quick: {"rank": 16, "alpha": 32, "epochs": 2, "early_stopping": None},
    Effort.best: {"rank": 32, "alpha": 64, "epochs": 5, "early_stopping": 4},
}

# Each task's fields that columns can be mapped onto, with the question that asks for the column.
_FIELD_QUESTIONS = {
    "chat": {"prompt": "Which column does the user say", "completion": "Which column is the right reply"},
    "completion": {"prompt": "Which column does the model read", "completion": "Which column should it write"},
    "preference": {
        "prompt": "Which column does the user say",
        "chosen": "Which column is the better reply",
        "rejected": "Which column is the worse reply",
    },
    "qa": {
        "context": "Which column holds the text that answers",
        "question": "Which column holds the question",
        "answers": "Which column holds the right answers",
    },
    "translation": {"source": "Which column holds the source", "target": "Which column holds its translation"},
    "tagging": {"tokens": "Which column holds the words", "tags": "Which column holds their BIO tags"},
    "music": {"abc": "Which column holds the tune in ABC notation"},
    "art": {"description": "Which column says what is to be drawn", "svg": "Which column holds the drawing as SVG"},
    "text": {"text": "Which column holds the text"},
    "classification": {"text": "Which column holds the text", "label": "Which column names its class"},
}
_FORMATS = {
    "chat": "prompt",
    "completion": "prompt",
    "preference": "preference",
    "qa": "qa",
    "translation": "translation",
    "text": "text",
    "classification": "classification",
    "tagging": "tokens",
    "music": "abc",
    "art": "svg",
}
_TASKS = ", ".join(list(TaskName)[:-1]) + f" or {list(TaskName)[-1]}"


def init_command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="The training rows.")] = None,
    task: Annotated[TaskName | None, typer.Option("--task", help="What is learnt [default: by the columns].")] = None,
    base: Annotated[str | None, typer.Option("--base", help="A catalogue name, a Hub id or a folder.")] = None,
    effort: Annotated[Effort | None, typer.Option("--effort", help="What matters more.")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="The run folder of the recipe.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take flags and defaults.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
) -> None:
    """Ask a few questions and write a commented recipe."""
    from luthier.cli.survey import survey

    ask = not yes
    replace = force or _may_replace(output, ask)
    if data is None:
        if not ask:
            raise RecipeError("--yes without a data file", fix="name it: luthier init --yes --data train.jsonl")
        data = Path(_ask("Your data file (.jsonl, .json, .csv, .tsv, .parquet, .txt)"))
    seen = survey(data)
    _say(f"{data}: columns {', '.join(seen.columns)}" if seen.columns != ("text",) else f"{data}: plain text")
    if seen.problem:
        _say(f"A row cannot be read; `luthier check {data}` lists all such rows. {seen.problem}")
    chosen = _choose_task(seen, task.value if task else None, ask)
    base = base or (_ask("Base (catalogue name, Hub id or folder)", DEFAULT_BASE) if ask else DEFAULT_BASE)
    if effort is None:
        effort = Effort(_choice("What matters more, quick or best", list(Effort), "quick")) if ask else Effort.quick
    run = run or (_ask("Run folder", _free_run(data)) if ask else _free_run(data))
    text = recipe_text(seen, chosen, base=base, effort=effort, run=run, folder=output.resolve().parent)
    _write_new(output, text, replace)
    _say(f"Wrote {output}. Next: luthier check {output}, then luthier train {output}")


def recipe_text(seen: Survey, chosen: Guess, *, base: str, effort: Effort, run: str, folder: Path) -> str:
    """A commented recipe in YAML, proven by loading it.

    Args:
        seen: The data file's survey.
        chosen: Task, format and column mapping.
        base: Catalogue name, Hub id or folder.
        effort: Quick or best.
        run: The run folder.
        folder: Where the recipe will stand; the data's path is written so that it is found from there.

    Raises:
        RecipeError: where an answer does not hold, as an empty base.
    """
    import yaml

    from luthier.cli.survey import held_out_beside
    from luthier.recipe import load_recipe

    values = _EFFORTS[effort]
    held_out = held_out_beside(seen.path)
    lines = [
        "# A recipe for `luthier train`. `luthier check` shows what the data holds; every other field has a default,",
        "# which RUN/recipe.yaml writes out.",
        f"base: {_scalar(base)}",
        f"task: {_task_of(chosen, seen)}  # {_TASKS}",
        "data:",
        f"  train: {_scalar(_path_from(seen.path, folder))}",
        f"  validation: {_scalar(_path_from(held_out, folder))}  # held-out rows, found beside the training rows"
        if held_out
        else "  validation: 0.1  # share of the rows held out to judge on; or a file of its own",
    ]
    if chosen.fields:
        lines += [f"  format: {chosen.format}", "  fields:  # field: the column that holds it"]
        lines += [f"    {name}: {_scalar(column)}" for name, column in chosen.fields.items()]
    lines += [
        "method:",
        "  type: lora",
        f"  rank: {values['rank']}  # a higher rank can learn more, and costs more",
        f"  alpha: {values['alpha']}",
        "train:",
        f"  epochs: {values['epochs']}  # passes over the training rows",
        "  batch_size: 16  # examples a step; memory does not limit it",
        "  learning_rate: "
        + ("5.0e-5  # preferences ask for small steps" if chosen.task == "preference" else "5.0e-4"),
        "  schedule: cosine",
        "  max_length: 2048  # most tokens in one example",
        "  seed: 42",
    ]
    if values["early_stopping"]:
        lines.append(f"  early_stopping: {values['early_stopping']}  # validations without a better loss")
    lines.append(f"output: {_scalar(run)}  # the run folder")
    text = "\n".join(lines) + "\n"
    load_recipe(yaml.safe_load(text))
    return text


def _task_of(chosen: Guess, seen: Survey) -> str:
    """The task as the recipe names it: labels in lists are several to a text."""
    is_list = chosen.fields.get("label", "label") in seen.list_columns
    return "{type: classification, multiple: true}" if chosen.task == "classification" and is_list else chosen.task


def _choose_task(seen: Survey, task: str | None, ask: bool) -> Guess:
    from luthier.cli.survey import Guess, guess

    guessed = guess(seen, task)
    if task is None and ask:
        suggestion = guessed.task if guessed else None
        task = _choice(f"Task: {_TASKS}", list(TaskName), suggestion)
        guessed = guess(seen, task)
    if guessed is not None:
        if guessed.fields:
            _say(", ".join(f"{name} is taken from column {column}" for name, column in guessed.fields.items()))
        return guessed
    questions = _FIELD_QUESTIONS[task or "chat"]
    if not ask:
        raise RecipeError(
            f"{seen.path} has the columns {', '.join(seen.columns)}, from which "
            + (f"the fields of task {task} cannot be told" if task else "no task can be told"),
            f"columns such as {' and '.join(questions)}",
            "answer the questions of `luthier init` without --yes, or rename the columns",
        )
    assert task is not None  # asked for above
    columns = list(seen.columns)
    fields = {name: _choice(f"{question} ({', '.join(columns)})", columns) for name, question in questions.items()}
    return Guess(task, _FORMATS[task], {name: column for name, column in fields.items() if name != column})


def _may_replace(output: Path, ask: bool) -> bool:
    if not output.exists():
        return False
    if ask and typer.confirm(f"{output} exists. Replace it?", default=False, err=True):
        return True
    raise RecipeError(f"{output} exists, and is left as it is", fix="name another with --output, or add --force")


def _write_new(path: Path, text: str, replace: bool) -> None:
    from luthier.errors import StorageError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        if replace:
            os.replace(temporary, path)
        else:
            # A link fails where the name was taken meanwhile; a rename would replace it.
            os.link(temporary, path)
    except FileExistsError:
        raise RecipeError(f"{path} exists by now, and is left as it is", fix="name another with --output") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", fix="name another with --output") from None
    finally:
        temporary.unlink(missing_ok=True)


def _free_run(data: Path) -> str:
    stem = re.sub(r"[^\w.-]+", "-", data.name.split(".")[0]) or "first"
    names = (f"runs/{stem}" if number == 1 else f"runs/{stem}-{number}" for number in range(1, 10_000))
    return next(name for name in names if not Path(name).exists())


def _path_from(path: Path, folder: Path) -> str:
    if path.is_absolute():
        return str(path)
    return str(path) if folder == Path.cwd() else os.path.relpath(path, folder)


def _scalar(text: str) -> str:
    """A text as YAML on one line, quoted where it must be."""
    import yaml

    dumped: str = yaml.safe_dump(text, width=float("inf"), allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _ask(question: str, default: str | None = None) -> str:
    try:
        answer: str = typer.prompt(question, default=default, err=True)
    except typer.Abort:
        raise RecipeError(
            "the input ended before every question was answered",
            fix="answer by flags instead: luthier init --yes --data FILE",
        ) from None
    return answer.strip()


def _choice(question: str, choices: list[Any], default: str | None = None) -> str:
    known = [str(choice) for choice in choices]
    while True:
        answer = _ask(question, default)
        if answer in known:
            return answer
        _say(f"{answer!r} is none of {', '.join(known)}")


def _say(text: str) -> None:
    err().print(Text(text), soft_wrap=True)
