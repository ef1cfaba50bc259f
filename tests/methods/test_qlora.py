"""QLoRA and the optimizers of bitsandbytes in a recipe: the whole run, resume, what is refused, and the wrong base."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_models import write_tiny_llama
from worker.test_train import recipe_for, steps_of

import luthier
from luthier.base.load import load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.errors import ModelError, RecipeError
from luthier.recipe import load_recipe
from luthier.types import AdapterSpec, Example, TrainSpec
from luthier.worker.chat import open_chat
from luthier.worker.export import export_run
from luthier.worker.progress import SilentProgress

QLORA = {"type": "qlora"}


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, read only."""
    folder = tmp_path_factory.mktemp("qlora")
    return luthier.train(recipe_for(tiny_llama, folder, method=QLORA, train={"optimizer": "adamw_8bit"})).folder


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> Any:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)


def test_a_run_learns_and_says_what_it_was_trained_over(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    steps = steps_of(trained)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    result = json.loads((trained / "result.json").read_text())
    assert (result["base_quantization"], result["base_dtype"]) == ("nf4", "float32")
    for adapter in (trained / "adapter", next((trained / "checkpoints").iterdir())):
        key = json.loads((adapter / "trained_over.json").read_text())
        assert (key["weights_hash"], key["quantization"]) == (result["base_sha256"], "nf4")
    lora = luthier.train(recipe_for(tiny_llama, tmp_path))
    assert lora.result["num_trainable_parameters"] == result["num_trainable_parameters"]
    assert lora.result["num_base_parameters"] == result["num_base_parameters"]
    assert steps[0]["loss"] != pytest.approx(steps_of(lora.folder)[0]["loss"], rel=1e-3)  # the base is another


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_an_interrupted_run_resumes_to_the_same_bytes(tiny_phi3: Path, optimizer: str, tmp_path: Path) -> None:
    sections = {"method": QLORA | {"dropout": 0.1, "rank": 40}, "train": {"optimizer": optimizer}}
    whole = luthier.train(recipe_for(tiny_phi3, tmp_path, "whole", **{k: dict(v) for k, v in sections.items()}))

    class Impatient(SilentProgress):
        def step(self, job: str, step: int, *rest: Any) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = recipe_for(tiny_phi3, tmp_path, "cut", **{k: dict(v) for k, v in sections.items()})
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=Impatient())
    moments = load_file(next((tmp_path / "cut" / "checkpoints").glob("step-000005")) / "optimizer.safetensors")
    assert any(name.endswith(".scales") for name in moments) == (optimizer == "adamw_8bit")
    again = luthier.train(recipe, resume=True)
    assert (again.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        whole.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_qlora_and_dora_over_nf4_train_together(tiny_llama: Path, tmp_path: Path) -> None:
    first = recipe_for(tiny_llama, tmp_path, "a", method=QLORA)
    second = recipe_for(tiny_llama, tmp_path, "b", method={"type": "dora", "quantization": "nf4"})
    results = luthier.train([first, second])
    assert [result.status for result in results] == ["done", "done"]
    alone = luthier.train(first | {"output": str(tmp_path / "alone")})
    together = [step["loss"] for step in steps_of(tmp_path / "a")]
    assert together == pytest.approx([step["loss"] for step in steps_of(alone.folder)], rel=1e-4)


def test_lora_and_qlora_together_are_refused_with_the_reason(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = [recipe_for(tiny_llama, tmp_path, "a"), recipe_for(tiny_llama, tmp_path, "b", method=QLORA)]
    with pytest.raises(RecipeError, match=r"(?s)one base.*in NF4, computed in float32, on cpu.*in float32 on cpu"):
        luthier.train(recipes)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_numbers_is_refused(init: str) -> None:
    with pytest.raises(RecipeError, match=rf"method\.init.*{init} takes a part out of the base's weight"):
        load_recipe({"data": {"train": "x.jsonl"}, "method": {"type": "qlora", "init": init}})


def test_fields_of_another_method_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.feedforward is not a field"):
        load_recipe({"data": {"train": "x.jsonl"}, "method": {"type": "qlora", "feedforward": ["down_proj"]}})


@pytest.mark.usefixtures("no_bitsandbytes")
@pytest.mark.parametrize(
    ("sections", "subject"),
    [
        ({"method": QLORA}, "method: qlora"),
        ({"method": {"type": "dora", "quantization": "nf4"}}, "method: dora"),
        ({"train": {"optimizer": "adamw_8bit"}}, "train.optimizer: adamw_8bit"),
    ],
)
def test_without_bitsandbytes_the_extra_is_named_before_anything_is_made(
    tiny_llama: Path, tmp_path: Path, sections: dict[str, Any], subject: str
) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, **sections)
    with pytest.raises(RecipeError, match=rf"(?s){subject} needs bitsandbytes.*luthier\[qlora\]"):
        luthier.train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_moments_on_a_cpu_are_refused(tiny_llama: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"optimizer": optimizer})
    with pytest.raises(RecipeError, match=rf"(?s){optimizer}, and the job runs on cpu.*a CUDA device.*adamw"):
        luthier.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_run_is_chatted_with_over_the_base_that_it_was_trained_over(trained: Path) -> None:
    for named in (trained, trained / "adapter"):
        session = open_chat(named)
        assert session.base.quantization == "nf4"
        assert isinstance("".join(session.reply([{"role": "user", "content": "red lamp"}], max_new_tokens=4)), str)


