"""Methods that the `peft` package brings: any of them by name, the best known as types of their own.

A type's own fields are checked here, without torch. What stands in `config` is checked against the method's config
class in `peft` before the base is loaded; `peft` imports torch, so that happens in the worker.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.types import ExclusiveSpec

Targets = Literal["all-linear"] | list[str]


class PeftConfig(ExclusiveConfig):
    """Any method of the installed `peft`, by peft's own name, with peft's own fields."""

    type: Literal["peft"] = "peft"
    usual_learning_rate: ClassVar[float] = 1e-3
    name: str = Field(min_length=1)
    """The method as peft calls it, in any case, as in boft, hra or fourierft."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that method's config class in peft, as in {r: 8, target_modules: [q_proj]}."""

    def exclusive_spec(self) -> ExclusiveSpec:
        return ExclusiveSpec("peft", peft_type=self.name.strip().upper(), options=dict(self.config))


class _Named(ExclusiveConfig):
    """A method of peft under a short name. `peft_names` says what peft calls its fields."""

    peft_type: ClassVar[str]
    peft_names: ClassVar[dict[str, str]]

    config: dict[str, Any] = Field(default_factory=dict)
    """Further fields of this method's config class in peft."""

    @model_validator(mode="after")
    def _no_field_twice(self) -> _Named:
        for own, theirs in self.peft_names.items():
            if theirs in self.config:
                raise ValueError(f"config.{theirs} is what the field {own} sets; leave one of them out")
        return self

    def exclusive_spec(self) -> ExclusiveSpec:
        own = {theirs: getattr(self, ours) for ours, theirs in self.peft_names.items()}
        given = {name: value for name, value in own.items() if value is not None}
        return ExclusiveSpec("peft", peft_type=self.peft_type, options=given | self.config)


class PromptConfig(_Named):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): embeddings of virtual tokens before every sequence."""

    type: Literal["prompt"] = "prompt"
    usual_learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_names: ClassVar[dict[str, str]] = {
        "virtual_tokens": "num_virtual_tokens",
        "init_text": "prompt_tuning_init_text",
    }

    virtual_tokens: int = Field(default=20, ge=1)
    """Trained embeddings before every sequence."""
    init_text: str | None = None
    """Begin from the embeddings of this text, repeated or cut; null begins from those of random tokens."""

    def exclusive_spec(self) -> ExclusiveSpec:
        spec = super().exclusive_spec()
        how = "TEXT" if self.init_text is not None else "SAMPLE_VOCAB"
        spec.options.setdefault("prompt_tuning_init", how)
        return spec


class PrefixConfig(_Named):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190): keys and values of virtual tokens in every layer."""

    type: Literal["prefix"] = "prefix"
    usual_learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_names: ClassVar[dict[str, str]] = {
        "virtual_tokens": "num_virtual_tokens",
        "projection": "prefix_projection",
        "encoder_hidden_size": "encoder_hidden_size",
    }

    virtual_tokens: int = Field(default=20, ge=1)
    """Trained positions before every sequence, in every layer."""
    projection: bool = False
    """Make the keys and values by a small network that training shapes; only its results are saved."""
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of that network; null takes the base's hidden size."""


class PTuningConfig(_Named):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens whose embeddings a small network makes."""

    type: Literal["p_tuning"] = "p_tuning"
    usual_learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "P_TUNING"
    peft_names: ClassVar[dict[str, str]] = {
        "virtual_tokens": "num_virtual_tokens",
        "encoder": "encoder_reparameterization_type",
        "encoder_hidden_size": "encoder_hidden_size",
    }

    virtual_tokens: int = Field(default=20, ge=1)
    """Virtual tokens before every sequence."""
    encoder: Literal["MLP", "LSTM"] = "MLP"
    """The network that makes their embeddings; only its results are saved."""
    encoder_hidden_size: int = Field(default=128, ge=1)
    """Width of that network."""


class VeraConfig(_Named):
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454): random factors that all layers share, scaled by vectors."""

    type: Literal["vera"] = "vera"
    usual_learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "VERA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "d_initial": "d_initial",
        "dropout": "vera_dropout",
        "targets": "target_modules",
    }

    rank: int = Field(default=256, ge=1)
    """Rank of the shared random factors, which are not trained."""
    d_initial: float = Field(default=0.1, gt=0)
    """Where the vector of the inner scaling begins."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input features dropped while training."""
    targets: list[str] = Field(default=["q_proj", "v_proj"], min_length=1)
    """Linear layers to adapt, by the end of their names; the shared factors are as large as the largest of them."""


