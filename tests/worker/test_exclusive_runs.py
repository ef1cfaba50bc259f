"""Exclusive recipes as a user runs them: each in a process of its own, beside jobs that train on the resident base."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worker.test_train import train_in_this_process

import luthier
from luthier.base.load import load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.errors import RecipeError
from luthier.recipe import load_recipe
from luthier.types import AdapterSpec, Example, TrainSpec
from luthier.worker.children import Child, Children
from luthier.worker.progress import SilentProgress

WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]
PLENTY = 2**40


def recipe_for(base: Path, folder: Path, name: str, method: Any, **train: Any) -> dict[str, Any]:
    draw = random.Random(0)
    rows = [draw.sample(WORDS, 3) for _ in range(40)]
    data = folder / f"{name}.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": " ".join(row)}, {"role": "assistant", "content": row[0]}]}
        for row in rows
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "base": str(base),
        "data": {"train": str(data), "validation": 0.2},
        "method": method,
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "max_length": 128, **train},
        "evaluation": {"rows": 4, "max_new_tokens": 8},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / name),
    }


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


class Listener(SilentProgress):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.on_step: Any = None

    def step(self, job: str, step: int, *rest: Any) -> None:
        self.steps.append((job, step))
        if self.on_step:
            self.on_step(job, step)

    def note(self, message: str, level: Any = "info") -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def full_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    result = luthier.train(recipe_for(tiny_llama, folder, "full", "full"))
    assert result.status == "done", result.result
    return result.folder


def test_a_full_run_leaves_a_model_that_transformers_loads_alone(full_run: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert losses_of(full_run)[-1] < losses_of(full_run)[0]
    assert not (full_run / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(full_run / "model")
    assert AutoTokenizer.from_pretrained(full_run / "model").chat_template
    before = load_file(tiny_llama / "model.safetensors")
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    scores = json.loads((full_run / "eval.json").read_text())
    assert scores["tuned"]["loss"]["value"] < scores["base"]["loss"]["value"]
    card = (full_run / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "peft" not in card.split("## How to load it")[1].split("## Limits")[0]
    assert "</html>" in (full_run / "report.html").read_text()


def test_a_full_run_is_judged_chatted_with_and_exported(full_run: Path, tmp_path: Path) -> None:
    again = luthier.evaluate_run(full_run)
    scores = json.loads((full_run / "eval.json").read_text())
    rows = luthier.evaluate_run(full_run, rows=4)
    assert set(again) == set(scores)
    for who in ("base", "tuned"):
        assert rows[who]["loss"]["value"] > 0
    line = json.loads((full_run / "predictions.jsonl").read_text().splitlines()[0])
    chat = luthier.open_chat(full_run)
    assert chat.has_adapter
    messages = [{"role": "user", "content": line["prompt"].split("user\n")[-1].split("<|im_end|>")[0].strip()}]
    ours = "".join(chat.reply(messages, max_new_tokens=4))
    theirs = "".join(chat.reply(messages, base=True, max_new_tokens=4))
    assert isinstance(ours, str)
    assert ours != theirs
    luthier.export_run(full_run, tmp_path / "half", dtype="bfloat16")
    assert load_file(tmp_path / "half/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_a_full_run_is_the_base_of_another(full_run: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(full_run, tmp_path, "second", {"type": "lora", "rank": 2}))
    first = json.loads((full_run / "result.json").read_text())
    assert result.result["base_sha256"] != first["base_sha256"], "the trained model has an identity of its own"
    assert losses_of(result.folder)[0] < losses_of(full_run)[0]
    with pytest.raises(RecipeError, match="name it under `base`"):
        luthier.train(recipe_for(full_run, tmp_path, "third", "full") | {"start_from": str(full_run)})


def test_a_run_of_peft_is_judged_chatted_with_continued_and_merged(tiny_llama: Path, tmp_path: Path) -> None:
    method = {"type": "lokr", "rank": 4, "targets": ["q_proj", "v_proj"]}
    run = luthier.train(recipe_for(tiny_llama, tmp_path, "lokr", method, learning_rate=2e-2))
    assert run.status == "done", run.result
    assert json.loads((run.folder / "adapter/adapter_config.json").read_text())["peft_type"] == "LOKR"
    scores = luthier.evaluate_run(run.folder)
    assert scores["tuned"]["loss"]["value"] < scores["base"]["loss"]["value"]
    chat = luthier.open_chat(run.folder)
    assert isinstance("".join(chat.reply([{"role": "user", "content": "red lamp"}], max_new_tokens=4)), str)
    assert isinstance("".join(luthier.open_chat(run.folder / "adapter").reply([{"role": "user", "content": "x"}])), str)
    luthier.export_run(run.folder, tmp_path / "merged")
    again = recipe_for(tiny_llama, tmp_path, "again", method, learning_rate=2e-2) | {"start_from": str(run.folder)}
    assert losses_of(train_in_this_process(again).folder)[0] < losses_of(run.folder)[0]


def test_exclusive_recipes_train_beside_those_of_the_bank(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = [
        recipe_for(tiny_llama, tmp_path, "full", "full"),
        recipe_for(tiny_llama, tmp_path, "a", {"type": "lora", "rank": 4}, epochs=6),
        recipe_for(tiny_llama, tmp_path, "prompt", {"type": "prompt", "virtual_tokens": 4}),
        recipe_for(tiny_llama, tmp_path, "b", {"type": "lora", "rank": 2}, epochs=6),
    ]
    heard = Listener()
    results = luthier.train(recipes, progress=heard)
    assert [result.status for result in results] == ["done"] * 4, heard.notes
    assert [result.folder.name for result in results] == ["full", "a", "prompt", "b"]
    assert [result.tuned.name for result in results] == ["model", "adapter", "adapter", "adapter"]
    assert {Path(job).name for job, _ in heard.steps} == {"full", "a", "prompt", "b"}
    alone = luthier.train(recipes[1] | {"output": str(tmp_path / "alone")})
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(alone.folder), rel=1e-4)


def test_an_exclusive_job_runs_while_the_resident_base_serves_and_trains(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(tiny_llama, tmp_path, "full", "full", epochs=50))
    heard = Listener()
    children = Children([(recipe, 0)], resume=False, progress=heard)
    base = load_base(tiny_llama)
    engine = Engine(base)
    tokens = np.arange(40, 60, dtype=np.int32)
    example = Example(tokens, np.r_[0.0, np.ones(19)].astype(np.float32))
    slot = base.bank.add(AdapterSpec(rank=2), seed=0)
    engine.add(TrainingJob("resident", slot, [example] * 8, TrainSpec(epochs=100000, batch_size=2)))
    sampler = Sampler(base, str)
    children.admit(PLENTY, beside_others=True)
    replies, resident_steps, seen = 0, 0, 0
    try:
        while children.has_work:
            children.poll()
            has_begun, is_over = len(heard.steps) > 2, not children.has_work
            if has_begun and not is_over:
                resident_steps += len(engine.step())
                if not sampler.has_work:
                    sampler.submit(Request(str(seen), tokens[:5], slot.index, SamplingParams(max_new_tokens=3)))
                    seen += 1
                replies += sum(event.completion is not None for event in sampler.step())
            else:
                time.sleep(0.01)
    finally:
        children.stop()
    assert children.results[recipe.output].status == "done", heard.notes
    assert resident_steps > 3
    assert replies > 1


def test_ctrl_c_reaches_the_child_which_saves_and_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    method = {"type": "boft", "dropout": 0.1}
    whole = train_in_this_process(recipe_for(tiny_llama, tmp_path, "whole", method, epochs=12))
    recipe = recipe_for(tiny_llama, tmp_path, "cut", method, epochs=12)
    heard = Listener()
    heard.on_step = lambda job, step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=heard)
    state = json.loads((tmp_path / "cut/state.json").read_text())
    assert (state["status"], state["step"] >= 3) == ("interrupted", True)
    again = luthier.train(recipe, resume=True)
    assert again.status == "done"
    adapter = "adapter/adapter_model.safetensors"
    assert (again.folder / adapter).read_bytes() == (whole.folder / adapter).read_bytes()
    assert losses_of(again.folder) == losses_of(whole.folder)


def test_a_child_that_dies_ends_its_run_and_no_other(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = recipe_for(tiny_llama, tmp_path, "doomed", "full", epochs=30, checkpoint_every=1)
    calm = recipe_for(tiny_llama, tmp_path, "calm", {"type": "lora", "rank": 2})
    started: list[Child] = []
    start = Child.start.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, *given: Any, **named: Any) -> Child:
        started.append(start(cls, *given, **named))
        return started[-1]

    monkeypatch.setattr(Child, "start", classmethod(noted))
    heard = Listener()
    heard.on_step = lambda job, step: started[0].process.kill() if job.endswith("doomed") and step == 4 else None
    results = luthier.train([doomed, calm], progress=heard)
    assert [result.status for result in results] == ["failed", "done"]
    told = [note for note in heard.notes if "doomed" in note and "failed" in note]
    assert len(told) == 1
    assert "killed by signal 9" in told[0]
    assert "--resume" in told[0]
    assert json.loads((tmp_path / "doomed/state.json").read_text())["status"] == "failed"
    again = luthier.train(doomed, resume=True)
    assert again.status == "done"
    assert len(losses_of(again.folder)) == 120


def test_a_child_does_not_outlive_its_parent(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(tiny_llama, tmp_path, "orphan", "full", epochs=500))
    child = Child.start(recipe, 0, resume=False)
    heard = Listener()
    try:
        while not heard.steps and child.process.poll() is None:
            child.drain(heard)
            time.sleep(0.01)
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.process.wait(timeout=120) == 130
    finally:
        child.process.kill()
    assert json.loads((tmp_path / "orphan/state.json").read_text())["status"] == "interrupted"


def test_a_job_that_does_not_fit_waits_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(tiny_llama, tmp_path, "large", "full"))
    heard = Listener()
    children = Children([(recipe, 2 * 2**30)], resume=False, progress=heard)
    children.admit(2**30, beside_others=True)
    children.admit(2**30, beside_others=True)
    assert (len(children.running), len(children.waiting)) == (0, 1)
    assert len(heard.notes) == 1
    assert "waits until others are done: it needs about 2.00 GiB, and 1.00 GiB are free" in heard.notes[0]
    children.admit(2**30, beside_others=False)  # alone it may try, and measures for itself
    assert len(children.running) == 1
    children.stop()
    assert not children.running


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("bias", "has none"),
        ({"type": "last_layers", "layers": 9}, "has 2 blocks"),
        ({"type": "boft", "config": {"boft_blok_num": 2}}, "did you mean 'boft_block_num'"),
        ({"type": "peft", "name": "hra", "config": {"r": "many"}}, "found 'many'"),
        ({"type": "oft", "block_size": 48, "config": {"use_cayley_neumann": "perhaps"}}, "bool"),
        ({"type": "vera", "config": {"r": 4}}, "leave one of them out"),
        ({"type": "full", "rank": 4}, "rank is not a field"),
        ({"type": "adalora", "target_rank": 12}, "below initial_rank"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    method: Any, says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        luthier.train(recipe_for(tiny_llama, tmp_path, "run", method))
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_data_comes_through_as_itself(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, "run", "full")
    with Path(recipe["data"]["train"]).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(luthier.LuthierError, match="line 41") as caught:
        luthier.train(recipe)
    assert type(caught.value).__name__ == "DataError"


def test_a_classifier_of_own_weights_is_judged_again(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = [{"text": f"{word} {other}", "label": word} for word in WORDS[:3] for other in WORDS[3:]] * 2
    recipe = recipe_for(tiny_llama, tmp_path, "run", "full", epochs=6)
    Path(recipe["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {"task": "classification", "evaluation": {"rows": 8}}
    result = train_in_this_process(recipe)
    assert result.status == "done", result.result
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "model")
    assert set(model.config.id2label.values()) == set(WORDS[:3])
    again = luthier.evaluate_run(result.folder)
    assert again["tuned"]["accuracy"]["value"] >= again["base"]["accuracy"]["value"]


def test_what_is_done_keeps_no_other_run_from_its_resume(tiny_llama: Path, tmp_path: Path) -> None:
    shared = recipe_for(tiny_llama, tmp_path, "shared", "lora", max_steps=2)
    exclusive = recipe_for(tiny_llama, tmp_path, "exclusive", "full", max_steps=2)
    first = luthier.train(shared)
    results = luthier.train([shared, exclusive], resume=True)
    assert [result.status for result in results] == ["done", "done"]
    assert results[0].result == first.result
    again = luthier.train([shared, exclusive], resume=True)
    assert [result.result for result in again] == [result.result for result in results]