@pytest.fixture
def moved(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run whose base has other weights now; and that base."""
    other = write_tiny_llama(tmp_path / "other", seed=5)
    run = tmp_path / "moved"
    shutil.copytree(trained, run)
    text = (run / "recipe.yaml").read_text().splitlines()
    text = [f"base: {other}" if line.startswith("base:") else line for line in text]
    (run / "recipe.yaml").write_text("\n".join(text))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    return run, other


def test_other_weights_are_refused_by_their_hash(moved: tuple[Path, Path], tmp_path: Path) -> None:
    run, other = moved
    for named in (run, run / "adapter"):
        with pytest.raises(ModelError, match="was trained over the weights"):
            open_chat(named)
        with pytest.raises(ModelError, match="was trained over the weights"):
            export_run(named, tmp_path / "out")
    recipe = recipe_for(other, tmp_path, "next", method=QLORA, start_from=str(run))
    with pytest.raises(ModelError, match="was trained over the weights"):
        luthier.train(recipe)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_another_quantization_is_refused(trained: Path, tiny_llama: Path, method: str, tmp_path: Path) -> None:
    """Going on from an adapter of the one over a base of the other, and resuming from such a checkpoint."""
    start = trained
    if method == "qlora":
        start = luthier.train(recipe_for(tiny_llama, tmp_path, "plain", train={"max_steps": 1})).folder
    recipe = recipe_for(tiny_llama, tmp_path, "next", method={"type": method}, start_from=str(start))
    with pytest.raises(ModelError, match=r"(?s)in NF4.*quantized in the same way"):
        luthier.train(recipe)


def test_going_on_from_an_adapter_over_nf4(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, "next", method=QLORA, start_from=str(trained), train={"max_steps": 2})
    assert steps_of(luthier.train(recipe).folder)[0]["loss"] < steps_of(trained)[0]["loss"]


def test_the_command_says_onto_what_it_merged(trained: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    class Listening(SilentProgress):
        def note(self, text: str, level: str = "info") -> None:
            notes.append(text)

    export_run(trained, tmp_path / "merged", progress=Listening())
    assert any("dequantized from NF4, not onto its original weights" in note for note in notes)
    assert (tmp_path / "merged" / "README.md").exists()


@pytest.mark.real
def test_the_default_base_in_nf4_trains_and_its_linear_layers_are_small(real_base: Path) -> None:
    """SmolLM2-135M: 106 million values in linear layers; the loss of a few rows falls in three steps."""
    base = load_base(real_base, quantization="nf4")
    linear = sum(weight.num_values for weight in base.nf4_weights.values())
    assert linear == 106_168_320
    assert base.nf4_bytes < 0.30 * 2 * linear
    assert base.is_packed, base.packing_problem
    tokens = np.arange(100, 140, dtype=np.int32)
    weights = np.r_[0.0, np.ones(39)].astype(np.float32)
    spec = TrainSpec(epochs=3, batch_size=4, learning_rate=2e-3, optimizer="adamw_8bit", schedule="constant")
    engine = Engine(base)
    engine.add(TrainingJob("a", base.bank.add(AdapterSpec(rank=8), 0), [Example(tokens, weights)] * 4, spec))
    losses = [report.loss for _ in range(3) for report in engine.step()]
    assert losses[-1] < losses[0] - 0.5
