"""`luthier check`: what is in a dataset, and what is wrong with it, by line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from luthier.cli.console import err, facts_table, out, print_json, quiet_libraries
from luthier.data.check import CheckedRow, Sink, check_data, train_files
from luthier.data.files import open_rows
from luthier.data.lines import LineProblem, Row
from luthier.data.replay import replay_data
from luthier.data.report import DataReport, PartReport
from luthier.data.template import Renderer
from luthier.data.warn import count_rows
from luthier.errors import DataError
from luthier.imports import importing
from luthier.recipe import DataConfig, Recipe, load_recipe
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import FORMATS, recognize
from luthier.types import NO_CLASS, Example

RECIPE_ENDINGS = (".yaml", ".yml")
BAR_CHARACTERS = 40


def check_command(
    target: Annotated[Path, typer.Argument(help="A recipe (.yaml), or a data file of any known kind.")],
    show: Annotated[int, typer.Option("--show", min=0, help="Print this many rows with supervised tokens marked.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field of the recipe, as in train.max_length=512.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Count tokens as this base does.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Read the rows as this task; else the columns say.")
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Leave tokens and the method out; needs no tokenizer.")
    ] = False,
) -> None:
    """Check data: counts, lengths, duplicates, and every problem by line; and whether a recipe's base takes its method.

    The exit code is 2 if there is a problem.
    """
    recipe, is_guessed = _recipe_for(target, base, task, overrides or [])
    _require_files(recipe)
    renderer = None
    if not no_base:
        folder = _tokenizer_folder(recipe)
        renderer = Renderer.load(folder, recipe.method.new_tokens)
        if target.suffix.lower() in RECIPE_ENDINGS:
            _check_method(recipe, folder)
    samples = _Samples(show)
    general = replay_data(recipe.data, task_for(recipe.task))
    report = _check_with_progress(recipe, recipe.data, renderer, samples.take)
    replay = None if general is None else _check_with_progress(recipe, general, renderer)
    if json_output:
        values = {"base": None if no_base else recipe.base, **report.to_json()}
        if replay is not None:
            values |= {"replay": replay.to_json(), "trainable": not (report.num_problems or replay.num_problems)}
        shown = [sample for row in samples.rows for sample in _sample_as_json(row, renderer, report)]
        print_json({**values, "samples": shown} if show else values)
    else:
        console = out()
        _print_report(console, report, recipe, is_guessed)
        if replay is not None:
            _print_replay(console, replay, recipe)
        for row in samples.rows:
            _print_sample(console, row, renderer, report)
        _print_verdict(console, report)
        if replay is not None and (replay.num_problems or replay.warnings):
            console.print(Text("\nof the replayed text", style="bold"))
            _print_verdict(console, replay)
    if report.num_problems or (replay is not None and replay.num_problems):
        raise typer.Exit(DataError.exit_code)


@dataclass
class _Samples:
    """Keeps the first training rows that the check hands over."""

    wanted: int
    rows: list[CheckedRow] = field(default_factory=list)

    def take(self, row: CheckedRow) -> None:
        if row.part == "train" and len(self.rows) < self.wanted:
            self.rows.append(row)


def _recipe_for(target: Path, base: str | None, task: str | None, overrides: list[str]) -> tuple[Recipe, bool]:
    """The recipe to check, and whether its task was recognized from the columns of a data file."""
    named = [f"{name}={value}" for name, value in (("base", base), ("task", task)) if value]
    if target.suffix.lower() in RECIPE_ENDINGS:
        return load_recipe(target, [*named, *overrides]), False
    values = {"data": {"train": str(target), "validation": None}}
    is_guessed = task is None and not any(override.startswith("task") for override in overrides)
    if is_guessed:
        named.append(f"task={_task_of_columns(target)}")
    return load_recipe(values, [*named, *overrides]), is_guessed


def _task_of_columns(path: Path) -> str:
    """The first task that takes rows with the columns of the file's first readable row."""
    problem: LineProblem | None = None
    for item in open_rows(path):
        if isinstance(item, Row):
            break
        problem = problem or item
    else:
        raise _no_readable_row(path, problem)
    columns = [name for name, value in item.values.items() if value is not None]
    format_name = recognize(columns)
    if format_name is None:
        raise DataError(
            f"{path}, {item.place}: the columns are {', '.join(map(str, columns)) or 'none'}",
            "; ".join(f"{', '.join(shape.needs)} ({name})" for name, shape in FORMATS.items()),
            "rename the columns, or say the task and map them: "
            "luthier check FILE --task completion --set data.fields.prompt=question",
        )
    return FORMATS[format_name].tasks[0]


def _no_readable_row(path: Path, problem: LineProblem | None) -> DataError:
    if problem is None:
        return DataError(f"{path} holds no rows", "at least one row", "write the rows into it")
    return DataError(
        f"{path} holds no row that can be read; in {problem.place}: {problem.found}", problem.expected, problem.fix
    )


