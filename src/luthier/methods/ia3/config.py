"""(IA)^3's fields in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from luthier.strict import Strict
from luthier.types import AdapterSpec


class Ia3Config(Strict):
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): learned factors of keys, values and feed-forward activations."""

    runs: ClassVar[Literal["bank", "exclusive"]] = "bank"
    usual_learning_rate: ClassVar[float] = 5e-3

    type: Literal["ia3"] = "ia3"
    quantization: Literal["nf4"] | None = None
    """nf4 holds the base in 4 bits, as QLoRA does (luthier[qlora])."""
    targets: Literal["default"] | list[str] = "default"
    """Linear layers to scale, by the end of their names; default is keys, values and the feed-forward's down projection
    (the whole of a projection that holds queries, keys and values in one)."""
    feedforward: list[str] | None = None
    """Those of the targets whose input is scaled, not their output; null takes the down projections among them."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full besides, by the end of their names, as in [lm_head]."""

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Ia3Config:
        if self.feedforward is not None:
            if self.targets == "default":
                raise ValueError("feedforward names some of targets, so targets must be named too")
            if stray := [name for name in self.feedforward if name not in self.targets]:
                raise ValueError(f"feedforward names {stray[0]!r}, which is not among targets {list(self.targets)}")
        return self

    @property
    def new_tokens(self) -> list[str]:
        """None: PEFT's files of this method have no place for trained tokens."""
        return []

    def adapter_spec(self) -> AdapterSpec:
        """The plain values for the engine; classes are filled in once the data is known."""
        return AdapterSpec(
            method=self.type,
            targets=self.targets if isinstance(self.targets, str) else tuple(self.targets),
            feedforward=tuple(self.feedforward) if self.feedforward is not None else None,
            modules_to_save=tuple(self.modules_to_save),
        )
