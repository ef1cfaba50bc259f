"""What a slot's files say to peft, and peft's files to the bank: equal logits both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slots import (
    HEADS_ARE_READ,
    distance,
    model_logits,
    peft_logits,
    random_sequences,
    sequences_for,
    slot_logits,
    stirred,
)

from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import (
    check_writable,
    classifier_class,
    load_values,
    slot_from_adapter,
    write_adapter,
)
from luthier.errors import ModelError, RecipeError, StorageError
from luthier.types import AdapterSpec

BASES = ("tiny_llama", "tiny_llama_tied", "tiny_phi3")
SPECS = {
    "plain": AdapterSpec(rank=4, alpha=8.0),
    "rank stabilized": AdapterSpec(rank=3, alpha=7.5, rank_stabilized=True, dropout=0.1, targets=("o_proj",)),
    "output layer": AdapterSpec(rank=2, alpha=4.0, targets=("o_proj", "lm_head")),
    "trained output layer": AdapterSpec(rank=2, modules_to_save=("lm_head",)),
    "trained norm": AdapterSpec(rank=2, modules_to_save=("norm", "input_layernorm")),
    "trained embedding": AdapterSpec(rank=2, modules_to_save=("embed_tokens",)),
    "no layers": AdapterSpec(rank=2, targets=(), modules_to_save=("norm",)),
    "known tokens": AdapterSpec(rank=2, new_tokens=(7, 5, 260)),
    "new tokens": AdapterSpec(rank=2, new_tokens=(321, 9, 320)),
    "classes": AdapterSpec(rank=2, num_classes=3),
    "classes and a norm": AdapterSpec(rank=2, num_classes=3, modules_to_save=("norm",)),
    "classes and tokens": AdapterSpec(rank=2, num_classes=4, new_tokens=(9, 12)),
    "tags": AdapterSpec(rank=2, num_classes=3, head="token"),
    "tags, a norm and tokens": AdapterSpec(
        rank=2, num_classes=5, head="token", modules_to_save=("norm",), new_tokens=(9, 12)
    ),
    "dora": AdapterSpec(method="dora", rank=3, alpha=7.5, rank_stabilized=True, dropout=0.1),
    "dora on the output layer": AdapterSpec(method="dora", rank=2, targets=("o_proj", "lm_head")),
    "dora and new tokens": AdapterSpec(method="dora", rank=2, new_tokens=(321, 9, 320)),
    "dora and classes": AdapterSpec(method="dora", rank=2, num_classes=3, modules_to_save=("norm",)),
    "ia3": AdapterSpec(method="ia3", targets="default"),
    "ia3 on the output layer": AdapterSpec(method="ia3", targets=("o_proj", "lm_head")),
    "ia3 on inputs of one layer": AdapterSpec(method="ia3", targets=("o_proj", "down_proj"), feedforward=("o_proj",)),
    "ia3 and classes": AdapterSpec(method="ia3", targets="default", num_classes=3, modules_to_save=("norm",)),
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(request.getfixturevalue(request.param), dtype="float64")


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Base:
    return load_base(tiny_llama, dtype="float64")


@pytest.mark.parametrize("name", SPECS)
def test_peft_computes_the_slots_logits_and_the_slot_comes_back(base: Base, name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    slot = stirred(base, spec)
    write_adapter(slot, base, tmp_path, base_name=str(base.folder))
    sequences = sequences_for(spec)
    ours = slot_logits(base, slot, sequences)
    assert base.folder is not None
    num_tokens = 322 if max(spec.new_tokens, default=0) >= base.vocabulary_size else None
    theirs = peft_logits(base.folder, tmp_path, sequences, num_tokens=num_tokens)
    assert distance(ours, theirs) < 1e-9
    again = slot_from_adapter(base, tmp_path)
    assert again.parameters().keys() == slot.parameters().keys()
    for parameter, expected in zip(again.parameters().values(), slot.parameters().values(), strict=True):
        if not (spec.num_classes and spec.new_tokens):  # a classifier's output rows are not kept, nor used
            assert torch.equal(parameter, expected)
    assert (again.spec.rank, again.spec.alpha, again.spec.dropout) == (spec.rank, spec.alpha, spec.dropout)
    assert distance(slot_logits(base, again, sequences), ours) == 0.0
    base.bank.remove(again)
    base.bank.remove(slot)


def test_the_slots_differ_from_the_base(base: Base) -> None:
    """The comparison above could fail: each slot moves the logits by far more than its tolerance."""
    plain = base.bank.add(AdapterSpec(rank=1), 0)
    for name, spec in SPECS.items():
        if spec.num_classes is None:
            slot = stirred(base, spec)
            sequences = sequences_for(spec, 290)
            far = distance(slot_logits(base, slot, sequences), slot_logits(base, plain, sequences), num_columns=300)
            assert far > 1e-3, name
            base.bank.remove(slot)
    base.bank.remove(plain)


def test_a_tagger_reloads_with_its_names_by_transformers_and_by_peft(llama: Base, tmp_path: Path) -> None:
    from peft import AutoPeftModelForTokenClassification
    from transformers import AutoConfig, AutoModelForTokenClassification

    spec, names = AdapterSpec(rank=4, num_classes=3, head="token"), ["O", "B-place", "I-place"]
    slot = stirred(llama, spec)
    write_adapter(slot, llama, tmp_path, base_name=str(llama.folder), labels=names, pad_token_id=2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    config = AutoConfig.from_pretrained(tmp_path, subfolder="classifier")
    assert config.id2label == dict(enumerate(names))
    sequences = random_sequences((4, 9, 30), 300, seed=3)
    ours = slot_logits(llama, slot, sequences)
    assert [tuple(logits.shape) for logits in ours] == [(4, 3), (9, 3), (30, 3)]
    readers: list[Any] = [
        AutoPeftModelForTokenClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.float64)
    ]
    if HEADS_ARE_READ:
        readers.append(AutoModelForTokenClassification.from_pretrained(tmp_path, config=config, dtype="float64"))
    for model in (reader.eval() for reader in readers):
        assert distance(ours, model_logits(model, sequences, classifies=True)) < 1e-9


def test_short_names_are_written_where_they_mean_the_same(llama: Base, tmp_path: Path) -> None:
    def config(spec: AdapterSpec) -> dict[str, Any]:
        write_adapter(stirred(llama, spec), llama, tmp_path / str(hash(spec.targets)), base_name="some/base")
        return dict(json.loads((tmp_path / str(hash(spec.targets)) / "adapter_config.json").read_text()))

    assert config(AdapterSpec(rank=2, targets=("up_proj", "q_proj")))["target_modules"] == ["q_proj", "up_proj"]
    one = config(AdapterSpec(rank=2, targets=("layers.1.mlp.up_proj",)))
    assert one["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert (one["base_model_name_or_path"], one["task_type"], one["peft_type"]) == ("some/base", "CAUSAL_LM", "LORA")


def test_a_classifier_reloads_with_its_names_and_pools_alike_in_a_padded_batch(llama: Base, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoConfig, AutoModelForSequenceClassification

    spec = AdapterSpec(rank=4, num_classes=3)
    slot = stirred(llama, spec)
    write_adapter(slot, llama, tmp_path, base_name=str(llama.folder), labels=["cold", "warm", "hot"], pad_token_id=2)
    config = AutoConfig.from_pretrained(tmp_path, subfolder="classifier")
    assert config.id2label == {0: "cold", 1: "warm", 2: "hot"}
    assert (config.num_labels, config.pad_token_id) == (3, 2)
    model: Any
    if HEADS_ARE_READ:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config, dtype="float64").eval()
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, pad_token_id=2, dtype=torch.float64
        ).eval()
    sequences = random_sequences((4, 9, 30), 300, seed=3)
    sequences[1][3] = 2  # the padding token within a text is no end
    ours = slot_logits(llama, slot, sequences)
    assert distance(ours, model_logits(model, sequences, classifies=True)) < 1e-9
    padded = torch.full((3, 30), 2)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = torch.from_numpy(tokens)
    mask = torch.arange(30) < torch.tensor([[len(tokens)] for tokens in sequences])
    with torch.inference_mode():
        batched = model(input_ids=padded, attention_mask=mask.long()).logits
    assert distance(ours, list(batched)) < 1e-9


def test_labels_must_be_as_many_as_classes(llama: Base, tmp_path: Path) -> None:
    slot = stirred(llama, AdapterSpec(rank=2, num_classes=3))
    with pytest.raises(ModelError, match="2 labels for a head of 3 classes"):
        write_adapter(slot, llama, tmp_path, base_name="b", labels=["a", "b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(modules_to_save=("embed_tokens",), new_tokens=(3,)), "rows of the embedding"),
        (AdapterSpec(modules_to_save=("lm_head",), new_tokens=(3,)), "rows of the output layer"),
        (AdapterSpec(targets=("lm_head",), new_tokens=(3,)), "rows of lm_head, which is adapted"),
        (AdapterSpec(targets=("q_proj",), modules_to_save=("layers.0.self_attn.q_proj",)), "q_proj is adapted, and"),
        (AdapterSpec(targets=("lm_head",), num_classes=2), "no output layer"),
        (AdapterSpec(method="ia3", targets="default", new_tokens=(3,)), "PEFT's files of ia3 have no place for"),
    ],
)
def test_what_peft_could_not_load_is_refused(llama: Base, spec: AdapterSpec, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_writable(llama.bank.add(spec, 0), llama)


def test_a_base_without_a_classifier_is_refused() -> None:
    from transformers import GraniteConfig, Qwen3Config

    assert classifier_class(Qwen3Config()).__name__ == "Qwen3ForSequenceClassification"
    with pytest.raises(RecipeError, match="no sequence classifier for the architecture 'granite'") as caught:
        classifier_class(GraniteConfig())
    assert "head: words" in caught.value.fix


# -- adapters that peft made


def made_by_peft(folder: Path, base_folder: Path, *, num_tokens: int | None = None, **options: Any) -> Path:
    """A peft adapter with random values; (IA)^3 where `options` has its feed-forward modules, else LoRA."""
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifies = options.get("task_type") == "SEQ_CLS"
    loader: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = loader.from_pretrained(base_folder, dtype="float64", **({"num_labels": 3} if classifies else {}))
    if num_tokens is not None:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    config: Any
    if "feedforward_modules" in options:
        config = IA3Config(**({"task_type": "CAUSAL_LM"} | options))
    else:
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
        config = LoraConfig(**(fields | options))
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    model.save_pretrained(folder)
    if classifies:
        model.config.save_pretrained(folder / "classifier")
    return folder


@pytest.mark.parametrize(
    ("num_tokens", "options"),
    [
        (None, {"use_rslora": True, "lora_alpha": 3}),
        (None, {"rank_pattern": {"layers.1.self_attn.o_proj": 2}, "alpha_pattern": {"0.self_attn.o_proj": 5}}),
        (None, {"target_modules": r".*\.1\.self_attn\.o_proj"}),
        (None, {"target_modules": ["o_proj", "lm_head"]}),
        (None, {"modules_to_save": ["norm"]}),
        (None, {"modules_to_save": ["lm_head"], "task_type": None}),
        (None, {"trainable_token_indices": [9, 4, 5]}),
        (None, {"trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 4]}}),
        (None, {"task_type": "SEQ_CLS", "modules_to_save": ["model.norm"]}),
        (322, {"trainable_token_indices": {"embed_tokens": [321, 4, 320], "lm_head": [321, 4, 320]}}),
        (322, {}),
        (322, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (322, {"modules_to_save": ["embed_tokens"]}),
        (None, {"use_dora": True, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.o_proj": 2}}),
        (None, {"use_dora": True, "task_type": "SEQ_CLS"}),
        (None, {"target_modules": ["o_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        (None, {"target_modules": r".*\.(o|down)_proj", "feedforward_modules": r".*\.down_proj"}),
        (None, {"target_modules": ["o_proj"], "feedforward_modules": [], "modules_to_save": ["norm"]}),
    ],
)
def test_an_adapter_of_pefts_gives_pefts_logits(
    base: Base, num_tokens: int | None, options: dict[str, Any], tmp_path: Path
) -> None:
    assert base.folder is not None
    made_by_peft(tmp_path, base.folder, num_tokens=num_tokens, **options)
    sequences = random_sequences((3, 17, 40), num_tokens or 300)
    slot = slot_from_adapter(base, tmp_path)
    theirs = peft_logits(base.folder, tmp_path, sequences, num_tokens=num_tokens)
    assert distance(slot_logits(base, slot, sequences), theirs) < 1e-9
    # Written again by Luthier, it is still the same adapter.
    if num_tokens is None:
        write_adapter(slot, base, tmp_path / "again", base_name=str(base.folder))
        assert distance(peft_logits(base.folder, tmp_path / "again", sequences), theirs) < 1e-9
    base.bank.remove(slot)


def test_dropout_is_the_adapters_own_or_the_callers(llama: Base, tmp_path: Path) -> None:
    write_adapter(stirred(llama, AdapterSpec(rank=2, dropout=0.25)), llama, tmp_path, base_name="b")
    assert {f.dropout for f in slot_from_adapter(llama, tmp_path).adapters.values()} == {0.25}
    assert {f.dropout for f in slot_from_adapter(llama, tmp_path, 0.0).adapters.values()} == {0.0}


def test_an_adapter_for_another_base_is_refused(llama: Base, tiny_phi3: Path, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "phi", tiny_phi3, target_modules=["qkv_proj"])
    before = dict(llama.bank.slots)
    with pytest.raises(ModelError, match="no linear layer of this base") as caught:
        slot_from_adapter(llama, tmp_path / "phi")
    assert str(tiny_phi3) in caught.value.fix
    assert llama.bank.slots == before


@pytest.mark.parametrize("what", ["lora_magnitude_vector", "lora_embedding_A"])
def test_tensors_that_are_not_understood_are_refused(llama: Base, what: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_adapter(stirred(llama, AdapterSpec(rank=2)), llama, tmp_path, base_name="b")
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.model.embed_tokens.{what}": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=f"{what}, which is not understood"):
        slot_from_adapter(llama, tmp_path)


def test_values_go_only_into_a_slot_that_was_made_alike(llama: Base, tmp_path: Path) -> None:
    write_adapter(stirred(llama, AdapterSpec(rank=2, new_tokens=(5,))), llama, tmp_path, base_name="b")
    with pytest.raises(ModelError, match="trains the tokens 5") as caught:
        load_values(llama.bank.add(AdapterSpec(rank=2), 0), llama, tmp_path)
    assert "none" in caught.value.expected
    with pytest.raises(ModelError, match="has shape"):
        load_values(llama.bank.add(AdapterSpec(rank=3, new_tokens=(5,)), 0), llama, tmp_path)
    with pytest.raises(ModelError, match="only one side has"):
        load_values(llama.bank.add(AdapterSpec(rank=2, new_tokens=(5,), targets=("o_proj",)), 0), llama, tmp_path)


def test_a_folder_that_cannot_be_written_is_a_storage_error(llama: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        write_adapter(stirred(llama, AdapterSpec(rank=2)), llama, tmp_path / "file" / "adapter", base_name="b")


@pytest.mark.parametrize("spec", [SPECS["known tokens"], SPECS["trained embedding"], SPECS["classes"]])
def test_a_base_that_scales_its_embedding_is_honoured(spec: AdapterSpec, tmp_path: Path) -> None:
    """Gemma 3 multiplies looked-up rows by the root of its hidden size."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.1, pad_token_id=2, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "base")
    scaled = load_base(tmp_path / "base", dtype="float64")
    slot = stirred(scaled, spec)
    write_adapter(slot, scaled, tmp_path / "adapter", base_name="b")
    sequences = sequences_for(spec)
    theirs = peft_logits(tmp_path / "base", tmp_path / "adapter", sequences)
    assert distance(slot_logits(scaled, slot, sequences), theirs) < 1e-9
