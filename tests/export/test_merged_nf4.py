"""A merge of an adapter trained over NF4 goes onto the dequantized base: what was trained, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export.test_merged import write as write_plain
from slots import distance, model_logits, random_sequences, slot_logits, stirred

from luthier.base.identity import TRAINED_OVER_FILE
from luthier.base.load import load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.data.template import Renderer
from luthier.export.merged import export_merged
from luthier.types import AdapterSpec

SPEC = AdapterSpec(rank=4, alpha=8.0)
SEQUENCES = random_sequences((3, 17, 40), 300)


@pytest.fixture(params=["tiny_llama", "tiny_llama_tied", "tiny_phi3"])
def base_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def write(base_folder: Path, folder: Path, spec: AdapterSpec = SPEC, dtype: str = "float32") -> None:
    base = load_base(base_folder, dtype=dtype, quantization="nf4")
    write_adapter(stirred(base, spec), base, folder, base_name=str(base_folder))
    Renderer.load(base_folder).save(folder)


def exported_logits(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model_logits(model, SEQUENCES, classifies=False)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_export_says_what_the_quantized_base_and_adapter_say(
    base_folder: Path, method: str, tmp_path: Path
) -> None:
    """And not what the adapter says on the base's original weights, which nobody trained."""
    spec = AdapterSpec(method=method, rank=4, alpha=8.0)
    write(base_folder, tmp_path / "adapter", spec)
    said: list[str] = []
    export_merged(base_folder, tmp_path / "adapter", tmp_path / "merged", on_progress=said.append)
    assert "Merging onto the dequantized base" in said
    found = exported_logits(tmp_path / "merged")
    trained = load_base(base_folder, quantization="nf4")
    assert distance(found, slot_logits(trained, stirred(trained, spec), SEQUENCES)) < 1e-4
    original = load_base(base_folder)
    assert distance(found, slot_logits(original, stirred(original, spec), SEQUENCES)) > 0.02


def test_the_export_says_what_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "adapter")
    export_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "*dequantized* base" in text
    assert "not the base's original weights" in text
    write_plain(tiny_llama, SPEC, tmp_path / "plain", dtype="float32")
    export_merged(tiny_llama, tmp_path / "plain", tmp_path / "plain-merged")
    assert not (tmp_path / "plain-merged" / "README.md").exists()


def test_what_was_trained_in_bfloat16_is_merged_from_the_same_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "adapter", dtype="bfloat16")
    export_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    trained = load_base(tiny_llama, quantization="nf4", quantized_from="bfloat16")
    found = exported_logits(tmp_path / "merged")
    assert distance(found, slot_logits(trained, stirred(trained, SPEC), SEQUENCES)) < 1e-4
    other = load_base(tiny_llama, quantization="nf4")
    other_logits = slot_logits(other, stirred(other, SPEC), SEQUENCES)
    assert distance(found, other_logits) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types_can_be_written(tiny_llama: Path, dtype: str, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "adapter")
    export_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    trained = load_base(tiny_llama, quantization="nf4")
    far = distance(exported_logits(tmp_path / "merged"), slot_logits(trained, stirred(trained, SPEC), SEQUENCES))
    assert far < (0.1 if dtype == "bfloat16" else 1e-4)


def test_without_the_note_on_the_base_nothing_is_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    """peft's own files do not say that they were trained over NF4; they merge onto the base that they name."""
    write(tiny_llama, tmp_path / "adapter")
    (tmp_path / "adapter" / TRAINED_OVER_FILE).unlink()
    export_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    original = load_base(tiny_llama)
    expected = slot_logits(original, stirred(original, SPEC), SEQUENCES)
    assert distance(exported_logits(tmp_path / "merged"), expected) < 1e-4
