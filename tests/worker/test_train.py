"""The whole way of a run, on a tiny model: from a recipe to a judged adapter, and back after an interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import luthier
from luthier.errors import DataError, RecipeError, RunError
from luthier.worker.progress import SilentProgress
from luthier.worker.result import RunResult
from luthier.worker.train import train_here

WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]


def write_chat(path: Path, num_rows: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = draw.sample(WORDS, 3)
        rows.append(
            {"messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(base: Path, folder: Path, name: str = "run", **sections: Any) -> dict[str, Any]:
    data = write_chat(folder / f"{name}.jsonl", 40)
    train = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "max_length": 128} | sections.pop("train", {})
    method = {"type": "lora", "rank": 4, "alpha": 8} | sections.pop("method", {})
    return {
        "base": str(base),
        "task": "chat",
        "data": {"train": str(data), "validation": 0.2},
        "method": method,
        "train": train,
        "evaluation": {"rows": 4, "max_new_tokens": 8} | sections.pop("evaluation", {}),
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / name),
        **sections,
    }


def train_in_this_process(recipe: dict[str, Any]) -> RunResult:
    """Train a recipe of any method here, as the process of an exclusive one does (`test_exclusive_runs.py`)."""
    return train_here(luthier.load_recipe(recipe), resume=False, progress=SilentProgress())


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_a_run_writes_all_that_it_promises(tiny_llama: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(tiny_llama, tmp_path))
    run = tmp_path / "run"
    assert result.status == "done"
    assert result.folder == run
    steps = steps_of(run)
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert {"step", "loss", "learning_rate", "num_tokens", "seconds"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    scores = json.loads((run / "eval.json").read_text())
    assert scores["num_rows"] == 4
    for who in ("base", "tuned"):
        assert {"loss", "perplexity", "token_accuracy", "exact_match"} <= scores[who].keys()
    assert scores["tuned"]["loss"]["value"] < scores["base"]["loss"]["value"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (run / "adapter" / name).exists()
    complete = luthier.load_recipe(run / "recipe.yaml")
    assert complete.train.weight_decay == 0.0
    assert "weight_decay" in (run / "recipe.yaml").read_text()
    assert "</html>" in (run / "report.html").read_text()
    assert (run / "README.md").read_text().startswith("---")
    assert json.loads((run / "versions.json").read_text())["torch"]
    assert result.result["num_trained_tokens"] == sum(step["num_tokens"] for step in steps)


def test_several_recipes_train_together_as_they_do_alone(tiny_llama: Path, tmp_path: Path) -> None:
    first = recipe_for(tiny_llama, tmp_path, "a")
    second = recipe_for(tiny_llama, tmp_path, "b", method={"rank": 2}, train={"batch_size": 3, "learning_rate": 3e-3})
    results = luthier.train([first, second])
    assert [result.status for result in results] == ["done", "done"]
    alone = luthier.train(first | {"output": str(tmp_path / "alone")})
    together = [step["loss"] for step in steps_of(tmp_path / "a")]
    assert together == pytest.approx([step["loss"] for step in steps_of(alone.folder)], rel=1e-4)


def test_recipes_with_different_bases_are_refused_together(tiny_llama: Path, tiny_phi3: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one base"):
        luthier.train([recipe_for(tiny_llama, tmp_path, "a"), recipe_for(tiny_phi3, tmp_path, "b")])


def test_an_interrupted_run_resumes_to_the_same_adapter(tiny_phi3: Path, tmp_path: Path) -> None:
    whole = luthier.train(recipe_for(tiny_phi3, tmp_path, "whole", method={"dropout": 0.1}))

    class Impatient(SilentProgress):
        def step(self, job: str, step: int, *rest: Any) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = recipe_for(tiny_phi3, tmp_path, "cut", method={"dropout": 0.1})
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=Impatient())
    assert json.loads((tmp_path / "cut" / "state.json").read_text())["status"] == "interrupted"
    with pytest.raises(RunError, match="holds a run already"):
        luthier.train(recipe)
    again = luthier.train(recipe, resume=True)
    assert (again.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        whole.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert [s["loss"] for s in steps_of(again.folder)] == [s["loss"] for s in steps_of(whole.folder)]


def test_a_run_that_is_done_is_given_back_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"max_steps": 1})
    first = luthier.train(recipe)
    files = [first.folder / name for name in ("scores/tuned.json", "eval.json", "report.html", "metrics.jsonl")]
    before = [file.stat().st_mtime_ns for file in files]
    assert luthier.train(recipe, resume=True) == first
    assert [file.stat().st_mtime_ns for file in files] == before


def test_another_recipe_is_refused_on_resume(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"max_steps": 1})
    luthier.train(recipe)
    recipe["train"] |= {"learning_rate": 2e-2}
    with pytest.raises(RunError, match="learning_rate"):
        luthier.train(recipe, resume=True)


NUM_KILLS = 10
KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import luthier, luthier.evaluate.report, luthier.worker.train, peft

# Imported once; each try is a fork of this process, which itself never runs a product.
recipe, metrics, num_kills = luthier.load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = random.Random(int(sys.argv[4]))
killed_at = []

def num_lines():
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

while True:
    target = num_lines() + draw.randint(1, 3)
    child = os.fork()
    if child == 0:
        luthier.train(recipe, resume=True)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if len(killed_at) < num_kills and num_lines() >= target:
            time.sleep(draw.random() * 0.01)  # within a step, or while its checkpoint is written
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed_at.append(num_lines())
            break
        time.sleep(0.001)
    else:
        break
print(json.dumps(killed_at))
"""


