"""Rows that sequences share, and rows that nothing reads, are not computed; what comes out is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.engine.live_rows import find_live_rows
from luthier.engine.pack import BASE_SLOT, PackedBatch, PackItem, pack
from luthier.engine.step import score, train_step
from luthier.types import AdapterSpec, Example

CLASSES = 3

pytestmark = pytest.mark.usefixtures("wide_norms")


def example(*tokens: int, first_target: int = -1, index: int = -1) -> Example:
    """A sequence whose loss begins at `first_target` and leaves its last token out; a class instead where given."""
    weights = np.zeros(len(tokens), dtype=np.float32)
    if first_target >= 0:
        weights[first_target:-1] = 1.0
    return Example(np.array(tokens, dtype=np.int32), weights, index, 0)


def similar(seed: int, num: int, *, index: int = -1) -> list[Example]:
    """Random sequences of two common beginnings, the longer of which goes on from the shorter; one stands twice."""
    random = np.random.default_rng(seed)
    short, long = random.integers(4, 250, size=6), random.integers(4, 250, size=9)
    examples = []
    for row in range(num):
        begin = short if row % 2 else np.concatenate([short, long])
        tokens = [*begin.tolist(), *random.integers(4, 250, size=random.integers(3, 28)).tolist()]
        examples.append(example(*tokens, first_target=len(begin) + 1 if index < 0 else -1, index=index))
    return [*examples, examples[-1]]


def test_shared_beginnings_are_computed_once_and_unread_ends_never() -> None:
    batch = pack(
        [
            PackItem(example(5, 6, 7, 8, 9, first_target=3), 0),  # read up to token 2, which predicts token 3
            PackItem(example(5, 6, 30, 31, first_target=1), 0),
            PackItem(example(5, 6, 7, 40, first_target=2), 1),
        ]
    )
    live = find_live_rows(batch, only_scored=True)
    assert live is not None
    assert live.source_U.tolist() == [5, 6, 2, 9, 10]
    assert live.row_of_T.tolist() == [0, 1, 2, 0, 0, 0, 1, 0, 0, 3, 4, 0, 0]
    assert live.first_at == {0: 0, 9: 3, 13: 5}
    everything = find_live_rows(batch, only_scored=False)
    assert everything is not None
    assert everything.source_U.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert everything.row_of_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10]


def test_nothing_is_shared_between_classes_of_length_nor_where_it_would_not_pay() -> None:
    items = [PackItem(example(*range(5, 5 + num), first_target=1), 0) for num in (20, 40)]
    assert find_live_rows(pack(items), only_scored=False).num_rows == 40  # type: ignore[union-attr]
    assert find_live_rows(pack(items), only_scored=False, class_of=lambda length: int(length > 32)) is None
    assert find_live_rows(pack([PackItem(example(1, 2, 3), 0)]), only_scored=True) is None


def load(folder: Path, *, fast: bool) -> tuple[Base, PackedBatch]:
    """A base with two slots past their start, one of them with a head, and a batch for both and for neither."""
    base = load_base(folder, dtype="float64", wants_fast_body=fast)
    slots = [base.bank.add(AdapterSpec(rank=4, alpha=8.0), 0), base.bank.add(AdapterSpec(num_classes=CLASSES), 1)]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for slot in slots:
            for parameter in slot.parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    items = [PackItem(e, slots[0].index) for e in similar(0, 7)]
    items += [PackItem(e, slots[1].index) for e in similar(1, 4, index=2)]
    return base, pack(items + [PackItem(e, BASE_SLOT) for e in similar(2, 3)])


def gradients(base: Base, batch: PackedBatch) -> dict[str, Tensor]:
    trained = pack_without_base(batch)
    train_step(base, trained, dict.fromkeys(trained.slots, 5.0))
    found = {}
    for index, slot in base.bank.slots.items():
        found |= {f"{index}.{n}": p.grad.clone() for n, p in slot.parameters().items() if p.grad is not None}
    return found


def pack_without_base(batch: PackedBatch) -> PackedBatch:
    bounds = batch.offsets_N1.tolist()
    items = []
    for row, slot in enumerate(batch.slots):
        if slot == BASE_SLOT:
            continue
        tokens = batch.tokens_T[bounds[row] : bounds[row + 1]].numpy().astype(np.int32)
        weights = np.zeros(len(tokens), dtype=np.float32)
        at = batch.target_at_P[batch.target_rows_P == row] - bounds[row] + 1
        weights[at.numpy()] = 1.0
        classes = batch.class_index_C[batch.class_rows_C == row].tolist()
        items.append(PackItem(Example(tokens, weights, classes[0] if classes else -1, row), slot))
    return pack(items)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_phi3"])
def test_scores_and_gradients_equal_those_of_all_rows(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(kind)
    fast, batch = load(folder, fast=True)
    assert fast.fast_body is not None
    live = fast.fast_body._live_rows(batch, True)
    assert live is not None
    assert live.num_rows < 0.8 * batch.num_tokens
    scores, grads = score(fast, batch), gradients(fast, batch)

    monkeypatch.setattr(type(fast.fast_body), "_live_rows", lambda *_: None)
    whole, _ = load(folder, fast=True)
    plain, _ = load(folder, fast=False)
    for base, tolerance in ((whole, 1e-9), (plain, 1e-5)):
        for one, other in zip(scores, score(base, batch), strict=True):
            assert one.nll_sum == pytest.approx(other.nll_sum, rel=tolerance)
            assert one.num_correct == other.num_correct
        expected = gradients(base, batch)
        assert {n for n, g in grads.items() if g.abs().max() > 0} == {
            n for n, g in expected.items() if g.abs().max() > 0
        }
        for name in expected:
            torch.testing.assert_close(grads[name], expected[name], rtol=tolerance, atol=tolerance)
