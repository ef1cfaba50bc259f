"""What every method keeps to, from one table with a row a method or variant.

A row says how the method is asked for, how many parameters it trains on a base of given layers, and by how much the
loss on a small real set (`capitals.jsonl`) falls. All else is the same for every method: it is trained from a recipe,
as a user trains it, on a tiny Llama and, in the bank, a tiny Phi-3 whose projections are fused; what the run left is
loaded by peft or transformers alone; it resumes to the same bytes; it merges; and it refuses another method's fields.

Exclusive methods train here in this process, through what their own process calls; the process itself is tested in
`tests/worker/test_exclusive_runs.py`. A method that does not run in the bank names its own `own_logits` and
`load_logits`.
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
from tiny_models import write_tiny_llama
from torch import Tensor

import luthier
from luthier.base.load import load_base
from luthier.base.model import load_model
from luthier.base.outline import outline
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.errors import RecipeError
from luthier.export.compare import slot_logits as whole_logits
from luthier.methods.peft.layer import read_peft
from luthier.types import AdapterSpec
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.result import RunResult
from luthier.worker.train import train_here

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


def own_weights_logits(base: Path, model: Path, sequences: list[Tokens]) -> list[Tensor]:
    """What the engine computes of a run's model, as a base."""
    loaded = load_base(model, dtype="float64")
    return slot_logits(loaded, loaded.bank.add(AdapterSpec(rank=1), 0), sequences)  # a fresh adapter changes nothing


def transformers_logits(base: Path, model: Path, sequences: list[Tokens]) -> list[Tensor]:
    """What transformers computes of it."""
    return base_logits(model, sequences)


def injected_logits(base: Path, adapter: Path, sequences: list[Tokens]) -> list[Tensor]:
    """What the engine computes of an adapter of peft."""
    read = read_peft(load_model(base, dtype="float64"), base, adapter)
    return [logits[:-1] for logits in whole_logits(read, read.slot, sequences)]


def peft_logits_behind(num_virtual: int) -> Callable[[Path, Path, list[Tokens]], list[Tensor]]:
    """What peft computes, without the logits of the virtual tokens that stand before a sequence."""

    def load(base: Path, adapter: Path, sequences: list[Tokens]) -> list[Tensor]:
        return [logits[num_virtual:] for logits in peft_logits(base, adapter, sequences)]

    return load


@dataclass(frozen=True)
class Row:
    """A method, and what it promises.

    Attributes:
        method: The recipe's section.
        num_trainable: The formula, of the base's layers.
        loss_falls_by: Nats, over `NUM_STEPS` steps at `learning_rate` on all rows.
        foreign: A field of another method, which is refused.
        goes_on_as: The method that goes on from its result with `start_from`; None for the same.
        goes_on: Whether `start_from` takes its result; a model of own weights is the base of what goes on.
        bases: Those that it is held against.
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
    goes_on: bool = True
    bases: tuple[str, ...] = BASES
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


def every(value: Callable[[int, int], int], *ends: str) -> Callable[[Layers], int]:
    """The sum of a formula of inputs and outputs over the layers that end so, or over all."""
    return lambda layers: sum(value(*shape) for name, shape in layers.items() if not ends or name.endswith(ends))


def lokr_factors(layers: Layers) -> int:
    """W is cut into near squares: a factor of m_o x m_i, and the rest of rank 4 or, where that is no less, in full."""

    def count(inputs: int, outputs: int) -> int:
        (m_i, n_i), (m_o, n_o) = (nearest_square(size) for size in (inputs, outputs))
        return m_o * m_i + (4 * (n_o + n_i) if max(n_o, n_i) > 2 * 4 else n_o * n_i)

    return every(count)(layers)


def nearest_square(size: int) -> tuple[int, int]:
    """Two factors of `size`, the smaller first, as near to each other as there are."""
    small = max(factor for factor in range(1, size + 1) if size % factor == 0 and factor * factor <= size)
    return small, size // small


LORA = {"type": "lora", "rank": 4, "alpha": 8}
TWICE = {"type": "lora", "rank": 8, "alpha": 16}
DORA = {"type": "dora", "rank": 4, "alpha": 8}

HIDDEN, VOCABULARY, HEADS_KV, BLOCKS = 64, 320, 32, 2
"""Of the tiny Llama, the one base of the exclusive rows."""
NORMS = (2 * BLOCKS + 1) * HIDDEN
VIRTUAL = 5


def all_weights(layers: Layers) -> int:
    """Every linear layer, embedding and output layer, and the norms."""
    return every(lambda i, o: i * o)(layers) + 2 * VOCABULARY * HIDDEN + NORMS


def last_block(layers: Layers) -> int:
    """The last block's layers and norms, the final norm, and the output layer."""
    block = {name: shape for name, shape in layers.items() if f"layers.{BLOCKS - 1}." in name}
    return every(lambda i, o: i * o)(block) + 3 * HIDDEN + VOCABULARY * HIDDEN


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

