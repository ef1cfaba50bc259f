"""Packages that only some recipes need: each is an extra of Luthier, and its absence is said before any work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

from packaging.version import Version

from luthier.errors import RecipeError

MINIMUM_BITSANDBYTES = "0.50"
"""The first with 8-bit AdamW on a CPU and one dequantization for every processor; as in pyproject.toml."""

MINIMUM_DEEPSPEED = "0.19.8"
"""The one that was tested: gradient accumulation that the caller bounds, on CPU processes too; as in pyproject.toml."""

_EXTRAS = {"mido": "music", "defusedxml": "art", "resvg_py": "art"}
"""Package -> its extra, where that is not `tasks`."""


def require_for_scoring(task: str, packages: Sequence[str]) -> None:
    """Refuse a task whose scores need packages that are missing; none is loaded.

    Raises:
        RecipeError: naming them, and the extra to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        extras = ",".join(dict.fromkeys(_EXTRAS.get(name, "tasks") for name in missing))
        raise RecipeError(
            f"task: {task} is judged with {' and '.join(missing)}, which {are} not installed",
            fix=f"pip install 'luthier[{extras}]'",
        )


def require_bitsandbytes(purpose: str) -> None:
    """Refuse what needs bitsandbytes where it is missing or too old; it is not loaded.

    Args:
        purpose: What needs it, as the error's subject.

    Raises:
        RecipeError: naming the extra to install.
    """
    _require("bitsandbytes", MINIMUM_BITSANDBYTES, "qlora", purpose)


def require_deepspeed(purpose: str) -> None:
    """As `require_bitsandbytes`, of DeepSpeed."""
    _require("deepspeed", MINIMUM_DEEPSPEED, "deepspeed", purpose)


def _require(package: str, minimum: str, extra: str, purpose: str) -> None:
    fix = f"pip install 'luthier[{extra}]'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(f"{purpose} needs {package}, which is not installed", fix=fix) from None
    if Version(found) < Version(minimum):
        raise RecipeError(f"{purpose} needs {package}, and {found} is installed", f"{minimum} or later", fix)
