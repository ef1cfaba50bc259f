"""A DeepSpeed file of one's own: filled, merged or refused, each field as its rule says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.compute import ComputeConfig
from luthier.deepspeed_file import FIELDS, check_deepspeed_file, passed_on, read_deepspeed_file, unused_in
from luthier.distributed.zero_config import zero_config
from luthier.errors import RecipeError
from luthier.recipe import Recipe, load_recipe

HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1000000000,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 500000000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""As the guides of Hugging Face's integration have it."""


def recipe_with(folder: Path, values: Any, **sections: Any) -> Recipe:
    file = folder / "my.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    compute = {"deepspeed": str(file), **sections.pop("compute", {})}
    return load_recipe({"data": {"train": "rows.jsonl"}, "compute": compute, **sections})


def checked(folder: Path, values: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """What DeepSpeed gets of a file that holds."""
    recipe = recipe_with(folder, values, **sections)
    read = read_deepspeed_file(folder / "my.json")
    check_deepspeed_file(read, recipe.model_dump(), "my.json")
    return passed_on(read)


def test_a_file_for_hugging_faces_integration_is_taken(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, HUGGING_FACE)
    assert (recipe.compute.zero, recipe.compute.offload) == (3, "parameters")
    passed = checked(tmp_path, HUGGING_FACE, train={"schedule": "linear"})
    assert passed == {
        "zero_optimization": {
            "offload_optimizer": {"pin_memory": True},
            "offload_param": {"pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1000000000,
            "stage3_max_live_parameters": 500000000,
        }
    }
    config = zero_config(3, "parameters", 0.5, is_bfloat16=False, largest_kept_whole=7, own=passed)
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 7
    assert config["zero_optimization"]["overlap_comm"] is True
    assert "steps_per_print" in unused_in(HUGGING_FACE)


def test_what_the_file_leaves_open_is_the_recipes(tmp_path: Path) -> None:
    for values in ({}, {"zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "auto"}}}):
        recipe = recipe_with(tmp_path, values, compute={"zero": 2, "offload": "optimizer"})
        assert (recipe.compute.zero, recipe.compute.offload) == (2, "optimizer")
    both = recipe_with(tmp_path, {"zero_optimization": {"stage": 2}}, compute={"zero": 2, "offload": "optimizer"})
    assert load_recipe(both) == both
    assert load_recipe(both.model_dump(mode="json")) == both
    made = Recipe.model_validate({"data": {"train": "x"}, "compute": ComputeConfig(deepspeed=both.compute.deepspeed)})
    assert load_recipe(made).compute.zero == 2


def test_a_file_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl}\ncompute: {deepspeed: my.json}\n")
    compute = load_recipe(tmp_path / "recipe.yaml").compute
    assert (compute.zero, compute.deepspeed) == (1, str(tmp_path / "my.json"))


@pytest.mark.parametrize(
    ("values", "compute", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, {"zero": 3}, r"compute\.zero is 3, and .*my\.json says 2"),
        ({"zero_optimization": {"stage": 2}}, {"zero": 0}, r"compute\.zero is 0, and .*my\.json says 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
            {"offload": "optimizer"},
            r"compute\.offload is optimizer, and .*my\.json says none",
        ),
        ({}, {}, "no stage of ZeRO is named"),
        ({"zero_optimization": {"stage": 0}}, {}, "no stage of ZeRO is named"),
        ({"zero_optimization": {"stage": 5}}, {}, r"zero: found 5"),
        ({"zero_optimization": True}, {}, "zero_optimization is True"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, "'nvme', which has not been shown"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {}, "offload_optimizer does not"),
        ('{"zero_optimization": {}, "zero_optimization": {}}', {}, "'zero_optimization' stands there twice"),
        ("[]", {}, "holds no object"),
        ("{", {}, "cannot be read"),
    ],
)
def test_stage_and_offload_are_one_or_an_error(tmp_path: Path, values: Any, compute: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_with(tmp_path, values, compute=compute)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not there"):
        load_recipe({"data": {"train": "rows.jsonl"}, "compute": {"deepspeed": str(tmp_path / "none.json")}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train_batch_size": 64}, r"train_batch_size is 64, and train\.batch_size is 16"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type is 'Lamb', and train\.optimizer is 'adamw'"),
        ({"optimizer": {"params": {"lr": 0.1}}}, r"optimizer\.params\.lr is 0\.1, and train\.learning_rate is 0\.0005"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"\[0\.9, 0\.95\], and train\.betas is \(0\.9, 0\.999\)"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler\.type is 'WarmupLR', and train\.schedule is 'cosine'"),
        ({"scheduler": {"params": {"warmup_type": "log"}}}, "must be 'linear': the warm-up is linear"),
        ({"scheduler": {"params": {"total_num_steps": 9}}}, r"total_num_steps is 9, and train\.max_steps is None"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0\.5, and train\.max_grad_norm is 1\.0"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled is True, and train\.dtype is 'float32'"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled is True, and train\.dtype is 'float32'"),
        ({"train_micro_batch_size_per_gpu": 4}, r"must be 'auto': .*train\.micro_batch_tokens"),
        ({"gradient_allreduce_op": "sum"}, "must be 'mean'"),
        ({"zero_force_ds_cpu_optimizer": True}, "must be False: torch's AdamW"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "fewer bits"),
        ({"zero_optimization": {"overlap_comm": True}}, "from stage 2 on"),
        ({"zero_optimization": {"overlap_com": True}}, r"not known \(did you mean 'zero_optimization\.overlap_comm'"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler: it acts in DeepSpeed's own forward"),
        ({"amp": {"enabled": True}}, "no more"),
        ({"optimiser": {}}, "optimiser is not known"),
    ],
)
def test_conflicts_and_unknown_fields_are_named(tmp_path: Path, values: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        checked(tmp_path, values, compute={"zero": 1}, train={"dtype": "float32"})


def test_the_same_from_both_is_no_conflict(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 16,
        "gradient_clipping": 1,
        "optimizer": {"type": "adamw", "params": {"lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear"}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "zero_optimization": {"stage": 2, "zero_quantized_gradients": False, "reduce_bucket_size": 1000},
        "communication_data_type": "fp32",
    }
    passed = checked(tmp_path, values, train={"dtype": "bfloat16", "warmup_steps": 3})
    assert passed == {"zero_optimization": {"reduce_bucket_size": 1000}, "communication_data_type": "fp32"}


def test_a_rule_of_the_recipe_names_a_field_of_it() -> None:
    values = load_recipe({"data": {"train": "rows.jsonl"}}).model_dump()
    for rule in FIELDS.values():
        if rule.kind == "recipe":
            section, name = rule.note.split(".")
            assert name in values[section]