ALONE: dict[str, Any] = {"bases": ("tiny_llama",), "foreign": "modules_to_save"}
OWN: dict[str, Any] = ALONE | {"own_logits": own_weights_logits, "load_logits": transformers_logits}
OF_PEFT: dict[str, Any] = ALONE | {"own_logits": injected_logits}
BEHIND: dict[str, Any] = OF_PEFT | {"load_logits": peft_logits_behind(VIRTUAL), "can_merge": False}
QV = ["q_proj", "v_proj"]

ROWS |= {
    "full": Row({"type": "full"}, all_weights, 1.0, learning_rate=3e-3, **OWN),
    "last_layers": Row({"type": "last_layers", "layers": 1}, last_block, 1.0, learning_rate=3e-3, **OWN),
    "bias": Row({"type": "bias"}, outputs, 0.5, **OWN | {"bases": ("tiny_biased",)}),
    "prompt": Row(
        {"type": "prompt", "virtual_tokens": VIRTUAL},
        lambda layers: VIRTUAL * HIDDEN,
        0.1,
        learning_rate=1e-1,
        **BEHIND,
    ),
    "prefix": Row(
        {"type": "prefix", "virtual_tokens": VIRTUAL},
        lambda layers: VIRTUAL * BLOCKS * 2 * HEADS_KV,
        0.1,
        learning_rate=1e-1,
        **OF_PEFT | {"can_merge": False},
    ),
    "p_tuning": Row(
        {
            "type": "p_tuning",
            "virtual_tokens": VIRTUAL,
            "encoder_hidden_size": 32,
            "config": {"encoder_dropout": 0.1},
        },
        lambda layers: VIRTUAL * HIDDEN + (HIDDEN + 1) * 32 + (32 + 1) * 32 + (32 + 1) * HIDDEN,
        0.1,
        goes_on=False,
        **BEHIND,
    ),
    "vera": Row(
        {"type": "vera", "rank": 8, "dropout": 0.1, "targets": QV},
        every(lambda i, o: 8 + o, *QV),
        0.1,
        learning_rate=1e-1,
        **OF_PEFT,
    ),
    "loha": Row(
        {"type": "loha", "rank": 4, "config": {"module_dropout": 0.1}},
        lambda layers: 2 * factors(layers, 4),
        0.5,
        **OF_PEFT,
    ),
    "lokr": Row({"type": "lokr", "rank": 4, "config": {"rank_dropout": 0.1}}, lokr_factors, 0.5, **OF_PEFT),
    "oft": Row({"type": "oft", "block_size": 8}, every(lambda i, o: i // 8 * (8 * 7 // 2)), 0.5, **OF_PEFT),
    "boft": Row(
        {"type": "boft", "block_size": 4, "dropout": 0.1}, every(lambda i, o: i // 4 * 4 * 4 + o), 0.5, **OF_PEFT
    ),
    "adalora": Row(
        {
            "type": "adalora",
            "initial_rank": 6,
            "target_rank": 3,
            "warmup_steps": 2,
            "final_steps": 3,
            "every": 2,
        },
        lambda layers: factors(layers, 6) + 6 * len(layers),
        0.1,
        goes_on=False,
        learning_rate=5e-2,
        **OF_PEFT,
    ),
    "ln_tuning": Row({"type": "ln_tuning"}, lambda layers: NORMS, 0.1, learning_rate=5e-2, **OF_PEFT),
    "peft, hra": Row(
        {"type": "peft", "name": "hra", "config": {"r": 4, "target_modules": QV}},
        every(lambda i, o: 4 * i, *QV),
        0.1,
        learning_rate=1e-1,
        **OF_PEFT,
    ),
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
    def owns_weights(self) -> bool:
        return (self.run / "model").exists()

    @property
    def result(self) -> Path:
        return self.run / ("model" if self.owns_weights else "adapter")

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


def train(recipe: dict[str, Any], *, resume: bool = False, progress: Progress | None = None) -> RunResult:
    """Train in this process, whatever the method."""
    return train_here(luthier.load_recipe(recipe), resume=resume, progress=progress or SilentProgress())


@pytest.fixture(scope="session")
def tiny_biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-biased", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module", autouse=True)
def _no_reports(no_reports: None) -> None:
    pass


@pytest.fixture(
    scope="module", params=[(name, base) for name, row in ROWS.items() for base in row.bases], ids=": ".join
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, base_name = request.param
    base: Path = request.getfixturevalue(base_name)
    output = tmp_path_factory.mktemp("contract") / "run"
    progress = Facts()
    result = train(recipe_for(ROWS[name], base, output), progress=progress)
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
    ours = trained.row.own_logits(trained.base, trained.result, sequences())
    theirs = trained.row.load_logits(trained.base, trained.result, sequences())
    assert distance(ours, theirs) < trained.row.tolerance
    assert distance(base_logits(trained.base, sequences()), theirs) > 1e-2  # it says something of its own


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
    assert distance(trained.row.own_logits(trained.base, trained.result, sequences()), merged) < tolerance


def test_it_resumes_to_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    recipe = recipe_for(trained.row, trained.base, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, progress=Impatient())
    train(recipe, resume=True)
    again = Trained(trained.row, trained.base, tmp_path / "cut")
    assert again.losses == trained.losses
    for path in trained.result.glob("*.safetensors"):
        assert (again.result / path.name).read_bytes() == path.read_bytes()


def test_it_is_gone_on_from(trained: Trained, tmp_path: Path) -> None:
    recipe = recipe_for(trained.row, trained.base, tmp_path / "more") | {"start_from": str(trained.run)}
    recipe["method"] = trained.row.goes_on_as or trained.row.method
    if trained.owns_weights:
        with pytest.raises(RecipeError, match="trains the base's own weights"):
            train(recipe)
        recipe |= {"start_from": None, "base": str(trained.run)}
    if not trained.row.goes_on:
        with pytest.raises(RecipeError, match="start_from: "):
            train(recipe)
        return
    recipe["train"] |= {"max_steps": 1}
    train(recipe)
    [loss] = Trained(trained.row, trained.base, tmp_path / "more").losses
    assert loss <= trained.losses[0] - trained.row.loss_falls_by


def test_another_method_does_not_go_on_from_it(trained: Trained, tmp_path: Path) -> None:
    if trained.owns_weights:
        pytest.skip("a model is the base of any method")
    recipe = recipe_for(trained.row, trained.base, tmp_path / "more") | {"start_from": str(trained.run)}
    # Another method over the same base, for another quantization is refused for itself.
    is_nf4 = luthier.load_recipe(recipe).method.quantization == "nf4"
    other: dict[str, Any] = {"type": "qlora" if is_nf4 else "lora"}
    if trained.row.method["type"] != "ia3":
        other = {"type": "ia3", "quantization": "nf4" if is_nf4 else None}
    with pytest.raises(luthier.LuthierError, match=r"start_from: .* is |has peft_type"):
        train(recipe | {"method": other, "output": str(tmp_path / "other")})


def test_adaloras_ranks_have_changed(tiny_llama: Path, tmp_path: Path) -> None:
    row = ROWS["adalora"]
    train(recipe_for(row, tiny_llama, tmp_path / "run"))
    pattern = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]  # peft keeps a flag for each of the first ranks
    assert len(ranks) == len(layers_of(tiny_llama))
    assert sum(ranks) <= row.method["target_rank"] * len(ranks) < row.method["initial_rank"] * len(ranks)
    assert len(set(ranks)) > 1, "all layers kept the same"


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


def base_logits(base: Path, sequences: list[Tokens]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float64").eval()
    with torch.inference_mode():
        return model_logits(model, sequences, classifies=False)
