"""Adapters that peft wrote are read whole; what would be computed otherwise is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from luthier.base.adapter_files import read_adapter
from luthier.errors import ModelError


def write_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter as peft itself saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifies = options.get("task_type") == "SEQ_CLS"
    loader = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    extra = {"num_labels": 3} if classifies else {}
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(loader.from_pretrained(base, **extra), LoraConfig(**(fields | options))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_llama, tmp_path_factory.mktemp("adapter"), use_rslora=True, lora_dropout=0.1)


@pytest.fixture
def own(adapter: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_peft_wrote_is_read(adapter: Path, tiny_llama: Path) -> None:
    found = read_adapter(adapter)
    assert found.base_name == str(tiny_llama)
    assert (found.method, found.own.rank, found.own.alpha, found.own.dropout) == ("lora", 4, 8.0, 0.1)
    assert found.own.rank_stabilized
    assert found.targets == ("q_proj", "v_proj")
    assert found.num_classes is None
    assert len(found.shapes) == 2 * 2 * 2  # layers, modules, halves
    assert found.shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (4, 64)
    assert set(found.dtypes.values()) == {"F32"}
    spec = found.spec()
    assert (spec.rank, spec.alpha, spec.targets, spec.rank_stabilized) == (4, 8.0, ("q_proj", "v_proj"), True)


def test_modules_and_tokens_trained_besides_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny_llama, tmp_path, modules_to_save=["norm"], trainable_token_indices=[3, 7])
    found = read_adapter(folder)
    assert found.modules_to_save == ("norm",)
    assert found.new_tokens == (3, 7)


def test_ranks_and_alphas_may_differ_by_module(tiny_llama: Path, tmp_path: Path) -> None:
    found = read_adapter(
        write_adapter(tiny_llama, tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3})
    )
    assert [found.layer_spec(f"model.layers.0.self_attn.{name}").rank for name in ("q_proj", "v_proj")] == [2, 4]
    assert [found.layer_spec(f"model.layers.{layer}.self_attn.v_proj").alpha for layer in (0, 1)] == [8.0, 3.0]


def test_targets_given_as_a_pattern_are_named_by_what_it_matched(tiny_llama: Path, tmp_path: Path) -> None:
    found = read_adapter(write_adapter(tiny_llama, tmp_path / "regex", target_modules=r".*\.1\.mlp\.up_proj"))
    assert found.targets == ("model.layers.1.mlp.up_proj",)
    found = read_adapter(write_adapter(tiny_llama, tmp_path / "layers", layers_to_transform=[0]))
    assert found.targets == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def test_a_classifier_knows_its_classes(tiny_llama: Path, tmp_path: Path) -> None:
    found = read_adapter(write_adapter(tiny_llama, tmp_path, task_type="SEQ_CLS"))
    assert found.num_classes == 3
    assert found.modules_to_save == ()


def test_a_run_folder_leads_to_its_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to(adapter)
    assert read_adapter(tmp_path).own.rank == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("an_option_of_the_future", {"changes": "all"}),
    ],
)
def test_an_option_that_changes_the_arithmetic_is_refused(own: Path, field: str, value: Any) -> None:
    edit(own, **{field: value})
    with pytest.raises(ModelError, match=f"sets {field}=") as caught:
        read_adapter(own)
    assert "merge" in caught.value.fix


def test_another_method_is_refused(own: Path) -> None:
    edit(own, peft_type="VERA")
    with pytest.raises(ModelError, match="peft_type 'VERA'"):
        read_adapter(own)


def test_pickled_weights_are_refused_unopened(own: Path) -> None:
    (own / "adapter_model.safetensors").rename(own / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*can run code") as caught:
        read_adapter(own)
    assert "peft" in caught.value.fix


def test_an_empty_adapter_is_refused(own: Path) -> None:
    save_file({}, own / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no tensor"):
        read_adapter(own)


def test_half_a_pair_is_refused(own: Path) -> None:
    tensors = load_file(own / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, own / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no lora_"):
        read_adapter(own)


def test_tensors_that_contradict_the_config_are_refused(own: Path) -> None:
    edit(own, r=5)
    with pytest.raises(ModelError, match="has rank 4 and 4"):
        read_adapter(own)


def test_a_broken_file_is_an_error_of_its_own(own: Path) -> None:
    (own / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        read_adapter(own)


def test_a_base_is_no_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json") as caught:
        read_adapter(tiny_llama)
    assert "`base`" in caught.value.fix
    with pytest.raises(ModelError, match="there is no folder"):
        read_adapter(tmp_path / "nothing")


def test_reading_needs_neither_peft_nor_torch(adapter: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from luthier.base.adapter_files import read_adapter\n"
        "read_adapter(Path(sys.argv[1])).spec(); sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(adapter)], check=False).returncode == 0
