"""DeepSpeed's configuration, made of what a recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BUCKET_VALUES = 20_000_000
"""Values that are reduced or gathered at a time. DeepSpeed's own default holds 2 GB of float32 for it."""


def zero_config(
    stage: int,
    offload: str,
    max_grad_norm: float,
    *,
    is_bfloat16: bool,
    largest_kept_whole: int,
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of one job.

    Args:
        stage: 1, 2 or 3.
        offload: "none", "optimizer" or "parameters": what waits in the host's memory; parameters at stage 3 alone, and
            the optimizer's state with them.
        max_grad_norm: Clipping; 0 for none.
        is_bfloat16: Whether what trains is held so; it is then stepped in float32.
        largest_kept_whole: At stage 3, parameters of at most so many values stay whole on every rank.
        own: A user's values, as `luthier/deepspeed_file.py` passes them on.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_VALUES,
        "allgather_bucket_size": BUCKET_VALUES,
        # A second stream gains on many GPUs, and holds buckets twice.
        "overlap_comm": False,
        # It would replace torch's linear function in the whole process.
        "memory_efficient_linear": False,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = largest_kept_whole
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        # Batches are Luthier's: what DeepSpeed calls a micro-batch is one backward.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        # torch's AdamW, fused on CPU and GPU alike, so that a curve does not depend on the stage.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **({"bf16": {"enabled": True}} if is_bfloat16 else {}),
    }
    return _merged(ours, own or {})


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; theirs where both have a value."""
    merged = dict(ours)
    for name, value in theirs.items():
        section = merged.get(name)
        merged[name] = _merged(section, value) if isinstance(section, dict) and isinstance(value, dict) else value
    return merged
