"""A base's layers from its config alone, and what is refused by them before any weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.base.load import load_base
from luthier.base.outline import Outline, outline
from luthier.engine.targets import check_layers, resolve_targets
from luthier.errors import ModelError, RecipeError
from luthier.types import AdapterSpec


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_phi3", "tiny_qwen3"])
def test_it_says_what_the_loaded_base_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")  # and no weights
    found = outline(tmp_path)
    bank = load_base(folder).bank
    assert found.layers == {name: (m.in_features, m.out_features) for name, m in bank.linears.items()}
    assert list(found.layers) == list(bank.linears)
    assert found.output_name == bank.output_name == "lm_head"


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not describe a causal language model"):
        outline(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="does not describe a causal language model"):
        outline(tmp_path)


@pytest.mark.parametrize(
    ("method", "message", "expected"),
    [
        (
            {"type": "lora", "rank": 33},
            r"method\.rank is 33, and .*k_proj is a matrix of 32 x 64",
            "a rank from 1 to 32",
        ),
        ({"type": "dora", "rank": 65, "targets": ["o_proj"]}, r"method\.rank is 65", "a rank from 1 to 64"),
        ({"type": "lora", "rank": 0}, r"method\.rank: found 0", ""),
        ({"type": "dora", "targets": ["q_prj"]}, r"named 'q_prj' \(did you mean 'q_proj'\?\)", "down_proj, gate_proj"),
        ({"type": "ia3", "targets": ["c_attn"]}, "named 'c_attn'", "k_proj, lm_head, o_proj"),
        ({"type": "ia3", "feedforward": ["down_proj"]}, "targets must be named too", ""),
        ({"type": "ia3", "targets": ["v_proj"], "feedforward": ["up_proj"]}, "'up_proj', which is not among", ""),
        ({"type": "lora", "init": "pisa"}, r"method\.init: found 'pisa'", ""),
        ({"type": "lroa"}, r"'lroa' is not known \(did you mean 'lora'\?\)", ""),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_the_base_is_loaded(
    method: dict[str, Any],
    message: str,
    expected: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("luthier.worker.train.load_placed", refuse)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = {
        "base": str(tiny_llama),
        "task": "completion",
        "data": {"train": str(data), "validation": None},
        "method": method,
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(RecipeError, match=message) as caught:
        luthier.train(recipe)
    assert expected in caught.value.expected
    assert not (tmp_path / "run").exists()


ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LlamaConfig": ({}, {"k_proj", "v_proj", "down_proj"}),
    "Qwen2Config": ({}, {"k_proj", "v_proj", "down_proj"}),
    "Gemma2Config": ({}, {"k_proj", "v_proj", "down_proj"}),
    "Phi3Config": ({"pad_token_id": 0}, {"qkv_proj", "down_proj"}),
    "PhiConfig": ({}, {"k_proj", "v_proj", "fc2"}),
    "OPTConfig": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, {"k_proj", "v_proj", "fc2"}),
    "GPTNeoXConfig": ({}, {"query_key_value", "dense_4h_to_h"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ia3_knows_the_layers_of_common_architectures(name: str, tmp_path: Path) -> None:
    import transformers

    fields, ends = ARCHITECTURES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    getattr(transformers, name)(vocab_size=50, **(sizes | fields)).save_pretrained(tmp_path)
    shape = outline(tmp_path)
    names = check_layers(AdapterSpec(method="ia3", targets="default"), shape.layers, shape.output_name)
    assert {found.rsplit(".", 1)[-1] for found in names} == ends
    assert len(names) == 2 * len(ends)


def test_ia3_says_what_there_is_where_it_knows_no_layer() -> None:
    shape = Outline({"block.0.mixer": (4, 4), "block.0.out": (4, 4)}, None)
    with pytest.raises(RecipeError, match="no keys and values are known by name") as caught:
        resolve_targets(AdapterSpec(method="ia3", targets="default"), list(shape.layers), None)
    assert "mixer, out" in caught.value.expected
    assert "method.feedforward" in caught.value.fix
