"""LoRA's fields in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from luthier.strict import Strict
from luthier.types import AdapterSpec


class LoraConfig(Strict):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha / r) B A x."""

    runs: ClassVar[Literal["bank", "exclusive"]] = "bank"
    usual_learning_rate: ClassVar[float] = 5e-4

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) if rank_stabilized)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input features dropped on the low-rank branch while training."""
    rank_stabilized: bool = False
    """rsLoRA: scale by alpha / sqrt(rank), which keeps learning stable at high ranks (arXiv:2312.03732)."""
    init: Literal["default", "pissa", "olora"] = "default"
    """Start from the base's principal part (pissa, arXiv:2404.02948) or a part of its QR (olora, arXiv:2406.01775)."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: B's learning rate as a multiple of A's; its paper advises 16 (arXiv:2402.12354)."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers to adapt, by the end of their names, as in [q_proj, v_proj]; or all but the output layer."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full besides, by the end of their names, as in [lm_head]."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens added to the vocabulary (or found in it), whose embeddings are trained."""

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """How the base is held."""
        return None

    def adapter_spec(self) -> AdapterSpec:
        """The plain values for the engine; new tokens' ids and classes are filled in once the tokenizer is known."""
        return AdapterSpec(
            method="lora",
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            init=self.init,
            lora_plus_ratio=self.lora_plus_ratio,
            targets=self.targets if isinstance(self.targets, str) else tuple(self.targets),
            modules_to_save=tuple(self.modules_to_save),
        )
