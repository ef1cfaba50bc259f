"""Writing so that what was there before stays whole: a temporary name beside the target, then one rename."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write under `path` into a StorageError that says what is still whole."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        raise StorageError(
            f"{path} could not be written: {reason}",
            "room and permission to write there",
            ("free some space" if full else "choose a folder that you may write to")
            + " and start again; what was there before is untouched and nothing half-written is left behind",
        ) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Where another process put a whole folder there first, that one stays.

    Raises:
        StorageError: when writing fails in the block or around it.
    """
    temporary = path.parent / f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, making its folder if need be. Lone surrogates are written as escapes.

    Raises:
        StorageError: if it cannot be written; what was there before is still whole.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step, making its folder if need be; errors as `write_text`."""
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace_folder(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
