"""Encoders as bases: packed equals alone, transformers' own heads on top, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ENCODER_POSITIONS, write_tiny_encoder
from torch import Tensor

from luthier.base.encoder import head_modules
from luthier.base.load import Base, load_base
from luthier.base.outline import outline
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.request import SamplingError
from luthier.engine.sample import Request, Sampler
from luthier.errors import ModelError
from luthier.types import AdapterSpec, Example

PACKED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert")
PADDED = {"mpnet": "called 0 times for 2 layers"}
LENGTHS = (5, 30, 1, 17, ENCODER_POSITIONS)


def sequences(padding: int) -> list[Example]:
    """Random texts up to the longest; one holds the padding token, by which RoBERTa counts positions."""
    random = np.random.default_rng(0)
    found = [random.integers(5, 250, size=length).astype(np.int32) for length in LENGTHS]
    found[1][10] = padding
    return [Example(tokens, np.zeros(len(tokens), np.float32)) for tokens in found]


def states_of(base: Base, examples: list[Example]) -> Tensor:
    batch = pack([PackItem(example, BASE_SLOT) for example in examples])
    with torch.inference_mode(), base.bank.routed(base.routing(batch, training=False)):
        return base.forward(batch).hidden_TD


@pytest.mark.parametrize("architecture", [*PACKED, *PADDED])
def test_a_batch_gives_what_transformers_gives_each_text_alone(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = write_tiny_encoder(tmp_path, architecture)
    base = load_base(folder, dtype="float64")
    assert base.is_encoder
    assert base.is_packed == (architecture in PACKED)
    assert PADDED.get(architecture, "") in base.packing_problem
    assert base.max_positions == ENCODER_POSITIONS
    examples = sequences(base.config.pad_token_id)
    model = AutoModel.from_pretrained(folder, dtype="float64").eval()
    with torch.inference_mode():
        alone = [model(torch.from_numpy(e.tokens.astype(np.int64))[None]).last_hidden_state[0] for e in examples]
    expected, found = torch.cat(alone), states_of(base, examples)
    assert float((found - expected).norm() / expected.norm()) < 1e-6  # ModernBERT rotates in float32
    # It looks in both directions: the last token has a say at the first.
    examples[0].tokens[-1] += 1
    assert float((states_of(base, examples)[0] - found[0]).abs().max()) > 1e-6


def test_the_layers_are_called_as_in_transformers_classifiers(tmp_path: Path) -> None:
    base = load_base(write_tiny_encoder(tmp_path, "bert"))
    names = list(base.bank.linears)
    assert names[0] == "bert.encoder.layer.0.attention.self.query"
    assert not any("pooler" in name for name in names)
    assert list(outline(tmp_path).layers) == names
    groups = {
        tuple(m.name for m in module.group.members) for module in base.model.modules() if hasattr(module, "group")
    }
    assert len(groups) == 2  # query, key and value of two blocks run as one


HEADS = {
    "bert": (["bert.pooler", "classifier"], ["classifier"]),
    "roberta": (["classifier"], ["classifier"]),
    "electra": (["classifier"], ["classifier"]),
    "distilbert": (["pre_classifier", "classifier"], ["classifier"]),
    "modernbert": (["head", "classifier"], ["head", "classifier"]),
    "mpnet": (["classifier"], ["classifier"]),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_is_transformers_own_and_drawn_from_the_seed(architecture: str, tmp_path: Path) -> None:
    base = load_base(write_tiny_encoder(tmp_path, architecture))
    for kind, modules in zip(("sequence", "token"), HEADS[architecture], strict=True):
        spec = AdapterSpec(rank=2, num_classes=3, head=kind)
        one, again, other = (base.bank.add(spec, seed) for seed in (1, 1, 2))
        assert one.head is not None
        assert head_modules(one.head) == modules
        values = {name: p for name, p in one.parameters().items() if name.startswith("head.")}
        for name, parameter in values.items():
            assert torch.equal(parameter, again.parameters()[name])
            assert parameter.requires_grad
        drawn = [name for name in values if name.endswith((".classifier.weight", ".out_proj.weight"))]
        assert not any(torch.equal(values[name], other.parameters()[name]) for name in drawn)
        assert len(drawn) == 1


def test_what_the_files_hold_of_a_head_is_where_it_begins(tmp_path: Path) -> None:
    """ModernBERT's prediction head and BERT's pooler, whether the files hold a body alone or a model around one."""
    base = load_base(write_tiny_encoder(tmp_path / "modernbert", "modernbert"))
    stored = load_file(tmp_path / "modernbert" / "model.safetensors")
    slot = base.bank.add(AdapterSpec(rank=2, num_classes=3), 1)
    assert torch.equal(slot.parameters()["head.head.dense.weight"], stored["head.dense.weight"])

    folder = write_tiny_encoder(tmp_path / "bert", "bert")
    tensors = load_file(folder / "model.safetensors")
    weight, bias = torch.randn(32, 32), torch.randn(32)
    for name in ("bert.pooler.dense", "pooler.dense"):
        save_file(tensors | {f"{name}.weight": weight, f"{name}.bias": bias}, folder / "model.safetensors")
        slot = load_base(folder).bank.add(AdapterSpec(rank=2, num_classes=3), 1)
        assert torch.equal(slot.parameters()["head.bert.pooler.dense.weight"], weight)
        tensors = {key.removeprefix("bert."): value for key, value in tensors.items() if not key.startswith("cls")}


def test_it_writes_nothing(tmp_path: Path) -> None:
    base = load_base(write_tiny_encoder(tmp_path, "bert"))
    with pytest.raises(SamplingError, match=r"an encoder \(bert\), which reads texts and does not write"):
        Sampler(base, lambda ids: "").submit(Request("a", np.array([5, 6], np.int32)))


def test_a_decoder_made_of_one_is_no_encoder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BertConfig

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, is_decoder=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert not load_base(tmp_path).is_encoder


def test_what_is_no_whole_encoder_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path, "bert")
    with pytest.raises(ModelError, match="held in NF4"):
        load_base(folder, quantization="nf4")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of its encoder, such as .*layer\.1\.output\.dense\.weight"):
        load_base(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deberta-v2"}))
    with pytest.raises(ModelError, match="of an encoder: bert, camembert, distilbert"):
        outline(folder)
