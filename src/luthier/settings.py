"""What the environment decides: where the cache is, and whether the network may be used.

LUTHIER_CACHE     the cache folder (default: $XDG_CACHE_HOME/luthier, else ~/.cache/luthier)
LUTHIER_OFFLINE   1: fetch nothing at all
HF_HUB_OFFLINE    1: do not ask the Hub (a package index may still be asked)
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """The environment's choices.

    Attributes:
        cache_folder: Where fetched and converted bases lie. It need not exist yet.
        offline: Nothing is fetched, from anywhere.
        hub_offline: The Hub is not asked; true whenever `offline` is.
    """

    cache_folder: Path
    offline: bool
    hub_offline: bool


def read_settings() -> Settings:
    """Read the environment now; nothing is remembered between calls."""
    offline = _is_set("LUTHIER_OFFLINE")
    return Settings(
        cache_folder=_cache_folder(),
        offline=offline,
        hub_offline=offline or _is_set("HF_HUB_OFFLINE"),
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def _cache_folder() -> Path:
    if chosen := os.environ.get("LUTHIER_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "luthier"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "luthier" / "cache"
    return Path.home() / ".cache" / "luthier"
