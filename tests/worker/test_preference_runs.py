"""Preference recipes as a user runs them: pairs in, an adapter out that prefers what was chosen."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier.errors import DataError
from luthier.recipe import load_recipe
from luthier.worker.predict_file import predict_file
from luthier.worker.progress import SilentProgress
from luthier.worker.train import train_here

WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]


def rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first of three words is the better reply, the last the worse one."""
    draw = random.Random(seed)
    words = [draw.sample(WORDS, 3) for _ in range(num_rows)]
    return [{"prompt": " ".join(three), "chosen": three[0], "rejected": f"{three[2]} {three[1]}"} for three in words]


def recipe_for(base: Path, folder: Path, name: str = "run", **sections: Any) -> dict[str, Any]:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(40)), encoding="utf-8")
    train = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "max_length": 128} | sections.pop("train", {})
    return {
        "base": str(base),
        "task": {"type": "preference", "beta": 0.5},
        "data": {"train": str(data), "validation": 0.2},
        "method": sections.pop("method", {"type": "lora", "rank": 4, "alpha": 8}),
        "train": train,
        "evaluation": {"rows": 8, "generate_rows": 2, "max_new_tokens": 4} | sections.pop("evaluation", {}),
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / name),
        **sections,
    }


def recipe_method(method: Any) -> str:
    return str(method if isinstance(method, str) else method["type"])


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def margins_of(run: Path) -> dict[str, Any]:
    with np.load(run / "reference.npz") as kept:
        return {name: kept[name] for name in ("train", "validation")}