def test_ten_kills_and_resumes_equal_never_stopping(tiny_llama: Path, tmp_path: Path) -> None:
    """kill -9 at ten random moments: the adapter's bytes and the loss curve of the uninterrupted run."""
    settings = {
        "train": {"checkpoint_every": 1, "epochs": 20},  # long enough for all the kills, however late each comes
        "method": {"dropout": 0.1},
        "evaluation": {"rows": 4, "generate": False, "every": 3},
    }
    whole = luthier.train(recipe_for(tiny_llama, tmp_path, "whole", **{k: dict(v) for k, v in settings.items()}))
    recipe = recipe_for(tiny_llama, tmp_path, "killed", **{k: dict(v) for k, v in settings.items()})
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    command = [sys.executable, "-c", KILLS, str(file), str(metrics), str(NUM_KILLS), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed_at = json.loads(done.stdout)
    assert len(killed_at) == NUM_KILLS
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "killed" / adapter).read_bytes() == (whole.folder / adapter).read_bytes()
    kept = ("kind", "step", "loss")
    lines = [
        [{name: json.loads(line)[name] for name in kept} for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "killed", whole.folder)
    ]
    assert lines[0] == lines[1]


def test_an_exploding_job_stops_with_advice_and_the_others_go_on(tiny_llama: Path, tmp_path: Path) -> None:
    # The output layer in full: its logits can grow without bound.
    method = {"modules_to_save": ["lm_head"], "targets": ["q_proj"]}
    wild = recipe_for(
        tiny_llama, tmp_path, "wild", method=method, train={"learning_rate": 5.0, "schedule": "constant", "epochs": 6}
    )
    calm = recipe_for(tiny_llama, tmp_path, "calm")
    results = luthier.train([wild, calm])
    assert [result.status for result in results] == ["failed", "done"]
    assert "learning_rate" in results[0].result["stopped_because"]
    alone = luthier.train(calm | {"output": str(tmp_path / "alone")})
    assert [s["loss"] for s in steps_of(results[1].folder)] == pytest.approx(
        [s["loss"] for s in steps_of(alone.folder)], rel=1e-4
    )


def test_the_best_checkpoint_is_kept_and_training_stops_early(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        tiny_llama,
        tmp_path,
        train={"epochs": 40, "learning_rate": 3e-2, "early_stopping": 2, "schedule": "constant"},
        evaluation={"every": 2, "rows": 8},
    )
    result = luthier.train(recipe)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}
    assert "no better validation loss" in result.result["stopped_because"]
    assert result.result["best_step"] == min(losses, key=losses.__getitem__)
    assert result.result["best_validation_loss"] == min(losses.values())
    assert result.result["num_steps"] < 40 * 4


