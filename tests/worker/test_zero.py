"""ZeRO over two processes gives what one gives without it; what it cannot train is refused with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_jobs
from safetensors.torch import load_file
from tiny_models import write_tiny_llama
from torch import Tensor
from worker.test_ranks import (
    NUM_KILLS,
    At,
    assert_equal_runs,
    kill_and_resume,
    last_step,
    lines_of,
    needs_deepspeed,
    press_ctrl_c,
    recipe_for,
)

import luthier
from luthier.checkpoints.checkpoint import checkpoint_folder
from luthier.compute import ZERO_TABLE
from luthier.engine.ranks import ALONE
from luthier.engine.zero_states import ModelStates, model_states
from luthier.errors import LuthierError, RecipeError
from luthier.recipe import load_recipe
from luthier.worker.plan import plan_recipe
from luthier.worker.zero import check_zero

TOLERANCE = 1e-5
"""Of losses in float32, relative. Adam's division magnifies rounding: weights and moments have 5e-3 of their norm."""


NARROW_TOLERANCE = 5e-3
"""Of losses in bfloat16, whose gradients each side rounds in another place."""


def zero_recipe(base: Path, folder: Path, name: str, *, devices: int, zero: int, **more: Any) -> dict[str, Any]:
    recipe = recipe_for(base, folder, name, devices=devices, micro_batch_tokens=100, **more)
    recipe["compute"]["zero"] = zero
    return recipe


@pytest.fixture(scope="module")
def tiny_biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-biased", attention_bias=True, mlp_bias=True)


def assert_states_are_the_papers(held: Tensor, plain: Tensor, method: str, stage: int, offload: str) -> None:
    """A rank's bytes of weights, gradients and optimizer, beside what one process without ZeRO holds."""
    if method.endswith(zero_jobs.IN_BFLOAT16) or method == "qlora":
        return  # weights of several widths are no formula's
    all_weights, trained = plain[0].item() // 4, plain[1].item() // 4
    formula = model_states(all_weights - trained, trained, 4, stage, 2)
    # Lora's factors stay whole beside their parts; a parameter on the border of two parts has its gradient in both.
    weights = formula.weights + (4 * trained if method == "lora" and stage == 3 else 0)
    wanted = [weights, formula.gradients, formula.optimizer]
    if offload != "none":  # a host's copies come beside
        held, wanted = held[::2], wanted[::2]
    for found, size in zip(held.tolist(), wanted, strict=True):
        assert size <= found <= 1.1 * size + 2048, (method, stage, offload, held, wanted)


@needs_deepspeed
def test_every_stage_equals_one_process(tiny_biased: Path, tmp_path: Path) -> None:
    """Every method that may, with dropout, weight decay and clipping, offloaded or not."""
    meeting = (tmp_path / "meeting").as_uri()
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, zero_jobs.__file__, str(rank), "2", meeting, str(out), str(tiny_biased)])
        for rank, out in enumerate(outs)
    ]
    methods = dict.fromkeys(method for method, *_ in zero_jobs.SETTINGS)
    expected = {method: zero_jobs.outcome(tiny_biased, method, 0, "none", ALONE) for method in methods}
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0]
    first, second = (torch.load(out) for out in outs)
    assert list(first) == zero_jobs.SETTINGS
    for (method, *setting), found in first.items():
        plain = expected[method]
        others = second[(method, *setting)]
        for rank in (found, others):
            assert_states_are_the_papers(rank.pop("held"), plain["held"], method, *setting)
        assert found.keys() == plain.keys() - {"held"}
        assert torch.equal(found["tokens"], plain["tokens"])
        is_narrow = method.endswith(zero_jobs.IN_BFLOAT16)
        rounding = NARROW_TOLERANCE if is_narrow else TOLERANCE
        torch.testing.assert_close(found["losses"], plain["losses"], rtol=rounding, atol=0)
        torch.testing.assert_close(found["norms"], plain["norms"], rtol=10 * rounding, atol=0)
        for name, tensor in plain.items() if not is_narrow else ():
            if name == "held" or ".k_proj.bias" in name:  # softmax does not see a key's bias: its gradient is rounding
                continue
            assert float((found[name] - tensor).float().norm()) <= 5e-3 * float(tensor.float().norm()), (
                method,
                setting,
                name,
            )
        for name, tensor in others.items():
            assert torch.equal(found[name], tensor), (method, setting, name)


def own_file(folder: Path) -> str:
    """A DeepSpeed file that says the stage, and some of what is DeepSpeed's."""
    zero = {"stage": 3, "reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 4000, "overlap_comm": True}
    file = folder / "my.json"
    values = {"zero_optimization": zero, "train_batch_size": "auto", "gradient_clipping": 1.0, "steps_per_print": 9}
    file.write_text(json.dumps(values))
    return str(file)


@needs_deepspeed
def test_a_killed_rank_loses_nothing_and_other_ranks_and_stages_go_on(tiny_llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "epochs": 6 + NUM_KILLS}
    whole = luthier.train(recipe_for(tiny_llama, tmp_path, "whole", micro_batch_tokens=100, **settings)).folder
    two = zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=0, **settings)
    two["compute"] = {**two["compute"], "deepspeed": own_file(tmp_path)}
    del two["compute"]["zero"]
    kill_and_resume(two, 4 * settings["epochs"] // 2)
    one = recipe_for(tiny_llama, tmp_path, "run", micro_batch_tokens=100, **settings)
    with pytest.raises(KeyboardInterrupt):
        luthier.train(one, resume=True, progress=At(last_step(tmp_path / "run") + 2, press_ctrl_c))
    result = luthier.train(zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=2, **settings), resume=True)
    assert result.status == "done"
    assert result.result["num_processes"] == 2
    assert_equal_runs(tmp_path / "run", whole)


