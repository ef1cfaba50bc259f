"""A user's own DeepSpeed configuration: which of its fields belong to the recipe, and which go to DeepSpeed.

A recipe names the file in `compute.deepspeed`. What both could say must agree, or be "auto" in the file, as in those
written for Hugging Face's integration. `FIELDS` is the whole of what is known; the reference of the recipe prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.errors import RecipeError, nearest

AUTO = "auto"

Kind = Literal["recipe", "fixed", "unused", "refused", "passed"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a field, or of a section as a whole.

    Attributes:
        kind: Of the recipe: `recipe`; of Luthier, which needs one value: `fixed`; without effect: `unused`; `refused`
            unless it is off; or `passed` to DeepSpeed.
        note: The recipe's field, or the reason.
        value: The one of `fixed`.
        words: The recipe's value -> DeepSpeed's, where they differ; what is not in it is `otherwise`.
    """

    kind: Kind
    note: str = ""
    value: Any = None
    words: Mapping[Any, Any] = field(default_factory=dict)
    otherwise: Any = None


def _recipe(name: str, words: Mapping[Any, Any] | None = None, otherwise: Any = None) -> Rule:
    return Rule("recipe", name, words=words or {}, otherwise=otherwise)


_PASSED = Rule("passed")
_OWN_REPORTS = "DeepSpeed's reports are not shown: those of a run are in its folder"
_OWN_CHECKPOINTS = "checkpoints are Luthier's own, and whole"
_CUT_BY_TOKENS = "a forward is cut by tokens: train.micro_batch_tokens"
_STEPPED = "what is stepped, and its moments, are float32"
_NO_SCALE = "without float16 there is no loss to scale"
_NO_FORWARD = "it acts in DeepSpeed's own forward, which is not called"
_MEAN = "the loss is scaled for a mean over ranks"
_DATA = "the order of the rows is the recipe's"
_QUANTIZED = "weights or gradients in fewer bits have not been shown to train so"
_GONE = "this version of DeepSpeed has it no more"
_OTHER_PARALLEL = "ranks share out rows and states alone"
_RECIPES_DTYPE = "what is computed in which precision is train.dtype"
_OLD_OFFLOAD = "this old name says less than offload_optimizer and offload_param"

