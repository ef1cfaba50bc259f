"""Where a verb acts: on the server that --server names, or on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.client.api import Server


@dataclass(frozen=True)
class Where:
    """What the root options say about the server; url None means this machine."""

    url: str | None = None
    key: str | None = None


def server_of(context: typer.Context | None) -> Server | None:
    """The server that --server names; None without it, and for callers from Python, who have no context."""
    where = (context.find_object(Where) if context is not None else None) or Where()
    if where.url is None:
        return None
    key = where.key or os.environ.get("LUTHIER_API_KEY")
    if not key:
        raise RecipeError("no API key is given", "--key, or LUTHIER_API_KEY in the environment")
    try:
        from luthier.client.api import Server
    except ModuleNotFoundError as error:
        raise RecipeError(f"{error.name} is not installed", fix="pip install 'luthier[service]'") from None
    return Server(where.url, key)


def refuse_here_only(**given: object) -> None:
    """Refuse options that mean something on this machine alone, beside a server.

    Args:
        given: An option's name -> its value; what is None or empty was not given.

    Raises:
        RecipeError: naming the first that was given.
    """
    for name, value in given.items():
        if value not in (None, [], False):
            raise RecipeError(
                f"--{name} speaks of this machine, and --server of another", "one of the two", f"leave --{name} out"
            )
