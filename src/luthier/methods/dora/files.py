"""DoRA's part of PEFT's files, without torch and peft: LoRA's with `use_dora`, and a magnitude a layer."""

from __future__ import annotations

from typing import Any

from luthier.methods.lora.files import LoraFormat


class DoraFormat(LoraFormat):
    """`peft_type` LORA with `use_dora`."""

    method = "dora"
    fields = LoraFormat.fields | {"use_dora"}
    tensors = (*LoraFormat.tensors, "lora_magnitude_vector")

    def claims(self, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == self.peft_type and bool(config.get("use_dora"))


DORA_FILES = DoraFormat()
