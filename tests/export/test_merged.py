"""The merged export is the tuned model: it loads by itself, says the same, and is not there when it does not."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from slots import distance, model_logits, sequences_for, slot_logits, stirred

from luthier.base.load import load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.data.template import Renderer
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RunError, StorageError
from luthier.export import merged as module
from luthier.export.merged import export_merged
from luthier.types import AdapterSpec

SPECS = {
    "plain": AdapterSpec(rank=4, alpha=8.0),
    "rank stabilized": AdapterSpec(rank=3, alpha=7.5, rank_stabilized=True, targets=("o_proj",)),
    "output layer": AdapterSpec(rank=2, alpha=4.0, targets=("o_proj", "lm_head")),
    "trained output layer": AdapterSpec(rank=2, modules_to_save=("lm_head",)),
    "trained norm and embedding": AdapterSpec(rank=2, modules_to_save=("norm", "embed_tokens")),
    "known tokens": AdapterSpec(rank=2, new_tokens=(7, 5)),
    "new tokens": AdapterSpec(rank=2, new_tokens=(320, 9, 321)),
    "new tokens with a gap": AdapterSpec(rank=2, new_tokens=(324,)),
    "pissa": AdapterSpec(rank=2, init="pissa", targets=("o_proj",)),
    "dora on the output layer": AdapterSpec(method="dora", rank=2, targets=("o_proj", "lm_head")),
    "ia3 on the output layer": AdapterSpec(method="ia3", targets=("lm_head", "down_proj")),
}


@pytest.fixture(params=["tiny_llama", "tiny_llama_tied", "tiny_phi3"])
def base_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def write(base_folder: Path, spec: AdapterSpec, folder: Path, dtype: str = "float64", **options: Any) -> Slot:
    """An adapter as a run leaves it, with its tokenizer; and its slot, on a base of its own."""
    base = load_base(base_folder, dtype=dtype)
    slot = stirred(base, spec)
    write_adapter(slot, base, folder, base_name=str(base_folder), **options)
    Renderer.load(base_folder).save(folder)
    return slot


def tuned_logits(base_folder: Path, spec: AdapterSpec, sequences: list[Any]) -> list[torch.Tensor]:
    base = load_base(base_folder, dtype="float64")
    return slot_logits(base, stirred(base, spec), sequences)


@pytest.mark.parametrize("name", SPECS)
def test_the_export_says_what_base_and_adapter_say(base_folder: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = SPECS[name]
    before = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    write(base_folder, spec, tmp_path / "adapter")
    said: list[str] = []
    output = tmp_path / "merged"
    found = export_merged(base_folder, tmp_path / "adapter", output, dtype="float64", on_progress=said.append)
    assert found == output
    assert any("again" in message for message in said)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="float64").eval()
    sequences = sequences_for(spec)
    expected = tuned_logits(base_folder, spec, sequences)
    ours = model_logits(model, sequences, classifies=False)
    assert distance(ours, expected, num_columns=320) < 1e-9
    if new := [token for token in spec.new_tokens if token >= 320]:
        assert model.config.vocab_size == max(new) + 1
        assert distance([x[:, new] for x in ours], [x[:, new] for x in expected]) < 1e-9
    assert {path.name: path.read_bytes() for path in base_folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    tokenizer = AutoTokenizer.from_pretrained(output)
    messages = [{"role": "user", "content": "hello"}]
    rendered = AutoTokenizer.from_pretrained(base_folder).apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered
    assert not (output / "adapter_config.json").exists()


def test_a_tied_base_stays_tied_unless_one_side_changed(tiny_llama_tied: Path, tmp_path: Path) -> None:
    def names(spec: AdapterSpec, folder: Path) -> tuple[bool, bool]:
        write(tiny_llama_tied, spec, folder / "adapter")
        output = export_merged(tiny_llama_tied, folder / "adapter", folder / "merged", dtype="float32")
        with safe_open(output / "model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        return json.loads((output / "config.json").read_text())["tie_word_embeddings"], "lm_head.weight" in stored

    assert names(SPECS["known tokens"], tmp_path / "a") == (True, False)
    assert names(SPECS["output layer"], tmp_path / "b") == (False, True)


def test_a_classifier_becomes_a_classifier(base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    spec = AdapterSpec(rank=2, num_classes=3, modules_to_save=("norm",), new_tokens=(9,))
    write(base_folder, spec, tmp_path / "adapter", labels=["cold", "warm", "hot"], pad_token_id=4)
    export_merged(base_folder, tmp_path / "adapter", tmp_path / "merged", dtype="float64")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="float64").eval()
    assert model.config.id2label == {0: "cold", 1: "warm", 2: "hot"}
    assert model.config.pad_token_id == 4
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.architectures == [type(model).__name__]
    sequences = sequences_for(spec)
    assert distance(model_logits(model, sequences, classifies=True), tuned_logits(base_folder, spec, sequences)) < 1e-9


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}]
)
def test_an_adapter_of_pefts_over_a_larger_vocabulary(
    base_folder: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def larger() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype="float64")
        model.resize_token_embeddings(322, mean_resizing=False)
        return model

    tuned = get_peft_model(larger(), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    tuned.save_pretrained(tmp_path / "adapter")
    sequences = sequences_for(AdapterSpec(new_tokens=(320, 321)))
    expected = model_logits(
        PeftModel.from_pretrained(larger(), tmp_path / "adapter").eval(), sequences, classifies=False
    )
    export_merged(base_folder, tmp_path / "adapter", tmp_path / "merged", dtype="float64")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float64").eval()
    assert distance(model_logits(model, sequences, classifies=False), expected) < 1e-9
    assert (tmp_path / "merged" / "tokenizer.json").is_file()  # the base's, for the adapter brings none


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_dtype_is_the_bases_own_or_the_callers(
    tiny_llama: Path, dtype: str | None, stored: str, tmp_path: Path
) -> None:
    write(tiny_llama, SPECS["plain"], tmp_path / "adapter", dtype="float32")
    export_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118


# -- refusals


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    write(tiny_llama, SPECS["plain"], tmp_path / "adapter", dtype="float32")
    return tmp_path / "adapter"


def test_an_export_that_says_something_else_is_thrown_away(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module._save

    def spoilt(model: Any, folder: Path) -> None:
        with torch.no_grad():
            model.get_submodule("model.layers.0.self_attn.o_proj").weight *= 1.05
        save(model, folder)

    monkeypatch.setattr(module, "_save", spoilt)
    with pytest.raises(ModelError, match="differs from base and adapter"):
        export_merged(tiny_llama, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_narrow_export_is_checked_as_tightly(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error far below what rounding costs is seen, because the files are held against the rounded model."""
    save = module._save

    def spoilt(model: Any, folder: Path) -> None:
        with torch.no_grad():
            model.get_submodule("model.layers.0.self_attn.o_proj").weight[0] *= 1.02
        save(model, folder)

    monkeypatch.setattr(module, "_save", spoilt)
    with pytest.raises(ModelError, match=r"the export .* differs"):
        export_merged(tiny_llama, adapter, tmp_path / "merged", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_that_leaves_a_layer_out_is_noticed(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = module.merge

    def forgetful(model: Any, slot: Slot) -> None:
        del slot.adapters["model.layers.1.mlp.down_proj"]
        merge(model, slot)

    monkeypatch.setattr(module, "merge", forgetful)
    with pytest.raises(ModelError, match="the merged model differs"):
        export_merged(tiny_llama, adapter, tmp_path / "merged", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_nothing_is_written_over(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        export_merged(tiny_llama, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (export_merged(tiny_llama, adapter, tmp_path / "empty") / "config.json").is_file()


def test_an_unknown_dtype_is_refused(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="dtype is 'int3'"):
        export_merged(tiny_llama, adapter, tmp_path / "merged", dtype="int3")


def test_a_full_disk_leaves_nothing(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # files past 50 kB fail as on a full disk
    try:
        with pytest.raises(StorageError, match="could not be written"):
            export_merged(tiny_llama, adapter, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
