"""(IA)^3's part of PEFT's files, without torch and peft."""

from __future__ import annotations

from typing import Any

from luthier.methods.file_format import FileFormat, Shapes
from luthier.types import AdapterSpec


class Ia3Format(FileFormat):
    """`peft_type` IA3. Whether a layer's input or output is scaled is seen from its vector's shape."""

    method = "ia3"
    fields = frozenset({"feedforward_modules", "init_ia3_weights"})
    tensors = ("ia3_l",)

    def claims(self, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "IA3"

    def strange(self, config: dict[str, Any]) -> dict[str, Any]:
        return {}

    def spec(self, where: str, config: dict[str, Any]) -> AdapterSpec:
        feedforward = config.get("feedforward_modules") or ()
        return AdapterSpec(
            method=self.method, feedforward=tuple(sorted(feedforward)) if not isinstance(feedforward, str) else None
        )

    def check(self, folder: str, config: dict[str, Any], module: str, shapes: Shapes) -> None:
        """Its vector's shape is held against the layer's once the base is there."""


IA3_FILES = Ia3Format()
