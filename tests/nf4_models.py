"""The other side of the tests over NF4: transformers with bitsandbytes' own layers, and peft over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def bitsandbytes_model(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The base as people load it for QLoRA.

    It is left in training mode: in evaluation mode bitsandbytes repacks weights on some CPUs, and refuses sizes that
    are no multiple of 32.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": device}
    )
    return model.train()


def peft_over_nf4(folder: Path, adapter: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The adapter's files over that base, trainable, by peft alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(bitsandbytes_model(folder, dtype, device), adapter, is_trainable=True).train()