class _Layers(_Named):
    targets: Targets = "all-linear"
    """Linear layers to adapt, by the end of their names, as in [q_proj, v_proj]; or all but the output layer."""


class LohaConfig(_Layers):
    """LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): the update is a product, entry by entry, of two low-rank ones."""

    type: Literal["loha"] = "loha"
    usual_learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "LOHA"
    peft_names: ClassVar[dict[str, str]] = {"rank": "r", "alpha": "alpha", "targets": "target_modules"}

    rank: int = Field(default=8, ge=1)
    """Rank of each of the two factors; the update's is up to its square."""
    alpha: int = Field(default=8, ge=1)
    """The update is scaled by alpha / rank."""


class LokrConfig(_Layers):
    """LoKr (Yeh et al. 2023, arXiv:2309.14859): the update is a Kronecker product of a small and a low-rank matrix."""

    type: Literal["lokr"] = "lokr"
    usual_learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "LOKR"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "alpha",
        "decompose_factor": "decompose_factor",
        "targets": "target_modules",
    }

    rank: int = Field(default=8, ge=1)
    """Rank of the larger of the two matrices."""
    alpha: int = Field(default=8, ge=1)
    """The update is scaled by alpha / rank."""
    decompose_factor: int = -1
    """Rows of the smaller matrix, at most; -1 comes as near to a square as the layer allows."""


class OftConfig(_Layers):
    """OFT (Qiu et al. 2023, arXiv:2306.07280): every layer's input is turned by a block-diagonal rotation."""

    type: Literal["oft"] = "oft"
    usual_learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "OFT"
    peft_names: ClassVar[dict[str, str]] = {"block_size": "oft_block_size", "targets": "target_modules"}

    block_size: int = Field(default=32, ge=2)
    """Rows of one block of the rotation; it must divide the layers' inputs."""


class BoftConfig(_Layers):
    """BOFT (Liu et al. 2023, arXiv:2311.06243) with one factor: weights turned by blocks, and scaled by output."""

    type: Literal["boft"] = "boft"
    usual_learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "BOFT"
    peft_names: ClassVar[dict[str, str]] = {
        "block_size": "boft_block_size",
        "dropout": "boft_dropout",
        "targets": "target_modules",
    }

    block_size: int = Field(default=4, ge=2)
    """Rows of one block; it must divide the layers' inputs."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of blocks that are left out while training."""


class AdaloraConfig(_Layers):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + P diag(l) Q, whose ranks are cut where they matter least."""

    type: Literal["adalora"] = "adalora"
    usual_learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "ADALORA"
    peft_names: ClassVar[dict[str, str]] = {
        "initial_rank": "init_r",
        "target_rank": "target_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "warmup_steps": "tinit",
        "final_steps": "tfinal",
        "every": "deltaT",
        "orthogonality": "orth_reg_weight",
        "targets": "target_modules",
    }

    initial_rank: int = Field(default=12, ge=1)
    """Rank of every layer at the start."""
    target_rank: int = Field(default=8, ge=1)
    """Mean rank of the layers at the end."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha over the initial rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input features dropped while training."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps before any rank is cut."""
    final_steps: int = Field(default=0, ge=0)
    """Steps at the end in which ranks stay as they are."""
    every: int = Field(default=1, ge=1)
    """Steps between two cuts."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the term that keeps P and Q orthogonal."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaloraConfig:
        if self.target_rank >= self.initial_rank:
            raise ValueError(f"target_rank {self.target_rank} must be below initial_rank {self.initial_rank}")
        return self


class LnTuningConfig(_Named):
    """Layer-norm tuning (Zhao et al. 2023, arXiv:2312.11420): the norms' weights alone are trained."""

    type: Literal["ln_tuning"] = "ln_tuning"
    usual_learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str] = "LN_TUNING"
    peft_names: ClassVar[dict[str, str]] = {"targets": "target_modules"}

    targets: list[str] | None = None
    """Norms to train, by the end of their names; null takes those that peft knows for the architecture."""
