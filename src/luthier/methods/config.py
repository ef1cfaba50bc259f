"""Every method's config behind one discriminated field: `method: {type: ...}`.

A method registers by adding its config here; pydantic discriminates as soon as there are two.
"""

from __future__ import annotations

from luthier.methods.lora.config import LoraConfig

MethodConfig = LoraConfig
