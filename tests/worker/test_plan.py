"""A recipe's memory before its base is loaded: equal to what the loaded base says, for every kind of method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_llama
from worker.test_train import recipe_for

from luthier.base import load
from luthier.engine.job import TrainingJob
from luthier.engine.memory import plan_memory
from luthier.errors import DataError, RecipeError
from luthier.recipe import Recipe, load_recipe
from luthier.worker.loading import load_own_placed, load_placed, placement_of
from luthier.worker.plan import admission_bytes, data_at_hand, gpu_bytes, plan_recipe

METHODS: dict[str, Any] = {
    "lora": {"type": "lora", "rank": 4},
    "lora on some layers": {"type": "lora", "rank": 2, "targets": ["q_proj", "down_proj"], "dropout": 0.1},
    "lora with the output layer": {"type": "lora", "rank": 2, "modules_to_save": ["lm_head"]},
    "pissa": {"type": "lora", "rank": 4, "init": "pissa"},
    "dora": {"type": "dora", "rank": 4},
    "ia3": {"type": "ia3"},
    "qlora": {"type": "qlora", "rank": 4},
    "full": {"type": "full"},
    "last_layers": {"type": "last_layers", "layers": 3},
    "boft": {"type": "boft"},
    "prompt": {"type": "prompt"},
    "prefix": {"type": "prefix"},
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def deep_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More blocks than a skeleton has."""
    folder = tmp_path_factory.mktemp("deep")
    return write_tiny_llama(folder, num_hidden_layers=5, tied=request.param == "tied")


def planned_after_loading(recipe: Recipe) -> Any:
    """As a run plans once its base is there."""
    placement = placement_of(recipe)
    with data_at_hand(recipe, placement.folder) as data:
        assert data is not None
        if recipe.method.runs == "exclusive":
            from luthier.methods.config import exclusive_spec

            base: Any = load_own_placed(placement, exclusive_spec(recipe.method), 0, 1)
            slot: Any = base.slot
        else:
            from luthier.methods.config import bank_spec

            base = load_placed(placement, 1)
            slot = base.bank.add(bank_spec(recipe.method), 0)
        base.set_checkpointing(recipe.train.gradient_checkpointing == "on")
        job = TrainingJob("a", slot, data.train, recipe.train.spec())
        return plan_memory(base, [job], 4096)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    # A prefix cannot be recomputed, and of blocks below the last ones a loaded base counts inputs that are not kept.
    [(name, "off") for name in METHODS] + [(name, "on") for name in METHODS if name not in ("prefix", "last_layers")],
)
def test_skeletons_say_what_the_loaded_base_says(
    deep_llama: Path, tmp_path: Path, name: str, checkpointing: str
) -> None:
    values = recipe_for(deep_llama, tmp_path, train={"gradient_checkpointing": checkpointing})
    recipe = load_recipe(values | {"method": METHODS[name]})
    before, after = plan_recipe(recipe).foresight.memory, planned_after_loading(recipe)
    assert before.tokens == after.tokens
    for part in ("process", "base", "adapters", "gradients", "optimizer"):
        assert getattr(before, part) == pytest.approx(getattr(after, part), rel=0.01), part
    assert before.activations == pytest.approx(after.activations, rel=0.05)
    assert before.peak == pytest.approx(after.peak, rel=0.01)


def test_a_vocabulary_that_is_cut_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.base import skeleton
    from luthier.worker import foresight

    folder = write_tiny_llama(tmp_path / "base")
    recipe = load_recipe(recipe_for(folder, tmp_path) | {"method": "full"})
    whole = plan_recipe(recipe).foresight.memory
    for module in (skeleton, foresight):
        monkeypatch.setattr(module, "CUT_VOCABULARY", 100)
    cut = plan_recipe(recipe).foresight.memory
    assert (cut.base, cut.adapters, cut.gradients, cut.optimizer) == (
        whole.base,
        whole.adapters,
        whole.gradients,
        whole.optimizer,
    )
    assert cut.activations == pytest.approx(whole.activations, rel=0.01)


def test_no_weight_is_read(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        pytest.fail("weights were loaded")

    for name in ("load_model", "load_base"):
        monkeypatch.setattr(load, name, refuse)
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"")  # there, and not to be opened
    for method in ("lora", "full"):
        assert plan_recipe(load_recipe(recipe_for(folder, tmp_path) | {"method": method})).peak > 0


def test_without_its_data_a_recipe_counts_on_the_longest_rows(tiny_llama: Path, tmp_path: Path) -> None:
    values = recipe_for(tiny_llama, tmp_path, train={"batch_size": 3, "max_length": 100})
    with_data = plan_recipe(load_recipe(values))
    without = plan_recipe(load_recipe(values | {"data": {"train": "nowhere.jsonl"}}))
    assert with_data.knows_data
    assert not without.knows_data
    assert without.foresight.memory.tokens == 300
    assert with_data.foresight.memory.tokens < 300


def test_data_that_does_not_hold_is_an_error_by_line(tiny_llama: Path, tmp_path: Path) -> None:
    values = recipe_for(tiny_llama, tmp_path)
    Path(values["data"]["train"]).write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match="line 1"):
        plan_recipe(load_recipe(values))
    assert admission_bytes(load_recipe(values | {"method": "full"}), placement_of(load_recipe(values))) > 0


def test_the_largest_micro_batch_is_what_fits_on_the_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(tiny_llama, tmp_path))
    small, large = plan_recipe(recipe, "1GB"), plan_recipe(recipe, "24GB")
    assert large.placement.dtype == "bfloat16"
    assert large.foresight.memory.process == 0
    assert 0 < small.largest_micro_batch_tokens < large.largest_micro_batch_tokens
    memory = large.foresight.memory
    spare = 0.8 * memory.available - memory.needed
    assert large.largest_micro_batch_tokens == pytest.approx(memory.tokens + spare / memory.per_token, rel=0.01)
    assert not plan_recipe(recipe, "600MB").fits


@pytest.mark.parametrize(("size", "num_bytes"), [("24GB", 24 * 10**9), ("80GiB", 80 * 2**30), ("1.5 gb", 15 * 10**8)])
def test_sizes(size: str, num_bytes: int) -> None:
    assert gpu_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["24", "GB", "-3GB", "0GB", "24 parsecs", ""])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(RecipeError, match="24GB or 80GiB"):
        gpu_bytes(size)


def test_the_plan_as_json_adds_up(tiny_llama: Path, tmp_path: Path) -> None:
    facts = json.loads(json.dumps(plan_recipe(load_recipe(recipe_for(tiny_llama, tmp_path))).to_json()))
    parts = ("process", "weights", "adapter", "gradients", "optimizer", "activations")
    assert sum(facts["bytes"][part] for part in parts) == facts["bytes"]["training"]
    assert facts["bytes"]["peak"] >= facts["bytes"]["training"]