FIELDS: dict[str, Rule] = {
    "train_batch_size": _recipe("train.batch_size"),
    "train_micro_batch_size_per_gpu": Rule("fixed", _CUT_BY_TOKENS, AUTO),
    "gradient_accumulation_steps": Rule("fixed", _CUT_BY_TOKENS, AUTO),
    "managed_gradient_accumulation": Rule("fixed", "the loop says where an optimizer batch ends", False),
    "gradient_clipping": _recipe("train.max_grad_norm"),
    "optimizer.type": _recipe("train.optimizer", {"adamw": "AdamW"}),
    "optimizer.params.lr": _recipe("train.learning_rate"),
    "optimizer.params.betas": _recipe("train.betas"),
    "optimizer.params.eps": _recipe("train.eps"),
    "optimizer.params.weight_decay": _recipe("train.weight_decay"),
    "optimizer.params.adam_w_mode": Rule("fixed", "weight decay is AdamW's", True),
    "optimizer.params.torch_adam": Rule("fixed", "torch's AdamW steps", True),
    "scheduler.type": _recipe(
        "train.schedule", {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
    ),
    "scheduler.params.warmup_num_steps": _recipe("train.warmup_steps"),
    "scheduler.params.warmup_max_lr": _recipe("train.learning_rate"),
    "scheduler.params.warmup_min_lr": Rule("fixed", "the warm-up rises from 0", 0),
    "scheduler.params.warmup_min_ratio": Rule("fixed", "the warm-up rises from 0", 0),
    "scheduler.params.warmup_type": Rule("fixed", "the warm-up is linear", "linear"),
    "scheduler.params.total_num_steps": _recipe("train.max_steps"),
    "scheduler.params.cos_min_ratio": _recipe("train.min_learning_rate_ratio"),
    "bf16.enabled": _recipe("train.dtype", {"bfloat16": True}, False),
    "bf16.bf16_master_weights_and_grads": Rule("fixed", _STEPPED, False),
    "bf16.bf16_optimizer_states": Rule("fixed", _STEPPED, False),
    "bf16.immediate_grad_update": _PASSED,
    "bf16.check_grad_overflow": Rule("fixed", "a gradient that is not finite ends the run", True),
    "fp16.enabled": _recipe("train.dtype", {"float16": True}, False),
    "fp16.fp16_master_weights_and_grads": Rule("fixed", _STEPPED, False),
    **{
        f"fp16.{name}": Rule("unused", _NO_SCALE)
        for name in (
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        )
    },
    "data_types.grad_accum_dtype": _PASSED,
    "communication_data_type": _PASSED,
    "prescale_gradients": Rule("fixed", _MEAN, False),
    "gradient_predivide_factor": Rule("fixed", _MEAN, 1),
    "gradient_allreduce_op": Rule("fixed", _MEAN, "mean"),
    "disable_allgather": _PASSED,
    "disable_python_gc": _PASSED,
    "zero_allow_untested_optimizer": Rule("fixed", "torch's AdamW steps, fused", True),
    "zero_force_ds_cpu_optimizer": Rule("fixed", "torch's AdamW steps, on a CPU too", False),
    "zero_optimization.stage": _recipe("compute.zero"),
    "zero_optimization.offload_optimizer.device": _recipe(
        "compute.offload", {"optimizer": "cpu", "parameters": "cpu"}, "none"
    ),
    "zero_optimization.offload_param.device": _recipe("compute.offload", {"parameters": "cpu"}, "none"),
    **{f"zero_optimization.offload_optimizer.{name}": _PASSED for name in ("pin_memory", "buffer_count")},
    **{f"zero_optimization.offload_param.{name}": _PASSED for name in ("pin_memory", "buffer_count", "buffer_size")},
    "zero_optimization.offload_param.max_in_cpu": _PASSED,
    "zero_optimization.offload_optimizer.ratio": Rule("fixed", "a state is offloaded as a whole", 1),
    "zero_optimization.offload_optimizer.super_offload": Rule("refused", "it steps by an optimizer of its own"),
    **{
        f"zero_optimization.{section}.{name}": Rule("unused", "nothing waits on a disk")
        for section, names in (
            ("offload_optimizer", ("nvme_path", "pipeline_read", "pipeline_write", "fast_init")),
            ("offload_param", ("nvme_path",)),
        )
        for name in names
    },
    **{
        f"zero_optimization.{name}": _PASSED
        for name in (
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "sub_group_size",
            "ignore_unused_parameters",
            "parameter_alignment",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "leaf_module",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
        )
    },
    "zero_optimization.stage3_model_persistence_threshold": Rule(
        "refused", "lora's factors must stay whole, however many they are"
    ),
    "zero_optimization.round_robin_gradients": Rule(
        "fixed", "what DeepSpeed then gives back of a parameter, for a checkpoint, is not that parameter's", False
    ),
    "zero_optimization.memory_efficient_linear": Rule(
        "fixed", "it would replace torch's linear function in the whole process", False
    ),
    "zero_optimization.compute_grad_norm": Rule("fixed", "every step reports the gradient's norm", True),
    **{
        f"zero_optimization.{name}": Rule("unused", _OWN_CHECKPOINTS)
        for name in (
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "pipeline_loading_checkpoint",
        )
    },
    **{
        f"zero_optimization.{name}": Rule("refused", _OLD_OFFLOAD)
        for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
    },
    **{
        f"zero_optimization.{name}": Rule("refused", _QUANTIZED)
        for name in (
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
        )
    },
    "zero_optimization.zero_hpz_partition_size": Rule("fixed", "a second copy has not been shown to train so", 1),
    "zero_optimization.zenflow": Rule("refused", "it steps a part of the weights later"),
    "zero_optimization.legacy_stage1": Rule("refused", "the old stage 1 has not been shown to train so"),
    **{
        name: Rule("unused", _OWN_REPORTS)
        for name in ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers")
    },
    **{
        name: Rule("refused", "what a run reports is in its folder")
        for name in ("tensorboard", "wandb", "comet", "csv_monitor", "comms_logger")
    },
    "flops_profiler": Rule("refused", _NO_FORWARD),
    "compile": Rule("refused", _NO_FORWARD),
    "activation_checkpointing": Rule("refused", "activations are recomputed as train.gradient_checkpointing says"),
    "checkpoint": Rule("unused", _OWN_CHECKPOINTS),
    "dataloader_drop_last": Rule("refused", _DATA),
    "data_efficiency": Rule("refused", _DATA),
    "curriculum_learning": Rule("refused", _GONE),
    "aio": Rule("unused", "nothing waits on a disk"),
    **{
        name: Rule("refused", _RECIPES_DTYPE)
        for name in (
            "torch_autocast",
            "data_types.param_dtype",
            "data_types.buffer_dtype",
            "data_types.keep_in_fp32_modules",
            "bfloat16",
            "ddp_bf16",
        )
    },
    "weight_quantization": Rule("refused", _QUANTIZED),
    "autotuning": Rule("refused", "a recipe's values are trained as they are"),
    "hybrid_engine": Rule("refused", "it trains no adapter and no base of Luthier's"),
    **{
        name: Rule("refused", _OTHER_PARALLEL)
        for name in (
            "pipeline",
            "tensor_parallel",
            "expert_parallel",
            "sequence_parallel_size",
            "seq_parallel_communication_data_type",
            "use_data_before_expert_parallelism",
        )
    },
    **{
        name: Rule("refused", _GONE)
        for name in (
            "amp",
            "nebula",
            "elasticity",
            "compression_training",
            "quantize_training",
            "sparse_gradients",
            "sparse_attention",
            "eigenvalue",
            "progressive_layer_drop",
        )
    },
}
"""Field, with its sections -> what becomes of it. What stands in none is refused."""


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """The file's values, as they are.

    Raises:
        RecipeError: for a file that is missing or holds no JSON object, or the same field twice.
    """
    name = f"compute.deepspeed: {path}"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise RecipeError(f"{name} is not there", fix="name a file, or leave it out") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{name} cannot be read: {error}", "a JSON object in UTF-8") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name} holds no object", "a JSON object of DeepSpeed's fields")
    return values


