"""What every method keeps to, from one table with a row a method or variant.

A row says how the method is asked for, how many parameters it trains on a base of given layers, and by how much the
loss on a small real set (`capitals.jsonl`) falls. All else is the same for every method: it is trained from a recipe,
as a user trains it, on a tiny Llama and a tiny Phi-3 whose projections are fused; what the run left is loaded by peft
alone; it resumes to the same bytes; it merges; and it refuses another method's fields.

A method that peft does not load, or that lives outside the bank, names its own `load` and `own_logits`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_models import peft_over_nf4
from slots import Tokens, distance, model_logits, peft_logits, random_sequences, slot_logits
from torch import Tensor

import luthier
from luthier.base.load import load_base
from luthier.base.outline import outline
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.errors import RecipeError
from luthier.worker.progress import SilentProgress

DATA = Path(__file__).with_name("capitals.jsonl")
NUM_STEPS = 12
BASES = ("tiny_llama", "tiny_phi3")

Layers = Mapping[str, tuple[int, int]]
"""Linear layer of the base, without its output layer -> (inputs, outputs)."""


def bank_logits(base: Path, adapter: Path, sequences: list[Tokens]) -> list[Tensor]:
    """What the bank computes of a run's adapter."""
    loaded = load_base(base, dtype="float64")
    return slot_logits(loaded, slot_from_adapter(loaded, adapter), sequences)


def nf4_logits(base: Path, adapter: Path, sequences: list[Tokens]) -> list[Tensor]:
    """The same over the base in NF4, which computes in float32 at most."""
    loaded = load_base(base, quantization="nf4")
    return [logits.double() for logits in slot_logits(loaded, slot_from_adapter(loaded, adapter), sequences)]


def peft_logits_over_nf4(base: Path, adapter: Path, sequences: list[Tokens]) -> list[Tensor]:
    """What peft computes over bitsandbytes' own layers."""
    model = peft_over_nf4(base, adapter)
    return [logits.double() for logits in model_logits(model, sequences, classifies=False)]


@dataclass(frozen=True)
class Row:
    """A method, and what it promises.

    Attributes:
        method: The recipe's section.
        num_trainable: The formula, of the base's layers.
        loss_falls_by: Nats, over `NUM_STEPS` steps at `learning_rate` on all rows.
        foreign: A field of another method, which is refused.
        goes_on_as: The method that goes on from its result with `start_from`; None for the same.
        can_merge: Whether `export --merged` takes it.
        own_logits: What Luthier computes of the run's result.
        load_logits: What peft or transformers alone compute of its files.
        tolerance: Of the two, relative.
    """

    method: dict[str, Any]
    num_trainable: Callable[[Layers], int]
    loss_falls_by: float
    foreign: str
    learning_rate: float = 1e-2
    goes_on_as: dict[str, Any] | None = None
    can_merge: bool = True
    own_logits: Callable[[Path, Path, list[Tokens]], list[Tensor]] = field(default=bank_logits)
    load_logits: Callable[[Path, Path, list[Tokens]], list[Tensor]] = field(default=peft_logits)
    tolerance: float = 1e-9


def factors(layers: Layers, rank: int) -> int:
    """A [rank, inputs] and B [outputs, rank] of every layer."""
    return sum(rank * (inputs + outputs) for inputs, outputs in layers.values())


def outputs(layers: Layers) -> int:
    """One number an output of every layer."""
    return sum(num_outputs for _, num_outputs in layers.values())


def ia3_vectors(layers: Layers) -> int:
    """Outputs of keys and values (or of the projection that holds them), and inputs of the down projection."""
    return sum(
        inputs if name.endswith("down_proj") else outputs
        for name, (inputs, outputs) in layers.items()
        if name.endswith(("k_proj", "v_proj", "qkv_proj", "down_proj"))
    )


def two_layers(layers: Layers) -> int:
    """Factors of rank 3 for the two named."""
    return factors({name: shape for name, shape in layers.items() if name.endswith(("o_proj", "down_proj"))}, 3)


LORA = {"type": "lora", "rank": 4, "alpha": 8}
TWICE = {"type": "lora", "rank": 8, "alpha": 16}
DORA = {"type": "dora", "rank": 4, "alpha": 8}

OVER_NF4: dict[str, Any] = {"own_logits": nf4_logits, "load_logits": peft_logits_over_nf4, "tolerance": 1e-4}

ROWS = {
    "lora": Row(LORA, lambda layers: factors(layers, 4), 1.0, "feedforward"),
    "lora, dropout": Row({**LORA, "dropout": 0.1}, lambda layers: factors(layers, 4), 1.0, "feedforward"),
    "lora, some layers": Row(
        {"type": "lora", "rank": 3, "alpha": 6, "targets": ["o_proj", "down_proj"]}, two_layers, 0.5, "feedforward"
    ),
    "rslora": Row({**LORA, "rank_stabilized": True}, lambda layers: factors(layers, 4), 1.0, "feedforward"),
    "lora+": Row({**LORA, "lora_plus_ratio": 4.0}, lambda layers: factors(layers, 4), 1.0, "feedforward", 3e-3),
    "pissa": Row({**LORA, "init": "pissa"}, lambda layers: factors(layers, 4), 1.0, "feedforward", goes_on_as=TWICE),
    "olora": Row({**LORA, "init": "olora"}, lambda layers: factors(layers, 4), 1.0, "feedforward", goes_on_as=TWICE),
    "dora": Row(DORA, lambda layers: factors(layers, 4) + outputs(layers), 1.0, "init"),
    "dora, rslora, lora+, dropout": Row(
        {**DORA, "rank_stabilized": True, "lora_plus_ratio": 4.0, "dropout": 0.1},
        lambda layers: factors(layers, 4) + outputs(layers),
        1.0,
        "init",
        3e-3,
    ),
    "ia3": Row({"type": "ia3"}, ia3_vectors, 0.5, "rank", 5e-2),
    "qlora": Row({**LORA, "type": "qlora"}, lambda layers: factors(layers, 4), 1.0, "feedforward", **OVER_NF4),
    "dora over nf4": Row(
        {**DORA, "quantization": "nf4"},
        lambda layers: factors(layers, 4) + outputs(layers),
        1.0,
        "init",
        **OVER_NF4,
    ),
    "ia3 over nf4": Row({"type": "ia3", "quantization": "nf4"}, ia3_vectors, 0.5, "rank", 5e-2, **OVER_NF4),
}


