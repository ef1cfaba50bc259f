"""Each task on real sets: base, a naive baseline and the tuned model, on the test rows.

    python benchmarks/scenarios.py --data DIR                      every set that has a recipe and stands under DIR
    python benchmarks/scenarios.py --data DIR wnut17 xquad_en      these alone
    python benchmarks/scenarios.py --data DIR wnut17 --on-split    judged on a part of the training rows: for choosing
    python benchmarks/scenarios.py --data DIR wnut17 --set train.max_steps=60
    python benchmarks/scenarios.py --data DIR --search --parallel 12 --seconds 540

A set is a folder DIR/*/NAME with train.jsonl and test.jsonl, whose columns are those of its task; its recipe is
benchmarks/scenarios/NAME.yaml, without paths. The test rows take no part in choosing anything: no checkpoint is kept
by them, and no run is stopped. What is done already is not done again: each set's figures stand in OUT/NAME.json, and a
run that was cut short goes on. The table of all that is done is written to OUT/table.md.

A recipe may have a section `choosing`: which rows of train are the split, and variants of the recipe by name, each
with the fields that it changes. `--search` runs all of them on the split, then the best on test, several at once: for
a GPU, which one small model does not fill. The variants' figures stand in OUT/split, and in OUT/variants.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from scenario_search import Choice, Search, Work
from scenario_split import write_split

RECIPES = Path(__file__).parent / "scenarios"
AS_IT_IS = "recipe"
"""The variant that changes nothing."""
METRICS = {
    "classification": "accuracy",
    "tagging": "f1",
    "translation": "chrf",
    "qa": "f1",
    "music": "bars_fit",
    "art": "iou",
    "chat": "loss",
    "completion": "loss",
    "text": "perplexity",
}


def main() -> None:
    """Run the sets, and write the tables."""
    options = _options()
    out = Path(options.output)
    names = options.sets or sorted(path.stem for path in RECIPES.glob("*.yaml") if find_set(options.data, path.stem))
    failed = search(names, options) if options.search else []
    for name in () if options.search else names:
        work = Work(name, options.variant, options.on_split)
        kept = work.figures(out)
        if not kept.exists():
            figures = run_set(work, options.data, out, options.overrides)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            # Moments are large, and nothing goes on from here; of a variant the figures alone are kept.
            shutil.rmtree(work.run(out) if work.on_split else work.run(out) / "checkpoints")
        print(row_of(json.loads(kept.read_text(encoding="utf-8"))), flush=True)
    if not options.quiet:
        (out / "table.md").write_text(table(out), encoding="utf-8")
        (out / "variants.md").write_text(table(out / "split"), encoding="utf-8")
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(work.label for work in failed)}")


def search(names: list[str], options: argparse.Namespace) -> list[Work]:
    """Run every variant of the sets on their splits, and the best on test; returns the works that failed."""

    def command(work: Work) -> list[str]:
        words = [sys.executable, __file__, "--data", options.data, "--output", options.output, "--quiet", work.name]
        words += ["--variant", work.variant, *(["--on-split"] if work.on_split else [])]
        return words + [word for override in options.overrides for word in ("--set", override)]

    choices = [Choice(name, tuple(variants_of(name))) for name in names]
    out = Path(options.output)
    found = Search(
        choices, out, command, options.parallel, options.seconds, options.choose_after, lambda t: print(t, flush=True)
    )
    return found.run()


def variants_of(name: str) -> dict[str, dict[str, Any]]:
    """The set's variants by name: what each changes in the recipe, field by field."""
    return {AS_IT_IS: {}, **_read(name).get("choosing", {}).get("variants", {})}