def test_classification_learns_and_keeps_its_labels(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {other}", "label": word} for word in WORDS[:3] for other in WORDS[3:]] * 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(tiny_llama, tmp_path, task="classification", train={"epochs": 8})
    recipe["data"] = {"train": str(data), "validation": 0.2}
    recipe["evaluation"] = {"rows": 12}
    result = luthier.train(recipe)
    assert result.evaluation["tuned"]["accuracy"]["value"] > result.evaluation["base"]["accuracy"]["value"]
    config = json.loads((result.folder / "adapter/classifier/config.json").read_text())
    assert set(config["id2label"].values()) == set(WORDS[:3])


def test_an_adapter_is_continued_from(tiny_llama: Path, tmp_path: Path) -> None:
    first = luthier.train(recipe_for(tiny_llama, tmp_path, "first"))
    second = luthier.train(recipe_for(tiny_llama, tmp_path, "second", start_from=str(first.folder)))
    assert steps_of(second.folder)[0]["loss"] < steps_of(first.folder)[0]["loss"]


def test_an_adapter_to_go_on_from_leaves_no_room_for_another_start(tiny_llama: Path, tmp_path: Path) -> None:
    first = luthier.train(recipe_for(tiny_llama, tmp_path, "first", train={"max_steps": 1}))
    second = recipe_for(tiny_llama, tmp_path, "second", method={"init": "pissa"}, start_from=str(first.folder))
    with pytest.raises(RecipeError, match=r"method\.init is pissa, and start_from names an adapter"):
        luthier.train(second)


def test_a_head_of_another_kind_is_not_gone_on_from(tiny_llama: Path, tmp_path: Path) -> None:
    """Three classes, three labels and three tags are heads of one size."""
    classified = [{"text": f"{word} {other}", "label": word} for word in WORDS[:3] for other in WORDS[3:]]
    several = {"type": "classification", "multiple": True}
    tagged = [{"tokens": ["in", word], "tags": ["O", "B-place"]} for word in WORDS]
    recipes = []
    for name, task, rows in (
        ("one", "classification", classified),
        ("tags", "tagging", tagged),
        ("several", several, classified),
    ):
        data = tmp_path / f"{name}-rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipes.append(recipe_for(tiny_llama, tmp_path, name, task=task, train={"max_steps": 1}))
        recipes[-1]["data"] = {"train": str(data)}
    first = luthier.train(recipes[0])
    with pytest.raises(RecipeError, match=r"says one class of each text, and .* says a tag of each token"):
        luthier.train(recipes[1] | {"start_from": str(first.folder)})
    with pytest.raises(
        RecipeError, match=r"(?s)one class of each text, .* any number of labels of each text.*task\.multiple"
    ):
        luthier.train(recipes[2] | {"start_from": str(first.folder), "output": str(tmp_path / "on")})
    luthier.train(recipes[2])
    assert luthier.train(recipes[2] | {"start_from": recipes[2]["output"], "output": str(tmp_path / "on")})
    method = {"type": "lokr", "rank": 4, "targets": ["q_proj"]}
    own = train_in_this_process(recipes[0] | {"method": method, "output": str(tmp_path / "own")})
    on = recipes[2] | {"method": method, "start_from": str(own.folder), "output": str(tmp_path / "last")}
    with pytest.raises(RecipeError, match="any number of labels of each text"):
        train_in_this_process(on)


def test_an_adapter_of_pefts_own_is_imported_continued_and_chatted_with(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    config.task_type, config.init_lora_weights = "CAUSAL_LM", False
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / "theirs")
    asked = [{"role": "user", "content": "red"}]
    before = "".join(luthier.open_chat(tmp_path / "theirs").reply(asked, max_new_tokens=8))
    assert before != "".join(luthier.open_chat(tiny_llama).reply(asked, max_new_tokens=8))

    class Notes(SilentProgress):
        def note(self, message: str, level: Any = "info") -> None:
            notes.append(message)

    notes: list[str] = []
    train = {"learning_rate": 1e-12, "max_steps": 1}
    recipe = recipe_for(tiny_llama, tmp_path, "ours", start_from=str(tmp_path / "theirs"), train=train)
    result = luthier.train(recipe, progress=Notes())
    assert any("alpha 6; targets q_proj, v_proj; modules_to_save model.norm" in note for note in notes)
    assert "".join(luthier.open_chat(result.folder).reply(asked, max_new_tokens=8)) == before
    saved = json.loads((result.folder / "adapter/adapter_config.json").read_text())
    assert (saved["lora_alpha"], sorted(saved["target_modules"])) == (6, ["q_proj", "v_proj"])


@pytest.mark.parametrize("method", [{"new_tokens": ["<lamp>"]}, {"modules_to_save": ["norm"]}])
def test_what_an_adapter_lacks_is_not_passed_over(tiny_llama: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    first = luthier.train(recipe_for(tiny_llama, tmp_path, "first", train={"max_steps": 1}))
    recipe = recipe_for(tiny_llama, tmp_path, "second", start_from=str(first.folder), method=method)
    with pytest.raises(RecipeError, match=f"has none where method.{next(iter(method))}"):
        luthier.train(recipe)


def test_new_tokens_and_modules_in_full_are_trained_and_saved(tiny_llama_tied: Path, tmp_path: Path) -> None:
    method = {"new_tokens": ["<lamp>"], "modules_to_save": ["model.norm"]}
    result = luthier.train(recipe_for(tiny_llama_tied, tmp_path, method=method))
    tensors = load_file(result.folder / "adapter/adapter_model.safetensors")
    assert any("trainable_tokens_delta" in name for name in tensors)
    assert any(name.endswith("model.norm.weight") for name in tensors)
    chat = luthier.open_chat(result.folder)
    assert isinstance("".join(chat.reply([{"role": "user", "content": "red <lamp>"}], max_new_tokens=4)), str)


def test_what_is_said_in_chat_equals_the_judged_reply(tiny_llama: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(tiny_llama, tmp_path))
    line = json.loads((result.folder / "predictions.jsonl").read_text().splitlines()[0])
    chat = luthier.open_chat(result.folder)
    rows = [json.loads(text) for text in (tmp_path / "run.jsonl").read_text().splitlines()]
    asked = next(row["messages"][0] for row in rows if row["messages"][0]["content"] in line["prompt"])
    assert "".join(chat.reply([asked], max_new_tokens=8)).startswith(line["tuned"][:4])
    assert "".join(chat.reply([asked], base=True, max_new_tokens=8)).startswith(line["base"][:4])


def test_a_run_is_judged_again_with_the_same_result(tiny_llama: Path, tmp_path: Path) -> None:
    result = luthier.train(recipe_for(tiny_llama, tmp_path, evaluation={"rows": 8}))
    again = luthier.evaluate_run(result.folder)
    assert again["tuned"]["loss"]["value"] == pytest.approx(result.evaluation["tuned"]["loss"]["value"], rel=1e-5)


def test_bad_data_stops_before_the_base_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path)
    with Path(recipe["data"]["train"]).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match="line 41"):
        luthier.train(recipe)


def test_nothing_need_be_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path)
    recipe["data"]["validation"] = None
    result = luthier.train(recipe)
    assert result.status == "done"
    assert result.evaluation["num_rows"] == 0
    assert (result.folder / "adapter/adapter_model.safetensors").exists()


def test_changed_data_is_refused_on_resume(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"checkpoint_every": 1})

    class Impatient(SilentProgress):
        def step(self, job: str, step: int, *rest: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=Impatient())
    write_chat(Path(recipe["data"]["train"]), 40, seed=9)
    with pytest.raises(RunError, match="files have changed"):
        luthier.train(recipe, resume=True)
