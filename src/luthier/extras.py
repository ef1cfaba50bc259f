"""Packages that only some recipes need: each is an extra of Luthier, and its absence is said before any work."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from luthier.errors import RecipeError

MINIMUM_BITSANDBYTES = "0.50"
"""The first with 8-bit AdamW on a CPU and one dequantization for every processor; as in pyproject.toml."""


def require_bitsandbytes(purpose: str) -> None:
    """Refuse what needs bitsandbytes where it is missing or too old; it is not loaded.

    Args:
        purpose: What needs it, as the error's subject.

    Raises:
        RecipeError: naming the extra to install.
    """
    fix = "pip install 'luthier[qlora]'"
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(f"{purpose} needs bitsandbytes, which is not installed", fix=fix) from None
    if Version(found) < Version(MINIMUM_BITSANDBYTES):
        raise RecipeError(
            f"{purpose} needs bitsandbytes, and {found} is installed", f"{MINIMUM_BITSANDBYTES} or later", fix
        )
