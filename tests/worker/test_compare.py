"""`luthier.compare`: the recipes that it makes, and one comparison as a user runs it, with a method that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.errors import RecipeError, RunError
from luthier.evaluate.comparison import MethodRow, common_metric, markdown, method_table
from luthier.evaluate.comparison_chart import comparison_chart
from luthier.worker.compare import METHODS, Comparison, recipes_for
from luthier.worker.progress import SilentProgress

DATA = Path(__file__).parents[1] / "methods" / "capitals.jsonl"
ROOT = Path(__file__).parents[2]


def values_for(base: Path | str, output: Path | str, **sections: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "task": "completion",
        "data": {"train": str(DATA), "validation": 0.25},
        "method": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"epochs": 40, "batch_size": 8, "learning_rate": 1e-3},  # long enough to be interrupted in
        "evaluation": {"rows": 6, "max_new_tokens": 4},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(output),
    } | sections


# -- the recipes


def test_methods_differ_and_nothing_else() -> None:
    recipes = recipes_for(values_for("b", "runs/x"), ["full", "lora", "qlora", "dora", "ia3", "prompt"])
    assert {name: recipe.output for name, recipe in recipes.items()} == {n: f"runs/x-compare/{n}" for n in recipes}
    rates = {name: recipe.train.learning_rate for name, recipe in recipes.items()}
    assert rates == {"full": 2e-5, "lora": 1e-3, "qlora": 1e-3, "dora": 1e-3, "ia3": 5e-3, "prompt": 3e-2}
    for name in ("lora", "qlora", "dora"):
        method = recipes[name].method.model_dump()
        assert (method["rank"], method["alpha"], method["dropout"]) == (4, 8.0, 0.1)
    dumps = [recipe.model_dump(exclude={"method", "output"}) for recipe in recipes.values()]
    for dump in dumps:
        dump["train"].pop("learning_rate")
    assert all(dump == dumps[0] for dump in dumps)


def test_the_recipes_own_method_keeps_its_rate_and_fields() -> None:
    recipe = values_for("b", "x", method={"type": "prompt", "virtual_tokens": 7}, train={"learning_rate": 0.2})
    recipes = recipes_for(recipe, ["prompt", "lora"])
    assert recipes["prompt"].train.learning_rate == 0.2
    assert recipes["prompt"].method.virtual_tokens == 7
    assert recipes["lora"].train.learning_rate == 5e-4


def test_overrides_hold_for_all_or_for_one() -> None:
    overrides = ["train.epochs=5", "dora:train.learning_rate=2e-4", "lora:method.rank=2", "peft:method.name=hra"]
    recipes = recipes_for(values_for("b", "x"), ["lora", "dora", "peft"], "out", overrides)
    assert {recipe.train.epochs for recipe in recipes.values()} == {5.0}
    assert [recipe.train.learning_rate for recipe in recipes.values()] == [1e-3, 2e-4, 1e-3]
    assert (recipes["lora"].method.rank, recipes["dora"].method.rank) == (2, 4)
    assert recipes["peft"].output == "out/peft"


@pytest.mark.parametrize(
    ("methods", "overrides", "message"),
    [
        ([], [], "no method to compare"),
        (["lroa"], [], r"'lroa' is not known \(did you mean 'lora'\?\)"),
        (["lora", "lora"], [], "named twice"),
        (["lora"], ["dora:method.rank=2"], "'dora' is none of the methods compared"),
        (["lora"], ["lora:train.epochs=9"], r"changes train\.epochs for lora alone"),
        (["lora"], ["lora:data.validation=0.5"], "changes data for lora alone"),
        (["lora", "full"], ["lora:method.type=dora"], "names another method"),
        (["lora"], ["lora:method.rnk=2"], r"method\.rnk is not a field"),
        (["lora"], ["start_from=runs/a"], "from the same start"),
    ],
)
def test_what_does_not_hold_is_refused_at_once(methods: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes_for(values_for("b", "x"), methods, None, overrides)


def test_usual_rates_are_those_of_the_methods_pages() -> None:
    told = {}
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            recipe = yaml.safe_load(block)
            if "method" in recipe and "learning_rate" in recipe.get("train", {}):
                method = recipe["method"]
                told[method if isinstance(method, str) else method.get("type", "lora")] = recipe["train"]
    assert len(told) >= 12
    for name, train in told.items():
        assert METHODS[name].usual_learning_rate == float(train["learning_rate"]), name


# -- the whole of it


class Listener(SilentProgress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps = 0
        self.interrupt_at = 0

    def stage(self, message: str) -> None:
        self.stages.append(message)

    def step(self, *given: Any) -> None:
        self.steps += 1
        if self.steps == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    @property
    def methods(self) -> list[str]:
        return [stage.split(",")[0] for stage in self.stages if ", method " in stage]


@pytest.fixture(scope="module")
def compared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Listener]:
    """lora, one that the base cannot take, and full: interrupted in the first, and gone on with."""
    output = tmp_path_factory.mktemp("compare") / "out"
    listener = Listener()
    listener.interrupt_at = 2
    call: dict[str, Any] = {"output": output, "overrides": ["dora:method.rank=33"], "progress": listener}
    with pytest.raises(KeyboardInterrupt):
        luthier.compare(values_for(tiny_llama, "unused"), ["lora", "dora", "full"], **call)
    assert json.loads((output / "lora/state.json").read_text())["status"] == "interrupted"
    return luthier.compare(values_for(tiny_llama, "unused"), ["lora", "dora", "full"], **call), listener


def test_a_failed_method_is_told_and_the_others_go_on(compared: tuple[Comparison, Listener]) -> None:
    comparison, _ = compared
    assert [(row.method, bool(row.problem)) for row in comparison.rows] == [
        ("lora", False),
        ("dora", True),
        ("full", False),
    ]
    assert comparison.failed == ["dora"]
    assert "method.rank is 33" in comparison.rows[1].problem
    text = comparison.table.read_text()
    assert re.search(r"\| dora \| 0.001 \|.*failed", text)
    assert "- dora failed: method.rank is 33" in text
    assert "18 training rows" in text
    assert "6 held-out rows" in text
    told = json.loads((comparison.folder / "compare.json").read_text())
    assert told == comparison.to_json()
    assert [row["status"] for row in told["rows"]] == ["done", "failed", "done"]


def test_rows_say_what_each_took_and_gave(compared: tuple[Comparison, Listener]) -> None:
    lora, _, full = compared[0].rows
    for row in (lora, full):
        run = Path(row.folder)
        result = json.loads((run / "result.json").read_text())
        assert row.num_trainable_parameters == result["num_trainable_parameters"]
        assert row.peak_memory_bytes == result["peak_memory_bytes"]
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 0
        assert row.evaluation["tuned"]["loss"]["value"] < row.evaluation["base"]["loss"]["value"]
    assert lora.saved_bytes == (Path(lora.folder) / "adapter/adapter_model.safetensors").stat().st_size
    assert full.saved_bytes == (Path(full.folder) / "model/model.safetensors").stat().st_size
    assert lora.num_trained_tokens == full.num_trained_tokens
    assert lora.evaluation["base"]["loss"]["value"] == pytest.approx(full.evaluation["base"]["loss"]["value"], rel=1e-5)
    assert compared[0].chart is not None
    assert compared[0].chart.read_bytes().startswith(b"\x89PNG")


def test_finished_methods_are_not_run_again(compared: tuple[Comparison, Listener], tiny_llama: Path) -> None:
    comparison, listener = compared
    assert listener.methods == ["lora", "lora", "dora", "full"]
    again = Listener()
    values = values_for(tiny_llama, "unused")
    mended = luthier.compare(values, ["lora", "full", "ia3"], output=comparison.folder, progress=again)
    assert again.methods == ["ia3"]
    assert mended.failed == []
    assert mended.rows[0] == comparison.rows[0]


def test_another_recipe_is_refused_before_anything_runs(
    compared: tuple[Comparison, Listener], tiny_llama: Path
) -> None:
    again = Listener()
    with pytest.raises(RunError, match=r"lora was started with another recipe:\n  train\.learning_rate") as caught:
        luthier.compare(
            values_for(tiny_llama, "unused"),
            ["ia3", "lora"],
            output=compared[0].folder,
            overrides=["lora:train.learning_rate=5e-3"],
            progress=again,
        )
    assert "to train lora anew" in caught.value.fix
    assert again.stages == []


def test_the_comparing_process_loads_no_torch() -> None:
    code = "import sys, luthier.worker.compare; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- table and chart


def row_of(method: str, exact: float | None, **facts: Any) -> MethodRow:
    score = {"value": exact, "low": 0.2, "high": 0.9, "rows": 20}
    loss = {"value": 1.5, "low": 1.0, "high": 2.0, "rows": 20}
    scores = {"loss": loss} if exact is None else {"loss": loss, "exact_match": score}
    evaluation = {"num_rows": 20, "base": scores, "tuned": scores}
    return MethodRow(method, "nowhere", 5e-4, evaluation=evaluation, **facts)


def test_the_metric_is_one_that_all_finished_methods_have() -> None:
    failed = MethodRow("boft", "nowhere", 1e-3, problem="no\n  room")
    assert common_metric([row_of("a", 0.5), failed, row_of("b", 0.4)]) == "exact_match"
    assert common_metric([row_of("a", 0.5), row_of("b", None)]) == "loss"
    assert common_metric([failed]) is None
    header, first, second = method_table([row_of("a", 0.5, num_trainable_parameters=1234), failed])
    assert header[-3:] == ["base exact match", "tuned exact match", "verdict"]
    assert first[2] == "1,234"
    assert first[-2] == "50.0% (20.0 to 90.0)"
    assert second == ["boft", "0.001", *["-"] * 6, "failed"]
    assert "- boft failed: no room" in markdown([failed])


def test_a_chart_is_drawn_of_what_is_known() -> None:
    rows = [row_of("a", 0.5, num_trainable_parameters=10, saved_bytes=40), row_of("b", 0.4)]
    picture = comparison_chart([*rows, MethodRow("c", "nowhere", 1e-3, problem="no")])
    assert picture.startswith(b"\x89PNG")
    assert picture != comparison_chart(rows)
