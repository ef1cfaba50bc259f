"""QLoRA's fields in a recipe: LoRA's, over a base in NF4."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from luthier.methods.lora.config import LoraConfig


class QloraConfig(LoraConfig):
    """LoRA over a base in 4 bits (Dettmers et al. 2023, arXiv:2305.14314): y = dequantize(W) x + (alpha / r) B A x."""

    type: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    init: Literal["default"] = "default"  # type: ignore[assignment]
    """pissa and olora take a part out of the base's weight in numbers, so that they are there with lora alone."""

    @field_validator("init", mode="before")
    @classmethod
    def _plain_start(cls, value: Any) -> Any:
        if value in ("pissa", "olora"):
            raise ValueError(
                f"{value} takes a part out of the base's weight, which is in NF4 here; leave it out, or set type: lora"
            )
        return value

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """How the base is held."""
        return "nf4"