def run_set(work: Work, data: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and judge one set, or go on with it.

    Returns:
        All that the table shows of it.
    """
    # Here: a search starts many processes, and needs none of this itself.
    import luthier
    from luthier.evaluate.summary import score_of
    from luthier.worker.run_folder import RunFolder

    folder = find_set(data, work.name)
    if folder is None:
        sys.exit(f"there is no folder {data}/*/{work.name} with train.jsonl and test.jsonl")
    run = work.run(out)
    recipe = recipe_of(work, folder, run, overrides)
    result = luthier.train(recipe, resume=RunFolder(run).has_state)
    train, held_out = (read_records(recipe, path) for path in (recipe.data.train, recipe.data.validation))
    metric = "accuracy" if recipe.task.type == "qa" and recipe.task.choices else METRICS[recipe.task.type]
    seconds = result.result["seconds"]
    return {
        "set": work.name,
        "variant": work.variant,
        "changes": variants_of(work.name)[work.variant],
        "task": recipe.task.type,
        "metric": metric,
        "rows": [len(train), result.evaluation["num_rows"]],
        "judged_on": "a split of train" if work.on_split else "test",
        "steps": result.result["num_steps"],
        "tokens": result.result["num_trained_tokens"],
        "tokens_per_second": result.result["tokens_per_second"],
        "training_minutes": seconds.get("training", 0.0) / 60,
        "minutes": sum(seconds.values()) / 60,
        "device": result.result["device"],
        "base": score_of(result.evaluation, "base", metric),
        "tuned": score_of(result.evaluation, "tuned", metric),
        "naive": _naive(recipe, train, held_out),
        "others": {
            who: {name: score_of(result.evaluation, who, name) for name in result.evaluation[who] if name != "num_rows"}
            for who in ("base", "tuned")
        },
        "signatures": result.evaluation.get("signatures"),
    }


def recipe_of(work: Work, folder: Path, run: Path, overrides: list[str]) -> Any:
    """The set's recipe with its paths. Nothing is chosen by the rows that are judged, not even a checkpoint."""
    from luthier.recipe import load_recipe

    values = _read(work.name)
    choosing = values.pop("choosing", {})
    train, held_out = folder / "train.jsonl", folder / "test.jsonl"
    if work.on_split:
        place = run.parents[1] / "splits" / work.name
        train, held_out = write_split(train, place, choosing.get("share", 0.15), choosing.get("by"))
    values["data"] = {**values.get("data", {}), "train": str(train), "validation": str(held_out)}
    values["output"] = str(run)
    values["train"] = {"checkpoint_every": 100, **values.get("train", {}), "keep_best": False, "early_stopping": None}
    judged = choosing.get("evaluation", {}) if work.on_split else {}
    values["evaluation"] = {"rows": 1_000_000, **values.get("evaluation", {}), **judged, "every": 1_000_000}
    # JSON is YAML, which an override's value is read as.
    changes = [f"{name}={json.dumps(value)}" for name, value in variants_of(work.name)[work.variant].items()]
    return load_recipe(values, [*changes, *overrides])


def table(out: Path) -> str:
    """The figures of every set that is done, as Markdown."""
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    head = "| set | task | rows | minutes | tokens/s | metric | base | naive | tuned (95%) |\n|" + "---|" * 9
    return "\n".join([head, *(row_of(figures) for figures in done)]) + "\n"


def row_of(figures: dict[str, Any]) -> str:
    """One line of the table."""
    from luthier.evaluate.summary import format_score, format_value, label

    metric, naive = figures["metric"], figures["naive"]
    cells = [
        figures["set"] + ("" if figures["judged_on"] == "test" else f" ({figures['variant']}, split)"),
        figures["task"],
        " / ".join(f"{count:,}" for count in figures["rows"]),
        f"{figures['training_minutes']:.1f} + {figures['minutes'] - figures['training_minutes']:.1f}",
        f"{figures['tokens_per_second'] or 0:,.0f}",
        label(metric),
        "-" if figures["base"] is None else format_value(metric, figures["base"]["value"]),
        f"{format_value(metric, naive['value'])} ({naive['name']})" if naive else "-",
        format_score(metric, figures["tuned"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def find_set(data: str, name: str) -> Path | None:
    """The folder DATA/*/NAME of a set; None where there is none."""
    found = [path for path in sorted(Path(data).glob(f"*/{name}")) if (path / "train.jsonl").is_file()]
    return found[0] if found else None


def read_records(recipe: Any, path: str) -> list[Any]:
    """The records of a file as the recipe's task reads them."""
    from luthier.data.files import open_rows
    from luthier.data.lines import Row
    from luthier.tasks.registry import task_for
    from luthier.tasks.shapes import Shaper

    task = task_for(recipe.task)
    shaper = Shaper(task.name, recipe.data.format, recipe.data.fields, recipe.data.template)
    return [task.parse(shaper.shape(row.values)) for row in open_rows(path) if isinstance(row, Row)]


def _naive(recipe: Any, train: list[Any], held_out: list[Any]) -> dict[str, Any] | None:
    """The naive baseline on the rows that were judged."""
    from naive import naive_baseline

    from luthier.tasks.registry import task_for

    task = task_for(recipe.task)
    labels = sorted({label for record in train for label in task.labels_of(record)})
    found = naive_baseline(task.with_labels(labels) if labels else task, train, held_out)
    return None if found is None else {"name": found[0], "value": found[1]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="names of sets; all where none is given")
    parser.add_argument("--data", required=True, help="the folder with the sets")
    parser.add_argument("--output", default="runs/scenarios", help="where runs and figures go")
    parser.add_argument("--on-split", action="store_true", help="judge on a part of the training rows instead of test")
    parser.add_argument("--variant", default=AS_IT_IS, help="a variant of the recipe's `choosing`")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--search", action="store_true", help="all variants on the split, then the best on test")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="--search: most processes at once")
    parser.add_argument("--seconds", type=float, metavar="S", help="--search: end after so long; done runs stay")
    parser.add_argument("--choose-after", type=float, metavar="S", help="--search: from then on test, by what is done")
    parser.add_argument("--quiet", action="store_true", help="write no table")
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
