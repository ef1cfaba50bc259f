"""An encoder's adapter and head in PEFT's files: transformers and peft load them alone, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from slots import HEADS_ARE_READ, stirred
from tiny_models import write_tiny_encoder
from torch import Tensor

from luthier.base.adapter_files import read_adapter
from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import check_writable, load_values, slot_from_adapter, write_adapter
from luthier.errors import ModelError
from luthier.export.compare import distance, model_logits, random_sequences, slot_logits
from luthier.export.merged import export_merged
from luthier.types import AdapterSpec, HeadKind

ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert", "mpnet")
KINDS: tuple[HeadKind, ...] = ("sequence", "multilabel", "token")
TOLERANCE = 1e-6
"""Relative; ModernBERT rotates in float32."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("models") / request.param
    return load_base(write_tiny_encoder(folder, request.param), dtype="float64")


def auto_class(kind: HeadKind, *, of_peft: bool) -> Any:
    import peft
    import transformers

    name = "ModelForTokenClassification" if kind == "token" else "ModelForSequenceClassification"
    return getattr(peft, f"AutoPeft{name}") if of_peft else getattr(transformers, f"Auto{name}")


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_transformers_alone_give_equal_logits(base: Base, kind: HeadKind, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig

    slot = stirred(base, AdapterSpec(rank=4, num_classes=3, head=kind))
    check_writable(slot, base)
    write_adapter(slot, base, tmp_path, base_name=str(base.folder), labels=["cold", "warm", "hot"], pad_token_id=77)
    sequences = random_sequences((1, 9, 40), 250, avoid=base.config.pad_token_id)
    ours = slot_logits(base, slot, sequences)
    is_sequence = kind != "token"

    config = AutoConfig.from_pretrained(tmp_path, subfolder="classifier")
    assert config.id2label == {0: "cold", 1: "warm", 2: "hot"}
    assert config.pad_token_id == base.config.pad_token_id  # positions may be counted from it
    plain = auto_class(kind, of_peft=False)
    if HEADS_ARE_READ:
        directly = plain.from_pretrained(tmp_path, config=config, dtype="float64").eval()
        assert distance(ours, model_logits(directly, sequences, classifies=is_sequence)) < TOLERANCE
    under = plain.from_pretrained(base.folder, config=config, dtype="float64")
    over = PeftModel.from_pretrained(under, tmp_path).eval()
    assert distance(ours, model_logits(over, sequences, classifies=is_sequence)) < TOLERANCE

    # A padded batch says the same.
    padded = torch.full((3, 40), base.config.pad_token_id)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = torch.from_numpy(tokens)
    mask = torch.arange(40) < torch.tensor([[len(tokens)] for tokens in sequences])
    with torch.inference_mode():
        batched: Tensor = over(input_ids=padded, attention_mask=mask.long()).logits
    theirs = [row if is_sequence else row[: len(tokens)] for row, tokens in zip(batched, sequences, strict=True)]
    assert distance(ours, theirs) < TOLERANCE

    # And so do the files read back, into a new slot or one that was made alike.
    again = slot_from_adapter(base, tmp_path)
    assert (again.spec.num_classes, again.spec.head) == (3, kind if kind != "multilabel" else "multilabel")
    assert distance(ours, slot_logits(base, again, sequences)) == 0.0
    alike = base.bank.add(slot.spec, 5)
    load_values(alike, base, tmp_path)
    assert distance(ours, slot_logits(base, alike, sequences)) == 0.0
    for used in (slot, again, alike):
        base.bank.remove(used)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_says_the_same(base: Base, kind: HeadKind, tmp_path: Path) -> None:
    slot = stirred(base, AdapterSpec(rank=4, num_classes=3, head=kind))
    write_adapter(slot, base, tmp_path / "adapter", base_name="b", labels=["cold", "warm", "hot"], threshold=0.3)
    base.bank.remove(slot)
    assert base.folder is not None
    export_merged(base.folder, tmp_path / "adapter", tmp_path / "merged", dtype="float64")
    model = auto_class(kind, of_peft=False).from_pretrained(tmp_path / "merged", dtype="float64").eval()
    sequences = random_sequences((1, 9, 40), 250, avoid=base.config.pad_token_id)
    theirs = model_logits(model, sequences, classifies=kind != "token")
    base.bank.slots[slot.index] = slot
    assert distance(slot_logits(base, slot, sequences), theirs) < TOLERANCE
    base.bank.remove(slot)
    assert model.config.id2label[2] == "hot"
    assert getattr(model.config, "label_threshold", None) == (0.3 if kind == "multilabel" else None)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_other_methods_of_the_bank(base: Base, method: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig

    last = [name.rsplit(".", 1)[-1] for name in base.bank.linears][-1]
    feedforward = (last,) if method == "ia3" else None
    slot = stirred(base, AdapterSpec(method, rank=2, targets=(last,), feedforward=feedforward, num_classes=3))
    write_adapter(slot, base, tmp_path, base_name=str(base.folder))
    sequences = random_sequences((1, 9, 40), 250, avoid=base.config.pad_token_id)
    config = AutoConfig.from_pretrained(tmp_path, subfolder="classifier")
    under = auto_class("sequence", of_peft=False).from_pretrained(base.folder, config=config, dtype="float64")
    theirs = model_logits(PeftModel.from_pretrained(under, tmp_path).eval(), sequences, classifies=True)
    assert distance(slot_logits(base, slot, sequences), theirs) < TOLERANCE
    base.bank.remove(slot)


@pytest.mark.parametrize(
    "extra", [{"new_tokens": (9, 7)}, {"new_tokens": (9, 320)}, {"modules_to_save": True}], ids=str
)
def test_new_tokens_and_modules_in_full(base: Base, extra: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig

    if extra.get("modules_to_save"):
        extra = {"modules_to_save": (base.bank.input_name.partition(".")[2],)}
    slot = stirred(base, AdapterSpec(rank=2, num_classes=3, **extra))
    check_writable(slot, base)
    write_adapter(slot, base, tmp_path, base_name=str(base.folder))
    sequences = random_sequences((3, 17), 250, include=extra.get("new_tokens", ()), avoid=base.config.pad_token_id)
    config = AutoConfig.from_pretrained(tmp_path, subfolder="classifier")
    under = auto_class("sequence", of_peft=False).from_pretrained(base.folder, config=config, dtype="float64")
    if 320 in extra.get("new_tokens", ()):
        under.resize_token_embeddings(321, mean_resizing=False)
    theirs = model_logits(PeftModel.from_pretrained(under, tmp_path).eval(), sequences, classifies=True)
    ours = slot_logits(base, slot, sequences)
    assert distance(ours, theirs) < TOLERANCE
    again = slot_from_adapter(base, tmp_path)
    assert distance(ours, slot_logits(base, again, sequences)) == 0.0
    for used in (slot, again):
        base.bank.remove(used)


def test_peft_names_layers_by_their_ends_where_a_head_has_none_of_them(base: Base, tmp_path: Path) -> None:
    """BERT's pooler and RoBERTa's head have layers called `dense`, as their blocks do; those are not to be adapted."""
    slot = base.bank.add(AdapterSpec(rank=2, num_classes=3), 1)
    write_adapter(slot, base, tmp_path, base_name="b")
    base.bank.remove(slot)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    is_short = base.config.model_type in ("distilbert", "modernbert")
    assert all("." not in name for name in config["target_modules"]) == is_short
    assert read_adapter(tmp_path).modules_to_save == ()


def test_a_bert_adapter_of_pefts_keeps_the_bases_pooler(tmp_path: Path) -> None:
    """peft saves the classifier and leaves the pooler as it is in the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, BertConfig

    fields = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**fields, num_attention_heads=4, max_position_embeddings=96, num_labels=3)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).bert.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, dtype="float64")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    base = load_base(tmp_path / "base", dtype="float64")
    slot = slot_from_adapter(base, tmp_path / "adapter")
    sequences = random_sequences((3, 17), 300)
    theirs = model_logits(adapted.eval(), sequences, classifies=True)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-9


def test_a_head_that_does_not_fit_is_refused(base: Base, tmp_path: Path) -> None:
    from luthier.checkpoints.tensor_file import read_tensors, write_tensors

    slot = base.bank.add(AdapterSpec(rank=2, num_classes=3), 1)
    write_adapter(slot, base, tmp_path, base_name="b")
    base.bank.remove(slot)
    path = tmp_path / "adapter_model.safetensors"
    tensors = read_tensors(path)
    bias = next(name for name in tensors if name.endswith(("classifier.bias", "out_proj.bias")) and "pre_" not in name)
    del tensors[bias]
    write_tensors(path, tensors)
    with pytest.raises(ModelError, match=rf"it lacks {bias.removeprefix('base_model.model.')}"):
        slot_from_adapter(base, tmp_path)
