"""Blobs: bytes under keys, in a folder or in any store that fsspec reaches, such as S3.

A blob appears whole or not at all: in a folder it is written aside and renamed, in S3 an upload counts once it is
complete. Keys are made by Luthier from ids, never from what a caller sent.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from luthier.errors import StorageError

PIECE_BYTES = 1 << 20
_KEY = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.:-]*(/[A-Za-z0-9_][A-Za-z0-9_.:-]*)*$")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: how many bytes, and their SHA-256."""

    num_bytes: int
    sha256: str


class Blobs:
    """A place for blobs.

    Args:
        url: A folder, or what fsspec understands, as in "s3://bucket/prefix".
        options: For fsspec's file system, as in {"endpoint_url": ...}.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = url
        self._files, root = fsspec.core.url_to_fs(url, **(options or {}))
        self._root = root.rstrip("/")
        self.folder: Path | None = Path(root) if "file" in _protocols(self._files) else None
        """The folder itself, where the store is one."""

    def _path(self, key: str) -> str:
        if not _KEY.match(key):
            raise ValueError(f"{key!r} is no key")
        return f"{self._root}/{key}"

    def write(self, key: str, pieces: Iterable[bytes]) -> Written:
        """Write a blob from pieces; when a piece raises, nothing is left behind.

        Raises:
            StorageError: when the store does not take it.
        """
        digest, size = hashlib.sha256(), 0
        with self.writer(key) as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        return Written(size, digest.hexdigest())

    @contextmanager
    def writer(self, key: str) -> Iterator[IO[bytes]]:
        """A file to write a blob into; the blob is there once the block ends well."""
        path = self._path(key)
        if self.folder is not None:
            with _local_writer(Path(path)) as file:
                yield file
            return
        # Written aside and renamed by fsspec's transaction for multi-part uploads: closing commits, discarding aborts.
        handle = self._files.open(path, "wb", autocommit=False)
        try:
            yield handle
            handle.close()
            handle.commit()
        except OSError as error:
            _discard(handle)
            raise StorageError(f"{key} could not be stored: {error}", fix="look at LUTHIER_STORAGE") from error
        except BaseException:
            _discard(handle)
            raise

    def open(self, key: str) -> IO[bytes]:
        """Open a blob for reading.

        Raises:
            StorageError: when it is not there.
        """
        try:
            return self._files.open(self._path(key), "rb")  # type: ignore[no-any-return]
        except FileNotFoundError:
            raise StorageError(f"the blob {key} is not there", fix="restore it from a backup") from None

    def pieces(self, key: str) -> Iterator[bytes]:
        """A blob's bytes, a piece at a time."""
        with self.open(key) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def put_folder(self, prefix: str, folder: Path) -> Written:
        """Copy a folder's files under `prefix`. The digest is over their names and digests.

        Nothing reads a prefix before its caller has recorded it, so files that were copied before a failure do no harm.
        """
        digest, size = hashlib.sha256(), 0
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                with path.open("rb") as file:
                    written = self.write(f"{prefix}/{name}", file_pieces(file))
                digest.update(f"{name}\0{written.sha256}\n".encode())
                size += written.num_bytes
        return Written(size, digest.hexdigest())

    def get_folder(self, prefix: str, folder: Path) -> None:
        """Copy all files under `prefix` into a new `folder`, which appears whole.

        Raises:
            StorageError: when there are none.
        """
        names = self.names(prefix)
        if not names:
            raise StorageError(f"nothing is stored under {prefix}", fix="restore it from a backup")
        aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        try:
            for name in names:
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for piece in self.pieces(f"{prefix}/{name}"):
                        file.write(piece)
            shutil.rmtree(folder, ignore_errors=True)
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def names(self, prefix: str) -> list[str]:
        """Names of the files under `prefix`, relative to it."""
        path = self._path(prefix)
        self._files.invalidate_cache()
        if not self._files.exists(path):
            return []
        return sorted(str(found)[len(path) + 1 :] for found in self._files.find(path))

    def delete(self, key: str) -> None:
        """Delete a blob, or all blobs under a prefix; nothing happens where there are none."""
        path = self._path(key)
        self._files.invalidate_cache()
        if self.folder is not None:
            target = Path(path)
            if target.is_dir():
                # Renamed first, so that nobody meets a half-deleted folder.
                away = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
                target.replace(away)
                shutil.rmtree(away)
            else:
                target.unlink(missing_ok=True)
        elif self._files.exists(path):
            self._files.rm(path, recursive=True)

    @contextmanager
    def local(self, key: str, name: str, scratch: Path) -> Iterator[Path]:
        """The blob as a file with the given name on this machine's disk, while the block lasts."""
        scratch.mkdir(parents=True, exist_ok=True)
        target = scratch / f"{secrets.token_hex(8)}-{name}"
        try:
            if self.folder is not None:
                _link(Path(self._path(key)), target)
            else:
                with target.open("wb") as file:
                    for piece in self.pieces(key):
                        file.write(piece)
            yield target
        finally:
            target.unlink(missing_ok=True)

    def ping(self) -> str:
        """Why nothing can be written, or an empty string."""
        key = f"probe_{secrets.token_hex(4)}"
        try:
            self.write(key, [b"probe"])
            self.delete(key)
        except (StorageError, OSError) as error:
            return str(error).splitlines()[0]
        return ""


def file_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """A file's bytes, a piece at a time."""
    while piece := file.read(PIECE_BYTES):
        yield piece


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextmanager
def _local_writer(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path.name} could not be stored: {error.strerror}", fix="free some space where LUTHIER_STORAGE points"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    if not source.exists():
        raise StorageError(f"the blob {source.name} is not there", fix="restore it from a backup")
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _discard(handle: Any) -> None:
    try:
        handle.discard()
    except Exception:  # the first error is the one to tell
        return
