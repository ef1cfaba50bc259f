"""Runs on an encoder: several jobs at once, judged, resumed, predicted for, exported; what is refused beforehand."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import write_tiny_encoder
from typer.testing import CliRunner
from worker.test_train import steps_of

import luthier
from luthier.cli.main import app
from luthier.errors import ModelError, RecipeError
from luthier.worker.chat import open_chat
from luthier.worker.export import export_run
from luthier.worker.predict_file import predict_file
from luthier.worker.progress import SilentProgress

PLACES = ["Paris", "Oslo", "Rome", "東京"]
CLASSES = ["weather", "travel", "food"]
WORDS = {"weather": ["W", "V"], "travel": ["T"], "food": ["F"]}
"""Words of one token, which a tiny random model learns to tell apart in a few steps."""
FILLERS = ["!", "?", "."]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "modernbert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("models") / "bert", "bert")


def rows_of(task: str, num_rows: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(num_rows):
        label, filler, place = draw.choice(CLASSES), draw.choice(FILLERS), draw.choice(PLACES)
        text = f"{draw.choice(WORDS[label])} {filler}"
        if task == "tagging":
            words = [*text.split(), "in", place]
            rows.append({"tokens": words, "tags": ["O"] * (len(words) - 1) + ["B-place"]})
        elif task == "labels":
            other = draw.choice(CLASSES)
            rows.append({"text": f"{text} {draw.choice(WORDS[other])}", "label": sorted({label, other})})
        else:
            rows.append({"text": text, "label": label})
    return rows


TASKS: dict[str, Any] = {
    "classification": "classification",
    "labels": {"type": "classification", "multiple": True},
    "tagging": "tagging",
}


def recipe_for(base: Path, folder: Path, task: str, name: str = "", **sections: Any) -> dict[str, Any]:
    files = {}
    for part, num_rows, seed in (("train", 48, 1), ("validation", 12, 2)):
        path = folder / f"{task}-{part}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(task, num_rows, seed)))
        files[part] = str(path)
    return {
        "base": str(base),
        "task": TASKS.get(task, task),
        "data": files,
        "method": {"type": "lora", "rank": 16, "alpha": 32} | sections.pop("method", {}),
        "train": {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3} | sections.pop("train", {}),
        "evaluation": {"rows": 12},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / (name or task)),
        **sections,
    }


SCORE = {"classification": "accuracy", "labels": "micro_f1", "tagging": "f1"}


@pytest.mark.usefixtures("no_reports")
def test_jobs_of_every_kind_train_together_and_are_used(base: Path, tmp_path: Path) -> None:
    results = luthier.train([recipe_for(base, tmp_path, task) for task in TASKS])
    assert [result.status for result in results] == ["done"] * 3
    for task in TASKS:
        run = tmp_path / task
        losses = [step["loss"] for step in steps_of(run)]
        assert losses[-1] < 0.7 * losses[0]
        scores = json.loads((run / "eval.json").read_text())
        assert scores["tuned"]["loss"]["value"] < scores["base"]["loss"]["value"]
        assert scores["tuned"][SCORE[task]]["value"] > max(0.6, scores["base"][SCORE[task]]["value"])
        # What is predicted is what was judged.
        predict_file(run, tmp_path / f"{task}-validation.jsonl", tmp_path / "out.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        judged = [json.loads(line)["tuned"] for line in (run / "predictions.jsonl").read_text().splitlines()]
        if task == "classification":
            assert [line["label"] for line in lines] == judged
        elif task == "labels":
            assert [", ".join(sorted(line["labels"])) or "(none)" for line in lines] == judged
        else:
            assert ["\n".join(f"{s['text']} [{s['label']}]" for s in line["spans"]) for line in lines] == judged
    assert "last token" not in (tmp_path / "classification" / "README.md").read_text()


@pytest.mark.usefixtures("no_reports")
def test_the_card_s_lines_and_transformers_alone_predict_the_same(base: Path, tmp_path: Path) -> None:
    """From the adapter by the lines of the run's card, and from the merged model, by tokens of AutoTokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = luthier.train(recipe_for(base, tmp_path, "classification", train={"epochs": 2})).folder
    predict_file(run, tmp_path / "classification-validation.jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows_of("classification", 12, 2)]

    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    export_run(run, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for model, tokenizer in (
        (names["model"].eval(), names["tokenizer"]),
        (merged, AutoTokenizer.from_pretrained(tmp_path / "merged")),
    ):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            probabilities = model(**batch).logits.softmax(-1)
        for line, row in zip(lines, probabilities.tolist(), strict=True):
            named = {model.config.id2label[index]: value for index, value in enumerate(row)}
            assert named == pytest.approx(line["probabilities"], abs=1e-4)


@pytest.mark.usefixtures("no_reports")
def test_an_interrupted_run_resumes_to_the_same_bytes(base: Path, tmp_path: Path) -> None:
    class Impatient(SilentProgress):
        def step(self, job: str, step: int, *rest: Any) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    sections: dict[str, Any] = {"train": {"epochs": 2}, "method": {"dropout": 0.1}}
    whole = luthier.train(recipe_for(base, tmp_path, "labels", "whole", **sections))
    cut = recipe_for(base, tmp_path, "labels", "cut", **sections)
    with pytest.raises(KeyboardInterrupt):
        luthier.train(cut, progress=Impatient())
    again = luthier.train(cut, resume=True)
    assert (again.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        whole.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert [s["loss"] for s in steps_of(again.folder)] == [s["loss"] for s in steps_of(whole.folder)]


@pytest.mark.usefixtures("no_reports")
def test_a_run_goes_on_from_another_and_is_judged_again(bert: Path, tmp_path: Path) -> None:
    first = luthier.train(recipe_for(bert, tmp_path, "labels", train={"epochs": 2}))
    second = luthier.train(
        recipe_for(bert, tmp_path, "labels", "second", train={"epochs": 1}, start_from=str(first.folder))
    )
    before, after = (json.loads((r.folder / "eval.json").read_text()) for r in (first, second))
    assert after["base"]["loss"]["value"] == pytest.approx(before["tuned"]["loss"]["value"], rel=1e-4)
    result = CliRunner().invoke(app, ["eval", str(second.folder), "-q"])
    assert result.exit_code == 0, result.output
    with pytest.raises(RecipeError, match="says any number of labels of each text"):
        luthier.train(recipe_for(bert, tmp_path, "classification", "third", start_from=str(first.folder)))


def refused(base: Path, folder: Path, **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        luthier.train(recipe_for(base, folder, "classification") | sections)
    assert not (folder / "classification").exists()
    return str(caught.value)


def test_what_an_encoder_cannot_learn_is_refused_before_it_is_loaded(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.worker.train.load_placed", None)
    monkeypatch.setattr("luthier.worker.train.load_own_placed", None)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    data = {"data": {"train": str(chat)}}
    for task in ("chat", "completion", "text", "qa", "music", "art", "preference"):
        message = refused(bert, tmp_path, task=task, **data)
        assert f"an encoder (bert), which reads texts and does not write, and the task is {task}" in message
    words = {"task": {"type": "classification", "head": "words"}}
    assert "the task is classification with head: words" in refused(bert, tmp_path, **words)
    for method in ("full", "qlora", "bias"):
        assert f"method: {method}, and the base is an encoder" in refused(bert, tmp_path, method=method)
    assert "compute.zero is 2" in refused(bert, tmp_path, compute={"device": "cpu", "zero": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(bert, tmp_path, "classification") | {"task": "completion"} | data))
    for verb in ("check", "plan"):
        result = CliRunner().invoke(app, [verb, str(recipe)])
        assert isinstance(result.exception, RecipeError)
        assert "the base is an encoder (bert)" in str(result.exception)


def test_nobody_chats_with_it(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is an encoder \(bert\), which reads texts and does not write"):
        open_chat(bert)


def test_its_memory_is_foreseen(base: Path, tmp_path: Path) -> None:
    """From skeletons, with the data and without it, for bases whose positions end before train.max_length."""
    from luthier.recipe import load_recipe
    from luthier.worker.plan import plan_recipe

    recipe = load_recipe(recipe_for(base, tmp_path, "classification"))
    with_data = plan_recipe(recipe)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    without = plan_recipe(recipe)
    assert with_data.knows_data
    assert not without.knows_data
    assert 0 < with_data.foresight.memory.tokens < without.foresight.memory.tokens
    assert with_data.foresight.num_trained > 32 * 3
