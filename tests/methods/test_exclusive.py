"""Own weights and methods of peft through the one loop: what is theirs beside the contract of all methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods.exclusive_jobs import ALL, OWN, PEFT, TRAIN, base_of, examples, run, start
from slots import distance, model_logits, random_sequences

from luthier.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from luthier.checkpoints.own_files import read_trained, write_result, write_trained
from luthier.engine.job import TrainingJob
from luthier.engine.memory import activation_bytes_per_forward, activation_bytes_per_token
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.step import score
from luthier.errors import RecipeError
from luthier.export.compare import slot_logits
from luthier.methods.exclusive.layer import check, load_own
from luthier.methods.peft.adalora import AdaloraHooks
from luthier.types import ExclusiveSpec

LINEAR_WEIGHTS = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 112)
"""Of the tiny Llama's two blocks: queries, keys, values and outputs, and the feed-forward's three."""
HEAD_WEIGHTS = 320 * 64


# -- own weights


def plain_curve(folder: Path, job: TrainingJob, dtype: str, tied: bool = False) -> list[float]:
    """transformers and AdamW alone, on the same batches in the same order."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    adamw = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=job.spec.weight_decay)
    losses = []
    for step in range(job.total_steps):
        batch = [job.examples[int(index)] for index in job.batch_indices(step)]
        total = sum(float(example.weights[1:].sum()) for example in batch)
        loss = 0.0
        for example in batch:
            ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(example.weights) > 0, ids[0], -100)
            logits = model(input_ids=ids).logits[0, :-1]
            part = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / total
            part.backward()
            loss += float(part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.spec.max_grad_norm)
        adamw.param_groups[0]["lr"] = job_rate(job, step)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss)
    return losses


def job_rate(job: TrainingJob, step: int) -> float:
    from luthier.engine.optimizer import learning_rate_at

    return learning_rate_at(step, job.total_steps, job.spec)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("tied", [False, True])
def test_fulls_loss_curve_equals_plain_transformers_and_adamw(
    tiny_llama: Path, tiny_llama_tied: Path, dtype: str, tolerance: float, tied: bool
) -> None:
    folder = tiny_llama_tied if tied else tiny_llama
    engine, job = start(folder, OWN["full"], dtype)
    losses = [report.loss for report in run(engine)]
    assert losses == pytest.approx(plain_curve(folder, job, dtype, tied), rel=tolerance)


def test_full_on_phi3_with_longrope_and_a_window_equals_plain_transformers(tiny_phi3: Path) -> None:
    engine, job = start(tiny_phi3, OWN["full"], "float64")
    losses = [report.loss for report in run(engine)]
    assert losses == pytest.approx(plain_curve(tiny_phi3, job, "float64"), rel=1e-8)


