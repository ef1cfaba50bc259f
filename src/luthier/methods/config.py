"""Every method's config behind one discriminated field: `method: {type: ...}`. A method registers here in one line."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from luthier.methods.bias.config import BiasConfig
from luthier.methods.dora.config import DoraConfig
from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.methods.full.config import FullConfig
from luthier.methods.ia3.config import Ia3Config
from luthier.methods.last_layers.config import LastLayersConfig
from luthier.methods.lora.config import LoraConfig
from luthier.methods.peft.config import (
    AdaloraConfig,
    BoftConfig,
    LnTuningConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    VeraConfig,
)
from luthier.methods.qlora.config import QloraConfig
from luthier.types import AdapterSpec, ExclusiveSpec

InBank = LoraConfig | QloraConfig | DoraConfig | Ia3Config
OwnWeights = FullConfig | LastLayersConfig | BiasConfig
OfPeft = (
    PeftConfig
    | PromptConfig
    | PrefixConfig
    | PTuningConfig
    | VeraConfig
    | LohaConfig
    | LokrConfig
    | OftConfig
    | BoftConfig
    | AdaloraConfig
    | LnTuningConfig
)

BANK_TYPES = frozenset(str(config.model_fields["type"].default) for config in get_args(InBank))
"""Names of the methods whose jobs share a resident base."""

MethodConfig = Annotated[InBank | OwnWeights | OfPeft, Field(discriminator="type")]


def bank_spec(method: InBank | OwnWeights | OfPeft) -> AdapterSpec:
    """The plain values of a method of the bank.

    Raises:
        ValueError: for an exclusive one.
    """
    if isinstance(method, ExclusiveConfig):
        raise ValueError(f"{method.type} is no method of the bank")
    return method.adapter_spec()


def exclusive_spec(method: InBank | OwnWeights | OfPeft) -> ExclusiveSpec:
    """The plain values of an exclusive method.

    Raises:
        ValueError: for one of the bank.
    """
    if not isinstance(method, ExclusiveConfig):
        raise ValueError(f"{method.type} is a method of the bank")
    return method.exclusive_spec()
