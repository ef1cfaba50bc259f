"""Each task on real sets: base, a naive baseline and the tuned model, on the test rows.

    python benchmarks/scenarios.py --data DIR                      every set that has a recipe and stands under DIR
    python benchmarks/scenarios.py --data DIR wnut17 xquad_en      these alone
    python benchmarks/scenarios.py --data DIR wnut17 --on-split    judged on a part of the training rows: for choosing
    python benchmarks/scenarios.py --data DIR wnut17 --set train.max_steps=60

A set is a folder DIR/*/NAME with train.jsonl and test.jsonl, whose columns are those of its task; its recipe is
benchmarks/scenarios/NAME.yaml, without paths. The test rows take no part in choosing anything: no checkpoint is kept
by them, and no run is stopped. What is done already is not done again: each set's figures stand in OUT/NAME.json, and a
run that was cut short goes on. The table of all that is done is written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from naive import naive_baseline

import luthier
from luthier.data.files import open_rows
from luthier.data.lines import Row
from luthier.evaluate.summary import format_score, format_value, label, score_of
from luthier.recipe import Recipe, load_recipe
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import Shaper
from luthier.worker.run_folder import RunFolder

RECIPES = Path(__file__).parent / "scenarios"
SPLIT = 0.15
"""Share of the training rows that choosing is done on."""
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
    """Run the sets, one after the other, and write the table."""
    options = _options()
    out = Path(options.output)
    names = options.sets or sorted(path.stem for path in RECIPES.glob("*.yaml") if _folder(options.data, path.stem))
    for name in names:
        kept = out / f"{name}{'-split' if options.on_split else ''}.json"
        if not kept.exists():
            figures = run_set(name, options.data, out, on_split=options.on_split, overrides=options.overrides)
            kept.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(row_of(json.loads(kept.read_text(encoding="utf-8"))), flush=True)
    (out / "table.md").write_text(table(out), encoding="utf-8")


def run_set(name: str, data: str, out: Path, *, on_split: bool, overrides: list[str]) -> dict[str, Any]:
    """Train and judge one set, or go on with it.

    Returns:
        All that the table shows of it.
    """
    folder = _folder(data, name)
    if folder is None:
        sys.exit(f"there is no folder {data}/*/{name} with train.jsonl and test.jsonl")
    run = out / f"{name}{'-split' if on_split else ''}"
    recipe = recipe_of(name, folder, run, on_split, overrides)
    result = luthier.train(recipe, resume=RunFolder(run).has_state)
    task, (train, test) = _records(recipe, folder)
    metric = "accuracy" if recipe.task.type == "qa" and recipe.task.choices else METRICS[recipe.task.type]
    naive = None if on_split else naive_baseline(task, train, test)
    return {
        "set": name,
        "task": recipe.task.type,
        "metric": metric,
        "rows": [len(train), result.evaluation["num_rows"]],
        "judged_on": "a split of train" if on_split else "test",
        "steps": result.result["num_steps"],
        "tokens": result.result["num_trained_tokens"],
        "tokens_per_second": result.result["tokens_per_second"],
        "training_minutes": result.result["seconds"].get("training", 0.0) / 60,
        "minutes": sum(result.result["seconds"].values()) / 60,
        "device": result.result["device"],
        "base": score_of(result.evaluation, "base", metric),
        "tuned": score_of(result.evaluation, "tuned", metric),
        "naive": {"name": naive[0], "value": naive[1]} if naive else None,
        "others": {name: score_of(result.evaluation, "tuned", name) for name in result.evaluation["tuned"]},
        "signatures": result.evaluation.get("signatures"),
    }


def recipe_of(name: str, folder: Path, run: Path, on_split: bool, overrides: list[str]) -> Recipe:
    """The set's recipe with its paths; on test rows nothing is chosen."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values["data"] = {
        **values.get("data", {}),
        "train": str(folder / "train.jsonl"),
        "validation": SPLIT if on_split else str(folder / "test.jsonl"),
    }
    values["output"] = str(run)
    values["evaluation"] = {"rows": 1_000_000, **values.get("evaluation", {})}
    values["train"] = {"checkpoint_every": 25, **values.get("train", {})}
    if not on_split:
        values["train"] |= {"keep_best": False, "early_stopping": None}
        values["evaluation"]["every"] = 1_000_000
    return load_recipe(values, overrides)


def table(out: Path) -> str:
    """The figures of every set that is done, as Markdown."""
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    head = "| set | task | rows | minutes | tokens/s | metric | base | naive | tuned (95%) |\n|" + "---|" * 9
    return "\n".join([head, *(row_of(figures) for figures in done)]) + "\n"


def row_of(figures: dict[str, Any]) -> str:
    """One line of the table."""
    metric, naive = figures["metric"], figures["naive"]
    cells = [
        figures["set"] + ("" if figures["judged_on"] == "test" else " (split)"),
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


def _folder(data: str, name: str) -> Path | None:
    found = [path for path in sorted(Path(data).glob(f"*/{name}")) if (path / "train.jsonl").is_file()]
    return found[0] if found else None


def _records(recipe: Recipe, folder: Path) -> tuple[Any, list[list[Any]]]:
    """The task with its labels, and the records of both files."""
    task = task_for(recipe.task)
    shaper = Shaper(task.name, recipe.data.format, recipe.data.fields, recipe.data.template)
    parts = []
    for part in ("train", "test"):
        rows = [row for row in open_rows(folder / f"{part}.jsonl") if isinstance(row, Row)]
        parts.append([task.parse(shaper.shape(row.values)) for row in rows])
    labels = sorted({label for record in parts[0] for label in task.labels_of(record)})
    return (task.with_labels(labels) if labels else task), parts


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="names of sets; all where none is given")
    parser.add_argument("--data", required=True, help="the folder with the sets")
    parser.add_argument("--output", default="runs/scenarios", help="where runs and figures go")
    parser.add_argument("--on-split", action="store_true", help="judge on a part of the training rows instead of test")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
