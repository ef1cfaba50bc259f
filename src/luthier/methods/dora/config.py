"""DoRA's fields in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from luthier.strict import Strict
from luthier.types import AdapterSpec


class DoraConfig(Strict):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353): LoRA with each row's length apart."""

    runs: ClassVar[Literal["bank", "exclusive"]] = "bank"
    usual_learning_rate: ClassVar[float] = 5e-4

    type: Literal["dora"] = "dora"
    rank: int = Field(default=16, ge=1)
    """Rank r of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) if rank_stabilized)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input features dropped on the trained branch while training; costs a second product with the base."""
    rank_stabilized: bool = False
    """rsLoRA: scale by alpha / sqrt(rank), which keeps learning stable at high ranks (arXiv:2312.03732)."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: B's learning rate as a multiple of A's and the magnitudes' (arXiv:2402.12354)."""
    quantization: Literal["nf4"] | None = None
    """nf4 holds the base in 4 bits, as QLoRA does (luthier[qlora])."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers to adapt, by the end of their names, as in [q_proj, v_proj]; or all but the output layer."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full besides, by the end of their names, as in [lm_head]."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens added to the vocabulary (or found in it), whose embeddings are trained."""

    def adapter_spec(self) -> AdapterSpec:
        """The plain values for the engine; new tokens' ids and classes are filled in once the tokenizer is known."""
        return AdapterSpec(
            method=self.type,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilized=self.rank_stabilized,
            lora_plus_ratio=self.lora_plus_ratio,
            targets=self.targets if isinstance(self.targets, str) else tuple(self.targets),
            modules_to_save=tuple(self.modules_to_save),
        )
