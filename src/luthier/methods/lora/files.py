"""LoRA's part of PEFT's files, without torch and peft."""

from __future__ import annotations

from typing import Any, ClassVar

from luthier.errors import ModelError
from luthier.methods.file_format import FileFormat, Shapes, by_pattern, positive_number
from luthier.types import AdapterSpec

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; pissa, olora, corda, loftq and lora_ga change it."""

FIELDS = frozenset(
    {
        "alpha_pattern",
        "ensure_weight_tying",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "runtime_config",
        "trainable_token_indices",
        "use_rslora",
    }
)


class LoraFormat(FileFormat):
    """`peft_type` LORA."""

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    fields: ClassVar[frozenset[str]] = FIELDS
    tensors: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    def claims(self, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == self.peft_type and not config.get("use_dora")

    def strange(self, config: dict[str, Any]) -> dict[str, Any]:
        found = {"bias": config["bias"]} if config.get("bias", "none") != "none" else {}
        if config.get("init_lora_weights", True) not in PLAIN_STARTS:
            found["init_lora_weights"] = config["init_lora_weights"]
        return found

    def spec(self, where: str, config: dict[str, Any]) -> AdapterSpec:
        return AdapterSpec(
            method=self.method,
            rank=positive_number(where, config, "r", int),
            alpha=float(positive_number(where, config, "lora_alpha", int | float)),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=bool(config.get("use_rslora")),
        )

    def check(self, folder: str, config: dict[str, Any], module: str, shapes: Shapes) -> None:
        found = shapes["lora_A.weight"][0], shapes["lora_B.weight"][1]
        expected = by_pattern(config.get("rank_pattern"), module, config["r"])
        if found != (expected, expected):
            raise ModelError(
                f"{folder}: {module} has rank {found[0]} and {found[1]}", f"{expected}, as its config says"
            )


LORA_FILES = LoraFormat()
