"""Every method's config behind one discriminated field: `method: {type: ...}`. A method registers here in one line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.dora.config import DoraConfig
from luthier.methods.ia3.config import Ia3Config
from luthier.methods.lora.config import LoraConfig
from luthier.methods.qlora.config import QloraConfig

MethodConfig = Annotated[LoraConfig | QloraConfig | DoraConfig | Ia3Config, Field(discriminator="type")]