def test_a_tied_embedding_is_one_parameter_and_stays_tied(tiny_llama_tied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine, job = start(tiny_llama_tied, OWN["full"])
    assert job.slot.num_trainable_parameters == LINEAR_WEIGHTS + HEAD_WEIGHTS + 5 * 64
    before = engine.base.model.get_input_embeddings().weight.detach().clone()
    run(engine)
    write_result(base_of(engine), tmp_path / "model", base_name="tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, job.slot.parameters()["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, before)


def test_last_layers_leave_the_rest_alone(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    engine, job = start(tiny_llama, OWN["last_layers"])
    before = {name: p.detach().clone() for name, p in engine.base.model.named_parameters()}
    run(engine)
    changed = {n for n, p in engine.base.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(job.slot.parameters())
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in changed} == {
        "model.layers",
        "model.norm",
        "lm_head.weight",
    }
    assert not any(name.startswith("model.layers.0.") for name in changed)
    _, tied = start(tiny_llama_tied, OWN["last_layers"])
    assert "model.embed_tokens.weight" not in tied.slot.parameters()


def test_bfloat16_weights_train_through_float32_masters(tiny_llama: Path, tmp_path: Path) -> None:
    """Steps too small for bfloat16 to show still add up in the masters, and a checkpoint keeps them."""
    slow = replace(TRAIN, learning_rate=1e-5, schedule="constant", weight_decay=0.0)
    engine, job = start(tiny_llama, OWN["full"], "bfloat16", slow)
    live = base_of(engine).slot.live["lm_head.weight"]
    before, master = live.detach().clone(), job.slot.parameters()["lm_head.weight"]
    first = master.detach().clone()
    run(engine)
    assert (live.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    moved = (master - first).abs()
    assert float(moved.max()) > 5e-5
    assert torch.equal(live, master.to(torch.bfloat16))
    stuck = (live == before) & (moved > 0)
    assert float(stuck.float().mean()) > 0.2, "bfloat16 alone would have lost these steps"
    save_checkpoint(tmp_path, job, engine.base, {}, base_name="tiny")
    engine, again = start(tiny_llama, OWN["full"], "bfloat16", slow)
    load_checkpoint(tmp_path / "step-000012", again, engine.base)
    assert torch.equal(again.slot.parameters()["lm_head.weight"], master)
    assert torch.equal(base_of(engine).slot.live["lm_head.weight"], live)


def test_the_base_is_not_asked_once_its_weights_have_moved(tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, OWN["full"])
    batch = pack([PackItem(examples(1)[0], BASE_SLOT)])
    assert score(engine.base, batch)
    run(engine, until=1)
    with pytest.raises(ValueError, match="have been trained"):
        score(engine.base, batch)


def test_a_checkpoint_may_be_several_files(tiny_llama: Path, tmp_path: Path) -> None:
    engine, job = start(tiny_llama, OWN["full"])
    run(engine, until=2)
    write_trained(base_of(engine).slot, tmp_path, shard_bytes=50_000)
    assert len(list(tmp_path.glob("trained-*.safetensors"))) > 4
    fresh = load_own(tiny_llama, OWN["full"], seed=1)
    read_trained(fresh.slot, tmp_path)
    for name, value in job.slot.parameters().items():
        assert torch.equal(value, fresh.slot.parameters()[name])


def test_recomputing_activations_changes_nothing(tiny_llama: Path) -> None:
    for spec in (OWN["full"], PEFT["boft"]):
        engine, _ = start(tiny_llama, spec, "float64")
        plain = [report.loss for report in run(engine)]
        engine, _ = start(tiny_llama, spec, "float64")
        engine.base.set_checkpointing(True)
        assert [report.loss for report in run(engine)] == pytest.approx(plain, rel=1e-9)


def test_splitting_an_optimizer_batch_changes_nothing(tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, PEFT["adalora"], "float64")
    whole = [report.loss for report in run(engine)]
    engine, _ = start(tiny_llama, PEFT["adalora"], "float64", replace(TRAIN, micro_batch_tokens=32))
    assert [report.loss for report in run(engine)] == pytest.approx(whole, rel=1e-8)


@pytest.mark.parametrize("name", ["full", "lokr"])
def test_a_classifier_trains_and_loads_alone(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    engine, job = start(tiny_llama, replace((OWN | PEFT)[name], num_classes=3), "float64")
    reports = run(engine)
    assert reports[-1].loss < reports[0].loss
    write_result(base_of(engine), tmp_path / "out", base_name=str(tiny_llama), labels=["a", "b", "c"], pad_token_id=2)
    if name == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="float64").eval()
        assert model.config.id2label[1] == "b"
    else:
        config = AutoConfig.from_pretrained(tmp_path / "out", subfolder="classifier")
        model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, config=config, dtype="float64")
        model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    sequences = random_sequences((3, 17, 40), 300)
    ours = slot_logits(engine.base, job.slot, sequences)
    assert distance(ours, model_logits(model, sequences, classifies=True)) < 1e-9


# -- AdaLoRA


def test_adaloras_ranks_fall_to_the_target_and_differ(tiny_llama: Path) -> None:
    spec = replace(PEFT["adalora"], options={**PEFT["adalora"].options, "deltaT": 1})
    engine, job = start(tiny_llama, spec, train=replace(TRAIN, epochs=8, learning_rate=5e-2))
    hooks = base_of(engine).slot.method_hooks
    assert isinstance(hooks, AdaloraHooks)
    seen = []
    while engine.has_work:
        if engine.step():
            seen.append(sum(hooks.ranks().values()))
    num_layers = 14
    assert seen[1] == 6 * num_layers, "nothing is cut while warming up"
    assert seen[-1] <= 3 * num_layers
    assert sorted(seen[2:], reverse=True)[0] > seen[-1]
    assert len(set(hooks.ranks().values())) > 1, "layers keep different ranks"
    assert job.state == "done"


def test_adaloras_regularizer_is_pefts_own(tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, PEFT["adalora"], "float64")
    model: Any = base_of(engine).peft_model  # type: ignore[attr-defined]
    hooks = base_of(engine).slot.method_hooks
    assert isinstance(hooks, AdaloraHooks)
    ids = torch.arange(40, 60)[None]
    weight = model.active_peft_config.orth_reg_weight
    with torch.no_grad():
        with_it = float(model(input_ids=ids, labels=ids).loss)
        model.active_peft_config.orth_reg_weight = 0.0
        without = float(model(input_ids=ids, labels=ids).loss)
    assert with_it - without == pytest.approx(weight * float(hooks.regularizer().detach()), rel=1e-5)


# -- refused before loading


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ExclusiveSpec("bias"), "has none"),
        (ExclusiveSpec("last_layers", num_layers=3), "has 2 blocks"),
        (ExclusiveSpec("peft", peft_type="BOOFT"), r"did you mean 'boft'"),
        (ExclusiveSpec("peft", peft_type="POLY"), "number of its task"),
        (ExclusiveSpec("peft", peft_type="BOFT", options={"boft_blok_size": 4}), "did you mean 'boft_block_size'"),
        (ExclusiveSpec("peft", peft_type="BOFT", options={"boft_n_butterfly_factor": 2}), "takes 1 in silence"),
        (ExclusiveSpec("peft", peft_type="BOFT", options={"task_type": "x"}), "filled in by Luthier"),
        (ExclusiveSpec("peft", peft_type="BOFT", options={"target_modules": ["nowhere"]}), "nowhere"),
        (ExclusiveSpec("peft", peft_type="ADALORA", options={"tinit": 9, "tfinal": 9, **ALL}, total_steps=10), "total"),
        (ExclusiveSpec("peft", peft_type="PROMPT_TUNING", num_classes=2), "a classifier reads none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_work_is_refused_without_the_weights(
    spec: ExclusiveSpec, says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hollow / name).write_bytes((tiny_llama / name).read_bytes())
    content = (hollow / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    assert "model.norm.weight" in header
    with pytest.raises(RecipeError, match=says):
        check(hollow, spec)


@pytest.mark.parametrize("name", ["full", *PEFT])
def test_what_adds_virtual_tokens_runs_padded_and_all_else_packed(name: str, tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, (OWN | PEFT)[name])
    assert base_of(engine).is_packed == (name not in ("prompt", "prefix", "p_tuning"))


def test_an_example_longer_by_virtual_tokens_counts_its_own_tokens_alone(tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, PEFT["prompt"])
    report = run(engine, until=1)[0]
    first = [engine.jobs["own"].examples[int(i)] for i in engine.jobs["own"].batch_indices(0)]
    assert report.num_tokens == sum(example.num_tokens for example in first)
    assert engine.base.max_positions == 256 - 5


def test_padded_neighbours_with_virtual_tokens_do_not_see_each_other(tiny_llama: Path) -> None:
    for name in ("prompt", "prefix"):
        engine, job = start(tiny_llama, PEFT[name], "float64")
        run(engine, until=2)
        sequences = random_sequences((3, 30), 300)
        together = slot_logits(engine.base, job.slot, sequences)
        alone = [slot_logits(engine.base, job.slot, [sequence])[0] for sequence in sequences]
        assert distance(together, alone) < 1e-12


def test_a_sampler_writes_with_virtual_tokens_what_peft_writes(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from luthier.engine.sample import Request, Sampler, SamplingParams

    for name in ("prompt", "prefix", "lokr"):
        engine, job = start(tiny_llama, PEFT[name])
        run(engine)
        write_result(base_of(engine), tmp_path / name, base_name="tiny")
        prompt = np.arange(40, 50, dtype=np.int32)
        params = SamplingParams(max_new_tokens=6)
        sampler = Sampler(engine.base, lambda ids: " ".join(map(str, ids)))
        ours = sampler.run([Request("a", prompt, job.slot.index, params)])[0].tokens
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model = PeftModel.from_pretrained(base, tmp_path / name).eval()
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert list(ours) == ids[0, 10:].tolist()


def test_the_same_seed_gives_the_same_start(tiny_llama: Path) -> None:
    spec = PEFT["vera"]
    first, second = (load_own(tiny_llama, spec, seed=5).slot.parameters() for _ in range(2))
    other = load_own(tiny_llama, PEFT["loha"], seed=6).slot.parameters()
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = load_own(tiny_llama, PEFT["loha"], seed=5).slot.parameters()
    assert any(not torch.equal(other[name], same[name]) for name in other)


def test_training_draws_leave_the_random_state_outside_alone(tiny_llama: Path) -> None:
    engine, _ = start(tiny_llama, PEFT["boft"])
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run(engine, until=2)
    assert torch.equal(torch.rand(3), expected)


def test_changed_weights_are_counted_once_and_not_for_every_token(tiny_llama: Path) -> None:
    plain, _ = start(tiny_llama, OWN["full"])
    turned, _ = start(tiny_llama, replace(PEFT["boft"], options={"boft_block_size": 4, **ALL}))
    per_token = [activation_bytes_per_token(e.base, base_of(e).slot) for e in (plain, turned)]
    fixed = [activation_bytes_per_forward(e.base, base_of(e).slot) for e in (plain, turned)]
    weights = 4 * LINEAR_WEIGHTS
    assert fixed[0] < 0.1 * weights
    assert weights < fixed[1] < 10 * weights, "a rotated copy of every weight, and what made it"
    assert per_token[1] < 2 * per_token[0]
