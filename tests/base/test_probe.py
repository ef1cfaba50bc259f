"""What a base turns out to be: architectures that must not run packed are found out, and score as transformers does.

Every architecture here is a tiny random one; the sequences are longer than the sliding windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.step import score, train_step
from luthier.errors import ModelError, RecipeError
from luthier.types import AdapterSpec, Example

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 12}
GPT: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128, "rotary_dim": 4}
SCALED: dict[str, Any] = {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}

PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma3_text": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "phi": {"num_key_value_heads": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "starcoder2": WINDOW,
    "granite": SCALED,
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW | {"logit_scale": 0.25, "head_dim": 8},
    "bert": {"is_decoder": True},
}
PADDED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "called 0 times for 2 layers"),
    "roberta": ({"is_decoder": True}, "differ from separate ones"),
    "gemma2": (
        WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}
        | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
        "softcap",
    ),
    "gpt_oss": (WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "stablelm": ({}, "packed forward fails"),
}  # fmt: skip
if Version(transformers.__version__) >= Version("5.24"):  # since then its attention can be replaced
    PACKED["gptj"] = GPT
else:
    PADDED["gptj"] = (GPT, "called 0 times for 2 layers")
NOT_PLAIN = {"granite", "cohere", "cohere2", "gemma2", "bert", "roberta"}
FLOAT32 = {"gemma2", "gpt_oss"}  # transformers computes nonsense, or nothing, for these in float64

LENGTHS = (5, 30, 17, 41)


def write_model(folder: Path, architecture: str, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(COMMON | fields)))
    model.save_pretrained(folder)
    return folder


def load(folder: Path, architecture: str) -> Base:
    return load_base(folder, dtype="float32" if architecture in FLOAT32 else "float64")


def tolerance(architecture: str) -> float:
    return 1e-4 if architecture in FLOAT32 else 1e-6  # some compute part of their attention in float32


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0  # so that rows keep different positions for the output layer
        made.append(Example(random.integers(3, 250, size=length).astype(np.int32), weights))
    return made


def by_transformers(folder: Path, base: Base) -> list[float]:
    """Each example's summed loss by transformers' own model, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).eval()
    sums = []
    for example in examples():
        tokens_L = torch.from_numpy(example.tokens.astype(np.int64))
        with torch.no_grad():
            logits_LV: Tensor = model(input_ids=tokens_L[None], use_cache=False).logits[0].double()
        nll_L = -logits_LV.log_softmax(-1)[:-1].gather(1, tokens_L[1:, None])[:, 0]
        sums.append(float((nll_L * torch.from_numpy(example.weights[1:])).sum()))
    return sums


def assert_scores_and_trains(base: Base, folder: Path, architecture: str, targets: Any = "all-linear") -> None:
    """Scores equal transformers'; and two slots in one batch get the gradients that each gets alone."""
    batch = pack([PackItem(example, BASE_SLOT) for example in examples()])
    expected = by_transformers(folder, base)
    assert [r.nll_sum for r in score(base, batch)] == pytest.approx(expected, rel=tolerance(architecture))

    slots = [base.bank.add(AdapterSpec(rank=2, targets=targets), seed) for seed in (0, 1)]
    together = pack([PackItem(example, slots[i % 2].index) for i, example in enumerate(examples())])
    report = train_step(base, together, {slot.index: 7.0 for slot in slots})
    for number, slot in enumerate(slots):
        assert report[slot.index].nll_sum == pytest.approx(sum(expected[number::2]), rel=tolerance(architecture))
        found = gradients(slot)
        alone = pack([PackItem(example, slot.index) for example in examples()[number::2]])
        train_step(base, alone, {slot.index: 7.0})
        expected_gradients = gradients(slot)
        assert found.keys() == expected_gradients.keys()
        assert max(float(g.norm()) for g in found.values()) > 0
        scale = max(float(g.norm()) for g in expected_gradients.values())
        for name, gradient in found.items():
            error = float((gradient - expected_gradients[name]).norm())
            assert error <= 10 * tolerance(architecture) * scale, name


def gradients(slot: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in slot.parameters().items() if p.grad is not None}
    for parameter in slot.parameters().values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("architecture", PACKED)
def test_these_run_packed_and_equal_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, architecture, **PACKED[architecture])
    base = load(folder, architecture)
    assert base.packing_problem == ""
    assert base.is_packed
    assert base.head_is_plain == (architecture not in NOT_PLAIN)
    assert_scores_and_trains(base, folder, architecture)