def _require_files(recipe: Recipe) -> None:
    """Complain of missing and empty files before a base is fetched for them."""
    held_out, replay = recipe.data.validation, replay_data(recipe.data, task_for(recipe.task))
    replayed = train_files(replay) if replay is not None else []
    for file in [*train_files(recipe.data), *([held_out] if isinstance(held_out, str) else []), *replayed]:
        open_rows(file)


def _tokenizer_folder(recipe: Recipe) -> Path:
    from luthier.base.fetch import tokenizer_folder

    return tokenizer_folder(recipe.base, lambda sentence: err().print(Text(f"{sentence} ...", style="dim")))


def _check_method(recipe: Recipe, folder: Path) -> None:
    """Hold the method against the base's layers, as a training does; the one part of a check that needs torch."""
    with err().status("holding the method against the base"):
        quiet_libraries()
        with importing():
            from luthier.worker.method_fit import check_method

        check_method(recipe, folder)


def _check_with_progress(
    recipe: Recipe, data: DataConfig, renderer: Renderer | None, sink: Sink | None = None
) -> DataReport:
    with err().status("reading") as status:
        return check_data(
            data,
            task_for(recipe.task),
            renderer,
            max_length=recipe.train.max_length,
            truncation=recipe.train.truncation,
            seed=recipe.train.seed,
            sink=sink,
            on_progress=lambda stage, num_rows: status.update(f"{stage}: {num_rows:,} rows"),
        )


def _print_report(console: Console, report: DataReport, recipe: Recipe, is_guessed: bool) -> None:
    recognized = "recognized from the columns" if is_guessed or recipe.data.format == "auto" else "as the recipe says"
    facts = [("task", f"{report.task}{' (recognized from the columns)' if is_guessed else ''}")]
    if isinstance(recipe.task, ClassificationConfig):
        several = "any number of labels, none included (task.multiple)" if recipe.task.multiple else "one label"
        facts.append(("each text has", several))
    facts.append(("format", f"{report.format} ({recognized})"))
    if report.tokenized:
        facts.append(("tokens of", recipe.base))
    facts += _part_facts("training", report.train, report)
    if report.validation:
        facts += _part_facts("held out", report.validation, report)
    console.print(facts_table(", ".join(report.train.files), facts), soft_wrap=True)
    if report.labels:
        _print_classes(console, report)
    if report.tokenized and report.train.lengths:
        _print_lengths(console, report.train, recipe.train.max_length)


def _print_replay(console: Console, replay: DataReport, recipe: Recipe) -> None:
    assert recipe.data.replay is not None
    facts = [("share of the tokens", f"{recipe.data.replay.share:g} (data.replay)")]
    facts += _part_facts("to replay", replay.train, replay)
    if replay.validation:
        facts += _part_facts("held out", replay.validation, replay)
    console.print(facts_table(", ".join(replay.train.files), facts), soft_wrap=True)


def _part_facts(name: str, part: PartReport, report: DataReport) -> list[tuple[str, str]]:
    text = count_rows(part.num_rows)
    if report.tokenized:
        examples = "example" if part.num_examples == 1 else "examples"
        text += f", {part.num_examples:,} {examples}, {part.num_tokens:,} tokens"
        if not report.labels:
            text += f", {part.num_supervised_tokens:,} of them supervised"
    return [(name, text)]


def _print_classes(console: Console, report: DataReport, limit: int = 10) -> None:
    counts = report.train.classes.most_common()
    console.print(Text(f"\nclasses: {len(report.labels)}", style="bold"))
    longest = max((len(label) for label, _ in counts[:limit]), default=0)
    most = counts[0][1] if counts else 1
    for label, count in counts[:limit]:
        console.print(Text(f"  {label:<{longest}}  {_bar(count, most)} {count:,}"), soft_wrap=True)
    if len(counts) > limit:
        fewest = counts[-1]
        console.print(Text(f"  ... and {len(counts) - limit} more; the smallest is {fewest[0]!r} with {fewest[1]:,}"))


def _print_lengths(console: Console, part: PartReport, max_length: int) -> None:
    median, p95, longest = part.length_at(0.5), part.length_at(0.95), max(part.lengths)
    console.print(
        Text.assemble(
            ("\nlengths in tokens", "bold"),
            f": half up to {median:,}, 95% up to {p95:,}, longest {longest:,} (train.max_length is {max_length:,})",
        ),
        soft_wrap=True,
    )
    bins = part.histogram()
    most = max(bin.count for bin in bins)
    width = len(f"{bins[-1].high:,}")
    for bin in bins:
        console.print(Text(f"  {bin.low:>{width},} - {bin.high:>{width},}  {_bar(bin.count, most)} {bin.count:,}"))
    rows = ", ".join(f"{row.place} ({row.num_tokens:,})" for row in part.longest[:3])
    console.print(Text(f"  longest rows: {rows}", style="dim"), soft_wrap=True)


