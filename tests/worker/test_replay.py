"""A run with replayed text, on a tiny model: what it scores, what it says, and that it resumes to the same bytes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli.main import app
from luthier.worker.progress import SilentProgress


def recipe_for(base: Path, folder: Path, name: str) -> dict[str, Any]:
    own, general = folder / "own.jsonl", folder / "general.jsonl"
    own.write_text("".join(json.dumps({"text": f"red lamp {n} " * 3}) + "\n" for n in range(40)))
    general.write_text("".join(json.dumps({"text": f"the cold door {n} and the fan"}) + "\n" for n in range(30)))
    return {
        "base": str(base),
        "task": "text",
        "data": {
            "train": str(own),
            "validation": 0.2,
            "replay": {"file": str(general), "share": 0.3, "validation": 0.2},
        },
        "method": {"type": "lora", "rank": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "max_length": 64, "keep_best": False},
        "evaluation": {"rows": 100},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / name),
    }


def test_the_ability_kept_is_the_perplexity_of_held_out_replayed_text(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from luthier.data.store import ExampleStore

    result = luthier.train(recipe_for(tiny_llama, tmp_path, "run"))
    kept = json.loads((result.folder / "eval.json").read_text())["replay"]
    assert kept["num_rows"] == 6
    assert kept["comparison"]["perplexity"]["rows"] == 6
    data = json.loads((result.folder / "data.json").read_text())
    assert data["replay"]["train"]["num_rows"] == 24
    assert data["replay"]["share_of_tokens"] == pytest.approx(0.3, abs=0.03)
    stores = [ExampleStore(path) for path in result.folder.glob("data/*/validation")]
    (held_out,) = [store for store in stores if len(store) == 6]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()

    def perplexity(model: Any) -> float:
        total, count = 0.0, 0
        with torch.inference_mode():
            for example in held_out:
                ids = torch.from_numpy(example.tokens.astype("int64"))[None]
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        return float(torch.tensor(total / count).exp())

    assert kept["base"]["perplexity"]["value"] == pytest.approx(perplexity(base), rel=1e-4)
    tuned = PeftModel.from_pretrained(base, result.folder / "adapter").eval()
    assert kept["tuned"]["perplexity"]["value"] == pytest.approx(perplexity(tuned), rel=1e-4)
    again = luthier.evaluate_run(result.folder)["replay"]
    for who in ("base", "tuned"):
        assert again[who]["perplexity"]["value"] == pytest.approx(kept[who]["perplexity"]["value"], rel=1e-6)
    shown = CliRunner().invoke(app, ["eval", str(result.folder), "-q"])
    assert "General ability kept, by the replayed text: Perplexity on 6 held-out rows" in shown.stdout
    report = (result.folder / "report.html").read_text()
    assert "General ability kept" in report
    assert "on 6 held-out rows of the replayed text" in report
    assert "replayed, held out" in report


def test_a_run_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    class Impatient(SilentProgress):
        def step(self, job: str, step: int, *rest: Any) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    whole = luthier.train(recipe_for(tiny_llama, tmp_path, "whole"))
    recipe = recipe_for(tiny_llama, tmp_path, "cut")
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=Impatient())
    again = luthier.train(recipe, resume=True)
    ours, theirs = (folder / "adapter/adapter_model.safetensors" for folder in (again.folder, whole.folder))
    assert ours.read_bytes() == theirs.read_bytes()
    assert json.loads((again.folder / "eval.json").read_text()) == json.loads((whole.folder / "eval.json").read_text())


def test_check_tells_of_the_replayed_text_and_its_wrong_lines(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "24 rows" in result.stdout
    assert "0.3 (data.replay)" in result.stdout
    with open(recipe["data"]["replay"]["file"], "a") as file:
        file.write('{"text": ""}\n')
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert "line 31" in result.stdout
    values = json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)
    assert values["trainable"] is False
    assert values["replay"]["num_problems"] == 1
