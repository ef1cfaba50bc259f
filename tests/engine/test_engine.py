"""Jobs come and go between any two steps, and share the base fairly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.conftest import add_job, run_all
from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.pack import PackItem, pack
from luthier.engine.step import score, train_step
from luthier.errors import RecipeError
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]


@pytest.fixture
def llama(tiny_llama: Path) -> Base:
    return load_base(tiny_llama, dtype="float64")


def endless(base: Base, name: str, examples: list[Example], batch_size: int = 1) -> TrainingJob:
    train = TrainSpec(epochs=1000, batch_size=batch_size, learning_rate=1e-4)
    return TrainingJob(name, base.bank.add(AdapterSpec(rank=2), 0), examples, train)


def test_jobs_of_one_base_run_in_one_forward(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama)
    for kind in range(4):
        add_job(engine, kind, make_examples)
    reports = engine.step()
    assert {report.job for report in reports} == {"job-0", "job-1", "job-3"}  # job-2 has a second micro-batch to go
    assert sum(report.num_tokens for report in reports) > 0


def test_the_budget_bounds_a_forward(llama: Base, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.engine import engine as module

    sizes = []
    original = module.train_step
    monkeypatch.setattr(
        module,
        "train_step",
        lambda base, batch, *rest: sizes.append(batch.num_tokens) or original(base, batch, *rest),
    )
    engine = Engine(llama, budget_tokens=90)
    for name in "abcd":
        engine.add(endless(llama, name, make_examples(20, ord(name))))
    for _ in range(40):
        engine.step()
    assert max(sizes) <= 90
    assert max(sizes) > 60


def test_a_small_job_is_not_held_up_by_a_large_one(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama, budget_tokens=120)
    engine.add(endless(llama, "large", make_examples(60, 0), batch_size=30))
    engine.jobs["large"].micro_batch_tokens = 120
    engine.add(endless(llama, "small", make_examples(30, 1)))
    steps = {"large": 0, "small": 0}
    tokens = {"large": 0, "small": 0}
    for _ in range(150):
        for report in engine.step():
            steps[report.job] += 1
            tokens[report.job] += report.num_tokens
    assert steps["small"] > 100  # it fits beside most of the large one's parts
    assert tokens["large"] > 3000


def test_a_latecomer_neither_jumps_nor_waits(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama, budget_tokens=1)  # one job a forward
    for name in "ab":
        engine.add(endless(llama, name, make_examples(30, ord(name))))
    for _ in range(60):
        engine.step()
    engine.add(endless(llama, "late", make_examples(30, 9)))
    tokens = dict.fromkeys("ab", 0) | {"late": 0}
    for _ in range(90):
        for report in engine.step():
            tokens[report.job] += report.num_tokens
    assert max(tokens.values()) - min(tokens.values()) <= 3 * 44


def test_a_paused_job_waits_and_the_others_go_on(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama)
    paused, other = add_job(engine, 0, make_examples), add_job(engine, 1, make_examples)
    engine.step()
    paused.state = "paused"
    run_all(engine)
    assert (paused.step, other.state) == (1, "done")
    assert not engine.has_work
    paused.state = "running"
    run_all(engine)
    assert paused.state == "done"


def test_names_are_taken_once(llama: Base, make_examples: MakeExamples) -> None:
    engine = Engine(llama)
    engine.add(endless(llama, "a", make_examples(2, 0)))
    with pytest.raises(ValueError, match="named a"):
        engine.add(endless(llama, "a", make_examples(2, 0)))
    engine.remove("a")
    engine.add(endless(llama, "a", make_examples(2, 0)))


def test_what_is_trainable_is_counted(llama: Base) -> None:
    """Rank x (inputs + outputs) for each layer that is asked for, and nothing besides."""
    hidden, key, inner = 64, 32, 112
    expected = 2 * (2 * (hidden + hidden) + 2 * (hidden + key) + 3 * (hidden + inner)) * 5
    assert llama.bank.add(AdapterSpec(rank=5), 0).num_trainable_parameters == expected
    few = llama.bank.add(AdapterSpec(rank=5, targets=("o_proj",), num_classes=3), 0)
    assert few.num_trainable_parameters == 2 * 5 * (hidden + hidden) + 3 * hidden
    full = llama.bank.add(AdapterSpec(rank=1, targets=("o_proj",), modules_to_save=("model.norm",)), 0)
    assert full.num_trainable_parameters == 2 * (hidden + hidden) + hidden


def test_a_target_that_is_not_there_names_its_neighbours(llama: Base) -> None:
    with pytest.raises(RecipeError, match=r"'q_porj'.*q_proj"):
        llama.bank.add(AdapterSpec(targets=("q_porj",)), 0)
    with pytest.raises(RecipeError, match=r"modules_to_save.*'lm_haed'.*lm_head"):
        llama.bank.add(AdapterSpec(modules_to_save=("lm_haed",)), 0)
    assert llama.bank.slots == {}


def test_scores_equal_the_training_losses(folder: Path, make_examples: MakeExamples) -> None:
    """Sequence by sequence, for language, classes and tags at once."""
    base = load_base(folder, dtype="float64")
    language, classes = base.bank.add(AdapterSpec(rank=2), 0), base.bank.add(AdapterSpec(rank=2, num_classes=4), 1)
    tags = base.bank.add(AdapterSpec(rank=2, num_classes=3, head="token"), 2)
    items = [PackItem(example, language.index) for example in make_examples(5, 0)]
    items += [PackItem(example, classes.index) for example in make_examples(5, 1, classes=4)]
    items += [PackItem(example, tags.index) for example in make_examples(5, 2, classes=3, head="token")]
    batch = pack(items)
    reports = train_step(base, batch, {slot.index: 1.0 for slot in (language, classes, tags)})
    scores = score(base, batch)
    for slot, rows in ((language, scores[:5]), (classes, scores[5:10]), (tags, scores[10:])):
        assert sum(row.nll_sum for row in rows) == pytest.approx(reports[slot.index].nll_sum, rel=1e-12)
        assert sum(row.weight_sum for row in rows) == pytest.approx(reports[slot.index].weight_sum)
        assert sum(row.num_targets for row in rows) == reports[slot.index].num_supervised_tokens
    for row, item in zip(scores, items, strict=True):
        assert row.num_correct <= row.num_targets
        is_class = item.slot == classes.index
        assert (row.predicted_class >= 0) == is_class
        if is_class:
            assert row.num_correct == int(row.predicted_class == item.example.class_index)
        if item.slot == tags.index:
            assert item.example.tags is not None
            wanted = item.example.tags[item.example.tags >= 0]
            assert row.probabilities_CK is not None
            assert row.probabilities_CK.shape == (len(wanted), 3)
            np.testing.assert_allclose(row.probabilities_CK.sum(axis=1), 1.0, rtol=1e-5)
            assert row.num_correct == int((row.probabilities_CK.argmax(axis=1) == wanted).sum())
        else:
            assert (row.probabilities_CK is None) == (item.slot == language.index)


def test_a_class_without_a_head_is_refused(llama: Base, make_examples: MakeExamples) -> None:
    slot = llama.bank.add(AdapterSpec(rank=2), 0)
    batch = pack([PackItem(example, slot.index) for example in make_examples(2, 0, classes=3)])
    with pytest.raises(ValueError, match="no head"):
        train_step(llama, batch, {slot.index: 2.0})


def test_groups_are_served_alike_and_join_level(llama: Base, make_examples: MakeExamples) -> None:
    """A tenant's six jobs get no more than another's one, and a tenant that comes later neither jumps nor waits."""
    engine = Engine(llama, budget_tokens=120, lead_tokens=120.0)
    for n in range(6):
        engine.add(endless(llama, f"many-{n}", make_examples(20, n)), group="many")
    engine.add(endless(llama, "one", make_examples(20, 9)), group="one")

    def run(num_forwards: int) -> dict[str, int]:
        served = dict.fromkeys(("many", "one", "late"), 0)
        for _ in range(num_forwards):
            for report in engine.step():
                served[report.job.partition("-")[0]] += report.num_tokens
        return served

    first = run(120)
    assert first["many"] == pytest.approx(first["one"], abs=250)
    engine.add(endless(llama, "late", make_examples(20, 11)), group="late", group_share=2.0)
    second = run(120)
    assert second["many"] == pytest.approx(second["one"], abs=300)
    assert second["late"] == pytest.approx(2 * second["one"], rel=0.25)
    for name in list(engine.jobs):
        engine.remove(name)
    assert not engine.has_work