def _bar(count: int, most: int) -> str:
    return "█" * max(round(BAR_CHARACTERS * count / most), 1 if count else 0)


def _print_verdict(console: Console, report: DataReport) -> None:
    console.print()
    repeats = {"repeats": report.duplicates, "is also in the training data": report.overlapping}
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)
    for what, found in repeats.items():
        for repeat in found:
            console.print(Text(f"  {repeat.place} {what}: {repeat.first_place}", style="dim"), soft_wrap=True)
    if not report.num_problems:
        console.print(Text("no problem found" if not report.warnings else "no problem that stops a training"))
        return
    _print_problems(console, report)


def _print_problems(console: Console, report: DataReport) -> None:
    told: set[str] = set()
    console.print(Text(f"{count_rows(report.num_problems)} cannot be trained on:", style="bold red"))
    for problem in report.problems:
        field_name = f" ({problem.field})" if problem.field else ""
        text = Text.assemble((f"  {problem.file}, {problem.place}{field_name}: ", "bold"), problem.found)
        if problem.expected:
            text.append(f"\n      expected: {problem.expected}")
        if problem.fix and problem.fix not in told:
            told.add(problem.fix)
            text.append(f"\n      to fix:   {problem.fix}")
        console.print(text, soft_wrap=True)
    if report.num_problems > len(report.problems):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.problem_counts.most_common())
        console.print(Text(f"  and {report.num_problems - len(report.problems):,} more; all by kind: {kinds}"))


def _print_sample(console: Console, row: CheckedRow, renderer: Renderer | None, report: DataReport) -> None:
    """One row with its supervised tokens in colour, or between « and » where there is no colour."""
    if renderer is None:
        console.print(Text(f"\n{row.place}: {row.record.to_json()}"), soft_wrap=True)
        return
    is_marked = not console.is_terminal or console.no_color
    for number, example in enumerate(row.examples, 1):
        of = f", example {number} of {len(row.examples)}" if len(row.examples) > 1 else ""
        supervised = sum(_flags(example))
        title = f"\n{row.place}{of}: {example.num_tokens} tokens, {supervised} supervised"
        text = Text(f"{title}\n", style="")
        text.stylize("bold")
        for number_of_side, side in enumerate(_sides(example)):
            text.append("\n\n" if number_of_side else "")
            for segment, is_supervised in supervised_segments(side, renderer):
                if is_supervised and is_marked:
                    segment = f"«{segment}»"
                text.append(segment, style="not bold green" if is_supervised else "not bold dim")
        if (label := _label_of(example, report)) is not None:
            text.append(f"\n-> {', '.join(label) if isinstance(label, list) else label}", style="green")
        console.print(text, soft_wrap=True)


def _label_of(example: Example, report: DataReport) -> str | list[str] | None:
    """An example's class, or its labels where it may have several; None where it has neither."""
    if example.class_flags is not None:
        return [label for label, flag in zip(report.labels, example.class_flags, strict=True) if flag]
    return None if example.class_index == NO_CLASS else report.labels[example.class_index]


def _sides(example: Example) -> list[Example]:
    """The chosen and the rejected side of a pair, each by itself; any other example as it is."""
    if example.pair is None:
        return [example]
    at = [example.pair.rejected_at]
    parts = zip(np.split(example.tokens, at), np.split(example.weights, at), strict=True)
    return [Example(tokens, weights, row=example.row) for tokens, weights in parts]


def supervised_segments(example: Example, renderer: Renderer) -> list[tuple[str, bool]]:
    """The example's text, special tokens visible, in runs of tokens that do or do not carry loss."""
    flags = _flags(example)
    borders = [index for index in range(1, len(flags)) if flags[index] != flags[index - 1]] + [len(flags)]
    segments: list[tuple[str, bool]] = []
    shown = ""
    for border in borders:
        # Decoded from the start each time: some decoders drop a space at the beginning of what they are given.
        text = renderer.decode(example.tokens[:border], skip_special=False)
        segments.append((text[len(shown) :], flags[border - 1]))
        shown = text
    return segments


def _flags(example: Example) -> list[bool]:
    """Whether each token carries loss, or has a tag."""
    learnt = example.weights > 0 if example.tags is None else example.tags != NO_CLASS
    return [bool(flag) for flag in learnt]


def _sample_as_json(row: CheckedRow, renderer: Renderer | None, report: DataReport) -> list[dict[str, Any]]:
    if renderer is None:
        return [{"place": row.place, "record": row.record.to_json()}]
    return [
        {
            "place": row.place,
            "num_tokens": example.num_tokens,
            "label": _label_of(example, report),
            "segments": [
                {"text": text, "supervised": flag}
                for side in _sides(example)
                for text, flag in supervised_segments(side, renderer)
            ],
        }
        for example in row.examples
    ]
