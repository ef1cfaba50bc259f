"""The methods of the bank by name."""

from __future__ import annotations

from luthier.methods.dora.layer import DORA
from luthier.methods.ia3.layer import IA3
from luthier.methods.lora.layer import LORA
from luthier.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (LORA, DORA, IA3)}
"""`AdapterSpec.method` -> the method."""