def recipe_for(row: Row, base: Path, output: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "task": "completion",
        "data": {"train": str(DATA), "validation": None},
        "method": row.method,
        "train": {
            "max_steps": NUM_STEPS,
            "epochs": NUM_STEPS,
            "batch_size": 24,
            "learning_rate": row.learning_rate,
            "schedule": "constant",
        },
        "evaluation": {"rows": 0},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(output),
    }


@dataclass(frozen=True)
class Trained:
    """A finished run of a row, shared by the tests that only look at it."""

    row: Row
    base: Path
    run: Path

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def losses(self) -> list[float]:
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "step"]


class Facts(SilentProgress):
    """Keeps what a run says before it trains."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        self.said |= dict(rows)


class Impatient(SilentProgress):
    """Interrupts in the middle."""

    def step(self, job: str, step: int, *rest: Any) -> None:
        if step == NUM_STEPS // 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module", params=[(name, base) for name in ROWS for base in BASES], ids=": ".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, base_name = request.param
    base: Path = request.getfixturevalue(base_name)
    output = tmp_path_factory.mktemp("contract") / "run"
    progress = Facts()
    result = luthier.train(recipe_for(ROWS[name], base, output), progress=progress)
    assert result.status == "done"
    expected = ROWS[name].num_trainable(layers_of(base))
    assert progress.said["trainable"].startswith(f"{expected:,} parameters")
    return Trained(ROWS[name], base, output)


def layers_of(base: Path) -> Layers:
    shape = outline(base)
    return {name: size for name, size in shape.layers.items() if name != shape.output_name}


def sequences() -> list[Tokens]:
    return random_sequences((3, 17, 30), 300, seed=4)


def test_the_loss_falls(trained: Trained) -> None:
    assert len(trained.losses) == NUM_STEPS
    assert trained.losses[0] - trained.losses[-1] >= trained.row.loss_falls_by, trained.losses


def test_its_files_say_the_same_without_luthier(trained: Trained) -> None:
    ours = trained.row.own_logits(trained.base, trained.adapter, sequences())
    theirs = trained.row.load_logits(trained.base, trained.adapter, sequences())
    assert distance(ours, theirs) < trained.row.tolerance
    assert distance(base_logits(trained.base), theirs) > 1e-2  # it says something of its own


def test_it_merges(trained: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if not trained.row.can_merge:
        with pytest.raises(luthier.LuthierError):
            luthier.export_run(trained.run, tmp_path / "merged", dtype="float32")
        return
    luthier.export_run(trained.run, tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float64").eval()
    merged = model_logits(model, sequences(), classifies=False)
    # The merged weights are rounded to float32; a deviation is of that size.
    tolerance = max(1e-5, trained.row.tolerance)
    assert distance(trained.row.own_logits(trained.base, trained.adapter, sequences()), merged) < tolerance


def test_it_resumes_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    recipe = recipe_for(trained.row, trained.base, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        luthier.train(recipe, progress=Impatient())
    luthier.train(recipe, resume=True)
    again = Trained(trained.row, trained.base, tmp_path / "cut")
    assert again.losses == trained.losses
    for path in trained.adapter.glob("*.safetensors"):
        assert (again.adapter / path.name).read_bytes() == path.read_bytes()


def test_it_is_gone_on_from(trained: Trained, tmp_path: Path) -> None:
    recipe = recipe_for(trained.row, trained.base, tmp_path / "more") | {"start_from": str(trained.run)}
    recipe["method"] = trained.row.goes_on_as or trained.row.method
    recipe["train"] |= {"max_steps": 1}
    luthier.train(recipe)
    [loss] = Trained(trained.row, trained.base, tmp_path / "more").losses
    assert loss <= trained.losses[0] - trained.row.loss_falls_by
    # Another method over the same base, for another quantization is refused for itself.
    is_nf4 = luthier.load_recipe(recipe).method.quantization == "nf4"
    other: dict[str, Any] = {"type": "qlora" if is_nf4 else "lora"}
    if trained.row.method["type"] != "ia3":
        other = {"type": "ia3", "quantization": "nf4" if is_nf4 else None}
    with pytest.raises(RecipeError, match=r"start_from: .* is "):
        luthier.train(recipe | {"method": other, "output": str(tmp_path / "other")})


@pytest.mark.parametrize("name", ROWS)
def test_it_refuses_fields_of_another_method(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    recipe = recipe_for(row, tiny_llama, tmp_path)
    with pytest.raises(RecipeError, match=rf"method\.{row.foreign} is not a field") as caught:
        luthier.load_recipe(recipe | {"method": {**row.method, row.foreign: 1}})
    assert "known here: " in caught.value.message
    if "rank" in row.method:
        misspelt = {"rankk" if key == "rank" else key: value for key, value in row.method.items()}
        with pytest.raises(RecipeError, match=r"method\.rankk is not a field \(did you mean 'rank'\?\)"):
            luthier.load_recipe(recipe | {"method": misspelt})


def base_logits(base: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float64").eval()
    with torch.inference_mode():
        return model_logits(model, sequences(), classifies=False)
