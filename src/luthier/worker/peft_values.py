"""Are the values of a peft method's fields of the right kind? peft annotates its configs and checks nothing."""

from __future__ import annotations

import typing
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from luthier.errors import RecipeError
from luthier.methods.peft.fields import known_types
from luthier.types import ExclusiveSpec


def check_values(spec: ExclusiveSpec) -> None:
    """Hold each value against its field's annotation. Call once `check_fields` has passed the names.

    Raises:
        RecipeError: naming the field, what was found and what its annotation says.
    """
    config_class = known_types()[spec.peft_type]
    hints = typing.get_type_hints(config_class)
    for name, value in spec.options.items():
        try:
            TypeAdapter(_widened(hints[name])).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise RecipeError(
                f"method.config.{name}: found {value!r}; {message[:1].lower()}{message[1:]}",
                f"{_text(hints[name])}, as {config_class.__name__} of peft says",
            ) from None


def _widened(hint: Any) -> Any:
    """peft annotates several fields `int` whose default is None."""
    return hint | None if isinstance(hint, type) and not issubclass(hint, Enum) else hint


def _text(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_text(part) for part in get_args(hint))
    if hint is NoneType:
        return "null"
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint).replace("typing.", "")