class Impatient(SilentProgress):
    """Presses Ctrl-C after some steps."""

    def step(self, job: str, step: int, *rest: Any) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_learns_what_is_preferred_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(tiny_llama, tmp_path, evaluation={"rows": 7}))
    assert result.status == "done"
    assert losses_of(result.folder)[0] == pytest.approx(math.log(2), abs=1e-5)
    base, tuned = result.evaluation["base"], result.evaluation["tuned"]
    assert set(base) == {"loss", "preference_accuracy", "ranking_accuracy", "reward_margin"}
    # The reference is the base: it gains nothing over itself, however the rows judged are batched.
    assert base["preference_accuracy"]["value"] == 0.5
    assert base["reward_margin"]["value"] == 0.0
    assert base["loss"]["value"] == pytest.approx(math.log(2), abs=1e-12)
    assert tuned["preference_accuracy"]["value"] > 0.8
    assert tuned["reward_margin"]["low"] <= tuned["reward_margin"]["value"] <= tuned["reward_margin"]["high"]
    assert tuned["loss"]["value"] < base["loss"]["value"] - 0.1
    assert result.evaluation["comparison"]["reward_margin"]["verdict"] == "better"
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in metrics if line["kind"] == "evaluation"]
    assert {"loss", "preference_accuracy", "reward_margin", "ranking_accuracy"} <= validation[-1].keys()
    report = (result.folder / "report.html").read_text()
    assert "Preference accuracy on 7 held-out rows" in report
    assert "nats a pair" in report
    lines = [json.loads(line) for line in (result.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["tuned_correct"] for line in lines] == [None, None]
    facts = json.loads((result.folder / "data.json").read_text())
    assert facts["format"] == "preference"
    assert facts["train"]["num_examples"] == facts["train"]["num_rows"] == 32


def test_judging_again_asks_the_same_reference(tiny_llama: Path, tmp_path: Path) -> None:
    first = luthier.train(recipe_for(tiny_llama, tmp_path, "first"))
    second = luthier.train(recipe_for(tiny_llama, tmp_path, "second", start_from=str(first.folder)))
    for result in (first, second):
        again = luthier.evaluate_run(result.folder)
        for who in ("base", "tuned"):
            for name, score in result.evaluation[who].items():
                assert again[who][name]["value"] == pytest.approx(score["value"], abs=1e-5), (who, name)


@pytest.mark.parametrize("method", ["full", {"type": "loha"}], ids=recipe_method)
def test_a_job_that_owned_its_base_is_judged_again(method: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """The reference of trained weights is the base, loaded beside them."""
    recipe = load_recipe(recipe_for(tiny_llama, tmp_path, method=method, train={"learning_rate": 3e-3}))
    result = train_here(recipe, resume=False, progress=SilentProgress())
    again = luthier.evaluate_run(result.folder)
    for who in ("base", "tuned"):
        for name, score in result.evaluation[who].items():
            assert again[who][name]["value"] == pytest.approx(score["value"], abs=1e-5), (who, name)


def test_a_job_that_goes_on_is_held_to_where_it_starts(tiny_llama: Path, tmp_path: Path) -> None:
    first = luthier.train(recipe_for(tiny_llama, tmp_path, "first"))
    second = luthier.train(recipe_for(tiny_llama, tmp_path, "second", start_from=str(first.folder)))
    assert losses_of(second.folder)[0] == pytest.approx(math.log(2), abs=1e-5)
    before, after = margins_of(first.folder)["train"], margins_of(second.folder)["train"]
    assert (after > before).mean() > 0.9  # the start prefers already


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "rank": 4, "dropout": 0.1},
        "full",
        {"type": "prompt", "virtual_tokens": 4},
        {"type": "loha"},
    ],
    ids=recipe_method,
)
def test_an_interrupted_run_resumes_to_the_same_bytes(method: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """With the reference kept, and with it lost: then it is asked again before the checkpoint comes in."""
    train = {"learning_rate": 3e-3, "epochs": 2}
    whole = train_here(
        load_recipe(recipe_for(tiny_llama, tmp_path, "whole", method=method, train=train)),
        resume=False,
        progress=SilentProgress(),
    )
    begins_as_the_base = recipe_method(method) != "prompt"  # virtual tokens say something from the start
    assert (losses_of(whole.folder)[0] == pytest.approx(math.log(2), abs=1e-4)) == begins_as_the_base
    for is_lost in (False, True):
        recipe = load_recipe(recipe_for(tiny_llama, tmp_path, f"cut-{is_lost}", method=method, train=train))
        with pytest.raises(KeyboardInterrupt):
            train_here(recipe, resume=False, progress=Impatient())
        if is_lost:
            (Path(recipe.output) / "reference.npz").unlink()
        again = train_here(recipe, resume=True, progress=SilentProgress())
        for name, margins in margins_of(whole.folder).items():
            assert np.array_equal(margins_of(again.folder)[name], margins)
        assert losses_of(again.folder) == losses_of(whole.folder)
        assert {p.name: p.read_bytes() for p in again.tuned.glob("*.safetensors")} == {
            p.name: p.read_bytes() for p in whole.tuned.glob("*.safetensors")
        }


def test_a_reference_of_other_pairs_is_not_taken(tiny_llama: Path, tmp_path: Path) -> None:
    """A run that was stopped before its first checkpoint, whose data then changed."""
    recipe = recipe_for(tiny_llama, tmp_path, train={"max_steps": 1})
    result = luthier.train(recipe)
    kept = result.folder / "reference.npz"
    other = luthier.train(recipe_for(tiny_llama, tmp_path, "other", train={"max_steps": 1, "seed": 7}))
    kept.write_bytes((other.folder / "reference.npz").read_bytes())
    for path in sorted((result.folder / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (result.folder / "result.json").unlink()
    again = luthier.train(recipe, resume=True)
    assert losses_of(again.folder)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_predictions_and_chat_work_as_with_chat(tiny_llama: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(tiny_llama, tmp_path))
    asked = tmp_path / "asked.jsonl"
    [row, *_] = rows(1, seed=5)
    asked.write_text(json.dumps({"prompt": row["prompt"]}) + "\n" + json.dumps(row) + "\n" + '{"text": "?"}\n')
    predict_file(result.folder, asked, tmp_path / "out.jsonl", max_new_tokens=4)
    first, second, third = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["reply"] == second["reply"]
    assert "prompt" in third["error"]
    chat = luthier.open_chat(result.folder)
    said = "".join(chat.reply([{"role": "user", "content": row["prompt"]}], max_new_tokens=4))
    assert said.strip() == first["reply"].strip()


def test_bad_pairs_stop_the_run_with_their_lines(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path)
    with Path(recipe["data"]["train"]).open("a") as file:
        file.write('{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match="line 41") as caught:
        luthier.train(recipe)
    assert "line 42" in str(caught.value)
    assert not (tmp_path / "run" / "reference.npz").exists()
