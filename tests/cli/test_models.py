"""`luthier models` lists what there is and fetches what is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.base.catalogue import CATALOGUE
from luthier.cli.models import models_command
from luthier.errors import ModelError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    monkeypatch.setenv("LUTHIER_OFFLINE", "1")


def test_the_table_names_every_base(capsys: pytest.CaptureFixture[str]) -> None:
    models_command(fetch=None, json=False)
    shown = capsys.readouterr().out
    assert all(entry.name in shown for entry in CATALOGUE)


def test_json_tells_what_is_cached(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path) -> None:
    cached = tmp_path / "bases" / "smollm2-135m-instruct"
    cached.parent.mkdir()
    cached.symlink_to(tiny_llama)
    models_command(fetch=None, json=True)
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["name"], first["folder"]) == ("smollm2-135m-instruct", None)  # nobody finished it: no source.json

    cached.unlink()
    cached.mkdir()
    for path in tiny_llama.iterdir():
        (cached / path.name).write_bytes(path.read_bytes())
    (cached / "source.json").write_text('{"revision": "a test"}')
    models_command(fetch=None, json=True)
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["folder"], first["revision"]) == (str(cached), "a test")
    assert first["size_bytes"] == sum(path.stat().st_size for path in cached.iterdir())


def test_fetching_a_folder_says_where_it_lies(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    models_command(fetch=str(tiny_llama), json=True)
    assert json.loads(capsys.readouterr().out)["folder"] == str(tiny_llama)


def test_fetching_without_network_is_an_error() -> None:
    with pytest.raises(ModelError, match="could not be fetched"):
        models_command(fetch="qwen3-0.6b", json=False)