@needs_deepspeed
def test_bfloat16_goes_on_from_the_float32_that_is_stepped(tiny_llama: Path, tmp_path: Path) -> None:
    """From stage 2 with an offloaded optimizer to stage 3, as one that was not stopped."""
    settings: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "dtype": "bfloat16", "epochs": 4}
    whole = luthier.train(zero_recipe(tiny_llama, tmp_path, "whole", devices=2, zero=2, **settings)).folder
    begun = zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=2, **settings)
    begun["compute"]["offload"] = "optimizer"
    with pytest.raises(KeyboardInterrupt):
        luthier.train(begun, progress=At(3, press_ctrl_c))
    folder = checkpoint_folder(tmp_path / "run" / "checkpoints", last_step(tmp_path / "run"))
    (file,) = folder.glob("trained-*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    result = luthier.train(zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=3, **settings), resume=True)
    assert result.status == "done"
    ours, theirs = ([line["loss"] for line in lines_of(run, "step")] for run in (tmp_path / "run", whole))
    assert ours == pytest.approx(theirs, rel=NARROW_TOLERANCE)


def test_states_are_the_papers() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters in 16 bits over 64 GPUs."""
    totals = [model_states(0, 7_500_000_000, 2, stage, 64).total / 1e9 for stage in (1, 2, 3)]
    assert totals == pytest.approx([31.4, 16.6, 1.9], abs=0.05)
    assert model_states(90, 10, 4, 3, 2) == ModelStates(200, 20, 60)
    assert model_states(90, 10, 4, 0, 2) == ModelStates(400, 40, 80)


def test_a_plan_tells_the_states_of_each_stage(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("full", None):
        recipe = load_recipe(recipe_for(tiny_llama, tmp_path, "run", devices=2, method=method))
        facts = plan_recipe(recipe).to_json()
        rows, sizes = facts["zero"], facts["bytes"]
        assert [row["stage"] for row in rows] == [0, 1, 2, 3]
        assert rows[0]["weights"] == sizes["weights"] + sizes["adapter"]
        assert rows[0]["optimizer"] == sizes["optimizer"] == 8 * facts["num_trained_parameters"]
        assert rows[3]["weights"] == rows[0]["weights"] // 2
        assert rows[1]["optimizer"] == 6 * facts["num_trained_parameters"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "loha"}, "has not been shown"),
        ({"method": "adalora"}, "whole gradients"),
        ({"method": {"type": "peft", "name": "AdaLora"}}, "whole gradients"),
        ({"method": "ia3"}, "has not been shown"),
        ({"method": "qlora"}, "no parameter"),
        ({"method": {"type": "dora", "quantization": "nf4"}}, "no parameter"),
        ({"method": {"type": "dora", "rank": 2}}, "outside their layers' forward"),
        ({"method": "lokr"}, "outside their layers' forward"),
        ({"method": {"type": "lora", "modules_to_save": ["norm"]}}, "in full"),
        ({"task": {"type": "classification", "head": "linear", "labels": ["a", "b"]}}, "a head"),
        ({"train": {"optimizer": "adamw_8bit"}}, "torch's AdamW alone"),
        ({"method": "full", "train": {"dtype": "float16"}}, "a scaled loss"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(tiny_llama: Path, tmp_path: Path, change: dict, reason: str) -> None:
    stage = 1 if change.get("method") == "loha" else 3
    recipe = zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=stage)
    for name, value in change.items():
        recipe[name] = {**recipe[name], **value} if name == "train" else value
    with pytest.raises(RecipeError, match=reason):
        check_zero([load_recipe(recipe)])


@needs_deepspeed
def test_recipes_that_share_a_base_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipes = [load_recipe(zero_recipe(tiny_llama, tmp_path, name, devices=2, zero=1)) for name in "ab"]
    with pytest.raises(RecipeError, match="at once"):
        check_zero(recipes)


@pytest.mark.parametrize(("zero", "offload"), [(0, "optimizer"), (2, "parameters")])
def test_offload_needs_its_stage(tiny_llama: Path, tmp_path: Path, zero: int, offload: str) -> None:
    recipe = zero_recipe(tiny_llama, tmp_path, "run", devices=2, zero=zero)
    recipe["compute"]["offload"] = offload
    with pytest.raises(LuthierError, match=f"offload: {offload}"):
        load_recipe(recipe)


def test_the_table_knows_every_kind_and_stage() -> None:
    assert len(ZERO_TABLE) == 3 * len({kind for kind, _ in ZERO_TABLE})
