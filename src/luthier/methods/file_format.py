"""What a method says of PEFT's files, so that they can be read without torch, peft or pickle."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from luthier.errors import ModelError
from luthier.types import AdapterSpec

Shapes = Mapping[str, tuple[int, ...]]
"""A layer's tensors by their names within it."""


class FileFormat(ABC):
    """How a method's adapters look in adapter_config.json and adapter_model.safetensors.

    Attributes:
        method: The bank's name of it.
        fields: Fields of the config that are read, or that change nothing once an adapter is trained. Any other that is
            set is refused, for it would change the arithmetic.
        tensors: What each adapted layer has in the weights' file.
    """

    method: ClassVar[str]
    fields: ClassVar[frozenset[str]]
    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def claims(self, config: dict[str, Any]) -> bool:
        """Whether the config is of this method."""

    @abstractmethod
    def strange(self, config: dict[str, Any]) -> dict[str, Any]:
        """Known fields with values that would change the arithmetic."""

    @abstractmethod
    def spec(self, where: str, config: dict[str, Any]) -> AdapterSpec:
        """The method's own part of a slot's spec.

        Args:
            where: The config's path, for errors.

        Raises:
            ModelError: for a value that cannot be.
        """

    @abstractmethod
    def check(self, folder: str, config: dict[str, Any], module: str, shapes: Shapes) -> None:
        """Hold a layer's tensors against the config.

        Raises:
            ModelError: where they do not agree.
        """


def by_pattern(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    for end, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({end})$", module):
            return value
    return default


def positive_number(where: str, config: dict[str, Any], name: str, kind: Any) -> Any:
    """A field that must be a positive number.

    Raises:
        ModelError: for any other value.
    """
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where} has {name} = {value!r}", "a positive number")
    return value
