"""The scenarios' recipes hold with all their variants, and the search runs, chooses, is cut off and goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scenario_search import Choice, Search, Work  # noqa: E402
from scenario_split import write_split  # noqa: E402
from scenarios import RECIPES, recipe_of, variants_of  # noqa: E402

# -- recipes


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_variant_holds(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"doc": n, "pep": n, "context": n}) + "\n" for n in range(9))
    )
    recipes = []
    for variant in variants_of(name):
        work = Work(name, variant, on_split=True)
        recipe = recipe_of(work, folder, work.run(tmp_path), [])
        assert recipe.train.max_length >= 256
        assert not recipe.train.keep_best
        assert Path(recipe.data.validation).name == "held_out.jsonl"
        recipes.append(recipe.model_copy(update={"output": ""}))
    assert all(recipe != other for n, recipe in enumerate(recipes) for other in recipes[:n])


def test_test_rows_are_judged_whole_and_choose_nothing(tmp_path: Path) -> None:
    work = Work("wnut17", "recipe", on_split=False)
    recipe = recipe_of(work, tmp_path, work.run(tmp_path), ["train.epochs=1"])
    assert recipe.data.validation == str(tmp_path / "test.jsonl")
    assert (recipe.train.keep_best, recipe.train.early_stopping, recipe.train.epochs) == (False, None, 1)
    assert recipe.evaluation.rows == recipe.evaluation.every == 1_000_000


# -- split


def test_a_split_keeps_groups_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a\u2028{n}", "doc": n // 5} for n in range(100)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    parts = [
        [json.loads(line) for line in part.read_text(encoding="utf-8").split("\n") if line]
        for part in write_split(path, tmp_path / "split", 0.2, "doc")
    ]
    assert [len(part) for part in parts] == [80, 20]
    assert not {row["doc"] for row in parts[0]} & {row["doc"] for row in parts[1]}
    assert sorted(parts[0] + parts[1], key=lambda row: int(row["text"][2:])) == rows


def test_a_split_by_order_takes_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(10)))
    _, held_out = write_split(path, tmp_path / "split", 0.3, "order")
    assert [json.loads(line)["text"] for line in held_out.read_text().splitlines()] == ["7", "8", "9"]


# -- search

RUN = """
import json, sys, time
from pathlib import Path
path, metric, value, seconds = sys.argv[1:]
if seconds == "fail":
    sys.exit("it does not hold")
time.sleep(float(seconds))
score = {"value": float(value)}
Path(path).write_text(json.dumps({"metric": metric, "base": None, "tuned": score}))
"""


def make_search(out: Path, runs: dict[str, dict[str, tuple[str, float, str]]], **options: float) -> Search:
    """A search over sets whose runs sleep and then have a figure.

    Args:
        runs: Set -> variant -> (metric, value, seconds on the split, or "fail").
    """

    def command(work: Work) -> list[str]:
        metric, value, seconds = runs[work.name][work.variant]
        words = [metric, str(value), seconds if work.on_split else "0"]
        return [sys.executable, "-c", RUN, str(work.figures(out)), *words]

    choices = [Choice(name, tuple(variants)) for name, variants in runs.items()]
    return Search(choices, out, command, num_processes=4, say=lambda text: None, **options)  # type: ignore[arg-type]


def on_test(out: Path, name: str) -> float:
    return float(json.loads((out / f"{name}.json").read_text())["tuned"]["value"])


def test_the_best_of_each_set_goes_to_test(tmp_path: Path) -> None:
    runs = {
        "high": {"recipe": ("f1", 0.2, "0"), "other": ("f1", 0.6, "0"), "bad": ("f1", 9.0, "fail")},
        "equal": {"recipe": ("f1", 0.5, "0"), "zealous": ("f1", 0.5, "0")},
        "low": {"recipe": ("perplexity", 20.0, "0"), "other": ("perplexity", 12.0, "0")},
        "broken": {"recipe": ("f1", 1.0, "fail"), "other": ("f1", 1.0, "fail")},
        "alone": {"recipe": ("f1", 0.3, "fail")},
    }
    failed = make_search(tmp_path, runs).run()
    assert [work.label for work in failed] == ["broken.other", "broken.recipe", "high.bad"]
    assert "it does not hold" in (tmp_path / "logs/high.bad.log").read_text()
    assert (on_test(tmp_path, "high"), on_test(tmp_path, "low")) == (0.6, 12.0)
    assert Choice("equal", ("recipe", "zealous")).best(tmp_path) == "recipe"
    assert not (tmp_path / "broken.json").exists()
    assert on_test(tmp_path, "alone") == 0.3  # nothing to choose from: no split is run


def test_what_is_done_at_the_end_of_the_time_stays(tmp_path: Path) -> None:
    runs = {"one": {"recipe": ("f1", 0.2, "0"), "slow": ("f1", 0.9, "600")}}
    began = time.monotonic()
    assert make_search(tmp_path, runs, seconds=8.0).run() == []
    assert time.monotonic() - began < 60
    assert (tmp_path / "split/one.recipe.json").exists()
    assert not (tmp_path / "one.json").exists()
    done_at = os.stat(tmp_path / "split/one.recipe.json").st_mtime_ns

    make_search(tmp_path, runs, seconds=20.0, choose_after=0.0).run()
    assert on_test(tmp_path, "one") == 0.2
    assert os.stat(tmp_path / "split/one.recipe.json").st_mtime_ns == done_at
