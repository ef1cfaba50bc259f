"""A base in NF4: what is quantized, that it computes what bitsandbytes' own layers compute, and what it takes."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_models import bitsandbytes_model
from slots import random_sequences, slot_logits, stirred
from tiny_models import write_tiny_llama

from luthier.base.load import Base, load_base
from luthier.errors import ModelError, RecipeError
from luthier.extras import MINIMUM_BITSANDBYTES
from luthier.types import AdapterSpec


@pytest.fixture(params=["tiny_llama", "tiny_llama_tied", "tiny_phi3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(folder, quantization="nf4")


def test_every_linear_layer_but_the_output_layer_is_quantized(base: Base, folder: Path) -> None:
    plain = load_base(folder)
    assert base.quantization == "nf4"
    assert plain.quantization is None
    assert set(base.nf4_weights) == set(plain.bank.linears) - {"lm_head"}
    assert {p.dtype for p in base.frozen_parameters()} == {torch.float32}  # embeddings, norms and the output layer
    assert base.num_parameters == plain.num_parameters
    assert base.bank.resolve_targets(AdapterSpec()) == plain.bank.resolve_targets(AdapterSpec())


def test_it_computes_what_bitsandbytes_own_layers_compute(base: Base, folder: Path) -> None:
    theirs = bitsandbytes_model(folder)
    for name, weight in base.nf4_weights.items():
        layer = theirs.get_submodule(name)
        assert torch.equal(weight.packed, layer.weight.data)
        assert torch.equal(weight.state.absmax, layer.weight.quant_state.absmax)
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        assert torch.equal(base.as_transformers()(input_ids=ids, use_cache=False).logits, expected)


def test_the_probe_holds_over_it(base: Base, folder: Path) -> None:
    plain = load_base(folder)
    assert base.is_packed, base.packing_problem
    assert base.head_is_plain
    groups = [
        {m.name for m in module.group.members}
        for module in base.model.modules()
        if getattr(module, "group", None) is not None
    ]
    expected = [
        {m.name for m in module.group.members}
        for module in plain.model.modules()
        if getattr(module, "group", None) is not None
    ]
    assert groups == expected


def test_a_slot_on_it_is_not_a_slot_on_the_plain_base(folder: Path) -> None:
    """The rounding is there, and it is of the size that NF4 has."""
    spec, sequences = AdapterSpec(rank=2), random_sequences((20,), 300)
    [ours] = slot_logits(held := load_base(folder, quantization="nf4"), stirred(held, spec), sequences)
    [plain] = slot_logits(exact := load_base(folder), stirred(exact, spec), sequences)
    assert 0.02 < float((ours - plain).norm() / plain.norm()) < 1.0


def test_another_compute_type_holds_the_same_weights(tmp_path: Path) -> None:
    """Trained over in bfloat16, computed with in float32: what a merge needs."""
    folder = write_tiny_llama(tmp_path)  # in float32, so that rounding to bfloat16 first makes a difference
    low = load_base(folder, dtype="bfloat16", quantization="nf4")
    wide = load_base(folder, quantization="nf4", quantized_from="bfloat16")
    exact = load_base(folder, quantization="nf4")
    assert wide.dtype == torch.float32
    for name, weight in wide.nf4_weights.items():
        assert torch.equal(weight.dense(), low.nf4_weights[name].dense(torch.float32))
    assert any(not torch.equal(w.dense(), exact.nf4_weights[name].dense()) for name, w in wide.nf4_weights.items())


def test_resident_linear_layers_take_under_three_tenths_of_bfloat16(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    base = load_base(folder, dtype="bfloat16", quantization="nf4")
    plain = load_base(folder, dtype="bfloat16")
    linear = sum(2 * plain.bank.linears[name].weight.numel() for name in base.nf4_weights)
    assert base.nf4_bytes < 0.30 * linear
    assert plain.num_bytes - base.num_bytes == linear - base.nf4_bytes
    assert base.dense_bytes == 2 * 256 * 512


def test_a_quantized_layer_is_not_trained_in_full(base: Base) -> None:
    with pytest.raises(RecipeError, match=r"o_proj is held in NF4.*\n.*not quantized"):
        base.bank.add(AdapterSpec(targets=("down_proj",), modules_to_save=("o_proj",)), 0)
    assert base.bank.add(AdapterSpec(modules_to_save=("lm_head",)), 0).saved_modules.keys() == {"lm_head"}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_numbers_is_refused(base: Base, init: str) -> None:
    with pytest.raises(RecipeError, match=f"method.init is {init}.*is quantized"):
        base.bank.add(AdapterSpec(rank=2, init=init), 0)  # type: ignore[arg-type]


def test_without_bitsandbytes_the_extra_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> Any:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RecipeError, match=r"(?s)not installed.*luthier\[qlora\]"):
        load_base(tiny_llama, quantization="nf4")
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.45.1" if name == "bitsandbytes" else version(name)
    )
    with pytest.raises(RecipeError, match=r"(?s)0\.45\.1 is installed.*0\.50 or later"):
        load_base(tiny_llama, quantization="nf4")


def test_the_extra_asks_for_what_the_check_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["qlora"] == [f"bitsandbytes>={MINIMUM_BITSANDBYTES}"]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_base_that_is_stored_quantized_is_refused(quantization: str | None, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"stored quantized already \(bitsandbytes\)"):
        load_base(folder, quantization=quantization)


def test_a_base_without_linear_layers_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Conv1D"):
        load_base(tmp_path, quantization="nf4")
