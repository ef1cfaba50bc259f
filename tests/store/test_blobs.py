"""Blobs in a folder and in S3: whole or not there, and never outside of their place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.errors import StorageError
from luthier.store.blobs import Blobs


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return Blobs(str(tmp_path / "blobs"))
    url, options = request.getfixturevalue("s3_bucket")
    return Blobs(url, options)


def test_a_blob_comes_back_as_it_was(blobs: Blobs) -> None:
    written = blobs.write("a/b.bin", [b"one", b"two"])
    assert written.num_bytes == 6
    assert written.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert b"".join(blobs.pieces("a/b.bin")) == b"onetwo"


def test_a_write_that_breaks_off_leaves_nothing(blobs: Blobs) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * (6 << 20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        blobs.write("a/b.bin", pieces())
    assert blobs.names("a") == []
    with pytest.raises(StorageError, match="not there"):
        list(blobs.pieces("a/b.bin"))


def test_folders_go_in_and_come_out(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "sub" / "two").write_bytes(b"22")
    first, again = blobs.put_folder("c/step", source), blobs.put_folder("c/again", source)
    assert first == again
    assert blobs.names("c/step") == ["one", "sub/two"]
    blobs.get_folder("c/step", tmp_path / "target")
    assert (tmp_path / "target/sub/two").read_bytes() == b"22"
    blobs.delete("c/step")
    assert blobs.names("c/step") == []
    assert blobs.names("c/again") == ["one", "sub/two"]
    with pytest.raises(StorageError, match="nothing is stored"):
        blobs.get_folder("c/step", tmp_path / "other")


def test_a_blob_can_be_had_as_a_local_file(blobs: Blobs, tmp_path: Path) -> None:
    blobs.write("f", [b"{}\n"])
    with blobs.local("f", "train.jsonl", tmp_path / "scratch") as path:
        assert path.name.endswith("train.jsonl")
        assert path.read_bytes() == b"{}\n"
    assert not path.exists()
    assert b"".join(blobs.pieces("f")) == b"{}\n"


@pytest.mark.parametrize("key", ["../x", "a/../x", "/etc/passwd", "", "a//b", "a/./b", ".hidden", "a b"])
def test_keys_never_lead_outside(blobs: Blobs, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        blobs.write(key, [b""])


def test_a_place_that_takes_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Blobs(str(tmp_path / "file")).ping() != ""
    assert Blobs(str(tmp_path / "new")).ping() == ""