def stage_and_offload(values: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What the file says of the recipe's `compute.zero` and `compute.offload`; nothing of what it leaves open.

    Raises:
        RecipeError: for an offload that the recipe cannot name.
    """
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"{path}: zero_optimization is {zero!r}", 'a section, as in {"stage": 2}')
    found = {} if zero.get("stage", AUTO) == AUTO else {"zero": zero["stage"]}
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        devices[name] = section.get("device", AUTO) if isinstance(section, dict) else section
        if devices[name] not in (AUTO, "none", "cpu"):
            raise RecipeError(
                f"{path}: zero_optimization.{name}.device is {devices[name]!r}, which has not been shown to work",
                "cpu, none or auto",
            )
    if devices["offload_param"] == "cpu" and devices["offload_optimizer"] != "cpu":
        raise RecipeError(
            f"{path}: zero_optimization.offload_param waits in the host's memory, and offload_optimizer does not",
            "both, for that is compute.offload: parameters",
            'add "offload_optimizer": {"device": "cpu"}',
        )
    if "cpu" in devices.values():
        found["offload"] = "parameters" if devices["offload_param"] == "cpu" else "optimizer"
    elif "none" in devices.values():
        found["offload"] = "none"
    return found


def check_deepspeed_file(values: Mapping[str, Any], recipe: Mapping[str, Any], path: str | Path) -> None:
    """Hold every field against `FIELDS` and the recipe.

    Args:
        recipe: The recipe's values, nested, train.dtype settled.

    Raises:
        RecipeError: naming all that does not hold: both values of a conflict, the reason of what is refused.
    """
    problems = [problem for name, value in _leaves(values) if (problem := _problem(name, value, recipe))]
    if (values.get("zero_optimization") or {}).get("overlap_comm") is True and recipe["compute"]["zero"] == 1:
        problems.append("zero_optimization.overlap_comm is true, and DeepSpeed has it from stage 2 on")
    if problems:
        raise RecipeError(
            f"compute.deepspeed: {path} does not hold:\n" + "\n".join(f"  - {problem}" for problem in problems),
            'what the recipe says too, "auto", or nothing',
            "mend the file or the recipe; docs/reference/recipe.md has every field",
        )


def passed_on(values: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given of the file, nested as there: neither what Luthier or the recipe says, nor "auto"."""
    found: dict[str, Any] = {}
    for name, value in _leaves(values):
        rule = FIELDS.get(name)
        if rule is None or rule.kind != "passed" or value == AUTO:
            continue
        *parents, last = name.split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return found


def unused_in(values: Mapping[str, Any]) -> list[str]:
    """Fields of the file that have no effect."""
    return [name for name, _ in _leaves(values) if name in FIELDS and FIELDS[name].kind == "unused"]


def _problem(name: str, value: Any, recipe: Mapping[str, Any]) -> str:
    rule = FIELDS.get(name)
    if rule is None:
        return f"{name} is not known{nearest(name, FIELDS)}"
    if rule.kind == "refused":
        return "" if _is_off(value) else f"{name}: {rule.note}"
    if rule.kind == "fixed":
        is_it = value in (AUTO, rule.value)
        return "" if is_it else f"{name} is {value!r}, and must be {rule.value!r}: {rule.note}"
    if rule.kind == "recipe" and value != AUTO:
        ours: Any = recipe
        for part in rule.note.split("."):
            ours = ours[part]
        wanted = rule.words.get(ours, rule.otherwise) if rule.words else ours
        if not _are_equal(value, wanted):
            return f"{name} is {value!r}, and {rule.note} is {ours!r}"
    return ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with the names of its sections; a section that `FIELDS` knows as a whole is one."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        has_parts = any(known.startswith(f"{name}.") for known in FIELDS)
        if has_parts and isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        elif not (has_parts and value is None):
            yield name, value


def _is_off(value: Any) -> bool:
    return value in (None, False, AUTO) or (isinstance(value, dict) and value.get("enabled") is False)


def _are_equal(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.casefold() == ours.casefold()
    if isinstance(ours, tuple | list):
        return isinstance(theirs, list) and list(ours) == theirs
    return type(theirs) is not str and theirs == ours


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return values