@pytest.mark.parametrize("architecture", PADDED)
def test_these_run_padded_and_equal_transformers(architecture: str, tmp_path: Path) -> None:
    fields, reason = PADDED[architecture]
    folder = write_model(tmp_path, architecture, **fields)
    base = load(folder, architecture)
    assert not base.is_packed
    assert reason in base.packing_problem
    assert base.head_is_plain == (architecture not in NOT_PLAIN)
    assert_scores_and_trains(base, folder, architecture)


@pytest.mark.parametrize("architecture", ["granite", "gemma2", "roberta"])
def test_a_slot_changes_a_head_that_is_not_plain(architecture: str, tmp_path: Path) -> None:
    """Packed and padded: the rows of the output layer go to their own slots."""
    fields = PACKED[architecture] if architecture in PACKED else PADDED[architecture][0]
    folder = write_model(tmp_path, architecture, **fields)
    base = load(folder, architecture)
    targets = ("lm_head",) if architecture != "roberta" else ("lm_head.dense", "lm_head.decoder")
    assert_scores_and_trains(base, folder, architecture, targets)


def test_a_router_is_no_layer_to_adapt(tmp_path: Path) -> None:
    """PhiMoE's inherits from nn.Linear and gives two results."""
    folder = write_model(tmp_path, "phimoe", num_local_experts=4)
    base = load_base(folder)
    slot = base.bank.add(AdapterSpec(rank=2), 0)
    assert not any("router" in name or "gate" in name for name in slot.adapters)
    batch = pack([PackItem(example, slot.index) for example in examples()])
    report = train_step(base, batch, {slot.index: 1.0})
    assert report[slot.index].nll_sum == pytest.approx(sum(by_transformers(folder, base)), rel=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",)])
def test_gpt2_runs_packed_but_has_no_linear_layers(targets: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt2", **GPT)
    base = load_base(folder, dtype="float64")
    assert base.is_packed
    assert base.head_is_plain
    batch = pack([PackItem(example, BASE_SLOT) for example in examples()])
    assert [r.nll_sum for r in score(base, batch)] == pytest.approx(by_transformers(folder, base), rel=1e-9)
    with pytest.raises(RecipeError, match=r"method\.targets"):
        base.bank.add(AdapterSpec(targets=targets), 0)


def test_the_window_is_honoured(tmp_path: Path) -> None:
    """A token past the window of every layer has no say; without a window it does."""

    def last_states(window: int | None) -> list[Tensor]:
        base = load_base(write_model(tmp_path / str(window), "mistral", sliding_window=window), dtype="float64")
        tokens = np.arange(3, 43, dtype=np.int32)
        states = []
        for first in (3, 99):
            tokens[0] = first
            batch = pack([PackItem(Example(tokens.copy(), np.zeros(40, np.float32)), BASE_SLOT)] * 2)
            with torch.no_grad(), base.bank.routed(base.routing(batch, training=False)):
                states.append(base.forward(batch).hidden_TD[-1])
        return states

    windowed, full = last_states(12), last_states(None)  # two layers of 12 reach 22 tokens back, of 40
    assert torch.equal(*windowed)
    assert float((full[0] - full[1]).abs().max()) > 1e-6


def test_a_model_without_a_body_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama4_text", num_local_experts=2, head_dim=8)
    with pytest.raises(ModelError, match="body apart"):
        load_base(folder)


def test_a_linear_layer_that_is_fed_other_rows_is_refused(tiny_llama: Path) -> None:
    """As experts are, that see a selection of the tokens: whose slot is whose could not be told."""
    base = load_base(tiny_llama, wants_fast_body=False)
    slot = base.bank.add(AdapterSpec(rank=2, targets=("down_proj",)), 0)
    mlp = base.model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: torch.cat([original(x[:, ::2]), torch.zeros_like(x[:, 1::2])], dim=1)
    batch = pack([PackItem(example, slot.index) for example in examples()])
    with pytest.raises(ModelError, match=r"down_proj of this base is fed 47 rows of a batch of 93"):
        train_step(base, batch, {slot.index: 1.0})


def test_shared_inputs_are_found(tiny_llama: Path, tiny_phi3: Path) -> None:
    def groups(base: Base) -> set[tuple[str, ...]]:
        members = {id(m.group): m.group for m in base.model.modules() if getattr(m, "group", None) is not None}
        return {tuple(member.name.split(".", 3)[-1] for member in group.members) for group in members.values()}

    assert groups(load_base(tiny_llama)) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    }
    assert groups(load_base(tiny_phi3)) == set()  # its projections are fused already
