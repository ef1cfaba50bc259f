"""The model card's lines for loading an adapter are run as they stand, and what they load says what the slot says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from slots import distance, model_logits, sequences_for, slot_logits, stirred
from tiny_models import write_tiny_llama

from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.data.template import Renderer
from luthier.engine.slot import Slot
from luthier.evaluate.card import loading_code
from luthier.evaluate.record import read_run
from luthier.types import AdapterSpec

LABELS = ["cold", "warm", "hot"]


def write_run(
    base_folder: Path,
    run: Path,
    spec: AdapterSpec,
    new_tokens: tuple[str, ...] = (),
    quantization: str | None = None,
) -> tuple[Base, Slot]:
    """What of a run's folder the card reads and names."""
    renderer = Renderer.load(base_folder, new_tokens)
    base = load_base(base_folder, dtype="float32", quantization=quantization)
    slot = stirred(base, spec)
    labels = LABELS if spec.num_classes else None
    write_adapter(slot, base, run / "adapter", base_name=str(base_folder), labels=labels, pad_token_id=renderer.pad_id)
    renderer.save(run / "adapter")
    task = "classification" if spec.num_classes else "chat"
    (run / "recipe.yaml").write_text(yaml.safe_dump({"task": task, "output": str(run)}), encoding="utf-8")
    (run / "result.json").write_text(json.dumps({"base_quantization": quantization, "base_dtype": "float32"}))
    (run / "data.json").write_text(json.dumps({"labels": labels or []}), encoding="utf-8")
    return base, slot


def load_by_card(run: Path) -> dict[str, Any]:
    """The names that the card's code defines."""
    names: dict[str, Any] = {}
    exec(loading_code(read_run(run)), names)
    names["model"].eval()
    return names


@pytest.fixture(params=["tiny_llama", "tiny_llama_tied", "tiny_phi3"])
def base_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_language_model_loads_as_the_card_says(base_folder: Path, tmp_path: Path) -> None:
    spec = AdapterSpec(rank=3, alpha=5.0, rank_stabilized=True, new_tokens=(9, 12))
    base, slot = write_run(base_folder, tmp_path, spec)
    sequences = sequences_for(spec)
    theirs = model_logits(load_by_card(tmp_path)["model"], sequences, classifies=False)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-4


def test_a_classifier_loads_as_the_card_says_with_names_and_padding(base_folder: Path, tmp_path: Path) -> None:
    spec = AdapterSpec(rank=3, num_classes=3, modules_to_save=("norm",), new_tokens=(9,))
    base, slot = write_run(base_folder, tmp_path, spec)
    loaded = load_by_card(tmp_path)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.pad_token_id == tokenizer.pad_token_id
    # Short, for under LongRoPE transformers lets the longest text of a batch choose the factors of all.
    texts = ["the lamp", "a warm room", "cold"]
    single = [tokenizer(text)["input_ids"] for text in texts]
    ours = slot_logits(base, slot, [torch.tensor(ids).numpy() for ids in single])
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    with torch.inference_mode():
        padded = list(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert distance(ours, padded) < 1e-4


@pytest.mark.parametrize("num_classes", [None, 3])
def test_tokens_past_the_vocabulary_load_as_the_card_says(num_classes: int | None, tmp_path: Path) -> None:
    full = Renderer.load(write_tiny_llama(tmp_path / "probe")).vocabulary_size
    base_folder = write_tiny_llama(tmp_path / "base", vocab_size=full)
    spec = AdapterSpec(rank=2, num_classes=num_classes, new_tokens=(full, full + 1))
    base, slot = write_run(base_folder, tmp_path / "run", spec, ("<on>", "<off>"))
    loaded = load_by_card(tmp_path / "run")
    assert loaded["tokenizer"]("<on><off>")["input_ids"] == [full, full + 1]
    sequences = sequences_for(spec, 200)
    theirs = model_logits(loaded["model"], sequences, classifies=num_classes is not None)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-4


@pytest.mark.parametrize("num_classes", [None, 3])
def test_an_adapter_over_nf4_loads_over_nf4_as_the_card_says(
    base_folder: Path, num_classes: int | None, tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=3, num_classes=num_classes)
    base, slot = write_run(base_folder, tmp_path, spec, quantization="nf4")
    model = load_by_card(tmp_path)["model"].train()  # see nf4_models: evaluation mode repacks on some CPUs
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    sequences = sequences_for(spec)
    theirs = model_logits(model, sequences, classifies=num_classes is not None)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-4
