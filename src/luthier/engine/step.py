"""One forward (and backward) over sequences of many slots, and what it says of each slot and sequence.

Shapes: P supervised positions, C positions with a class, N sequences, K classes of a slot's head, M preference pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.base.load import Base, Forward
from luthier.engine.graphs import StepGraphs
from luthier.engine.heads import read_classes
from luthier.engine.pack import PackedBatch, PackedPairs, Segment
from luthier.objectives.language_modelling import TokenScores, frozen_head_nll, next_token_nll_reference
from luthier.objectives.multilabel_head import flags_nll
from luthier.objectives.preference import PairScores, preference_loss, prefers_chosen, side_logprobs
from luthier.objectives.sequence_head import class_nll
from luthier.objectives.trained_head import trained_head_nll
from luthier.types import HeadKind


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot's share of a forward.

    Attributes:
        nll_sum: Sum of weight x negative log-likelihood (or of the losses of classes or of pairs).
        weight_sum: Sum of the weights (or the number of classes that were to be read, or of pairs).
        num_tokens: Tokens that the slot put through the base.
        num_supervised_tokens: Positions that carried loss.
        num_right, num_judged: What accuracy is made of: targets (tokens, classes, tags, sets of labels) that the
            likeliest prediction hits, of all; of pairs those whose better side it prefers, one of neither as half.
    """

    nll_sum: float
    weight_sum: float
    num_tokens: int
    num_supervised_tokens: int
    num_right: float = 0.0
    num_judged: int = 0


@dataclass(frozen=True, slots=True)
class PairReport:
    """What a model makes of the two sides of a preference pair.

    Attributes:
        chosen_logprob, rejected_logprob: log p of each reply given the prompt, in nats.
        reward_margin: The implicit reward of the chosen side less the rejected one's; NaN without a reference.
    """

    chosen_logprob: float
    rejected_logprob: float
    reward_margin: float


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """One sequence's scores, or one pair's.

    Attributes:
        nll_sum, weight_sum: As in `SlotReport`.
        num_correct, num_targets: Targets that the likeliest prediction hits, of all; 0 of a pair.
        predicted_class: The likeliest class of a sequence head, or -1 for another objective.
        probabilities_CK: float32. What the head gives at each position with a class; None for an objective without.
        pair: What a pair's sides are worth; None for other objectives.
    """

    nll_sum: float
    weight_sum: float
    num_correct: int
    num_targets: int
    predicted_class: int = -1
    probabilities_CK: NDArray[np.float32] | None = None
    pair: PairReport | None = None


@dataclass(frozen=True, slots=True)
class _Scores:
    """What a forward found: of the P positions, of the C positions with a class, and of the M pairs."""

    tokens: TokenScores | None
    classes: _Classes | None
    pairs: PairScores | None


@dataclass(frozen=True, slots=True)
class _Classes:
    """Scores of all C positions, and each segment's logits [C of the slot, K]."""

    scores: TokenScores
    logits: tuple[Tensor, ...]


def train_step(
    base: Base,
    batch: PackedBatch,
    denominators: Mapping[int, float],
    graphs: StepGraphs | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[int, SlotReport]:
    """Forward and backward; gradients add up in each slot's parameters.

    Args:
        denominators: Slot -> total weight of its whole optimizer batch. The slot's loss here is its weighted sum over
            that total, so that however the optimizer batch is split, and whoever is in the batch, its gradient is the
            same.
        graphs: Captured steps, which take the small batches that they can.
        backward: Makes the gradients of a loss.
    """
    routing = base.routing(batch, training=True)
    with base.bank.routed(routing):
        if graphs is not None:
            weight_P = batch.target_weight_P
            scores = graphs.run(
                batch, lambda: weight_P / _per_row(batch.target_segments, denominators, weight_P), routing
            )
            if scores is not None:
                return _slot_reports(batch, _Scores(scores, None, None))
        found = _scores(base, batch)
        parts: list[Tensor] = []
        if found.tokens is not None:
            weight_P = batch.target_weight_P.to(found.tokens.nll_P.dtype)
            scale_P = weight_P / _per_row(batch.target_segments, denominators, weight_P)
            parts.append((found.tokens.nll_P * scale_P).sum())
        if found.classes is not None:
            nll_C = found.classes.scores.nll_P
            parts.append((nll_C / _per_row(batch.class_segments, denominators, nll_C)).sum())
        if found.pairs is not None and batch.pairs is not None:
            loss_M = found.pairs.loss_M
            parts.append((loss_M / _per_row(batch.pairs.segments, denominators, loss_M)).sum())
        if parts:  # a micro-batch may hold only rows whose weights are all 0
            backward(functools.reduce(torch.add, parts))
    return _slot_reports(batch, found)


def score(base: Base, batch: PackedBatch) -> list[SequenceReport]:
    """Forward only: scores of every sequence or pair, in the batch's order (sorted by slot)."""
    # Weights that are gathered for this forward may be met by a backward later.
    mode = torch.no_grad() if base.is_sharded else torch.inference_mode()
    with mode, base.bank.routed(base.routing(batch, training=False)):
        found = _scores(base, batch)
        return _sequence_reports(base, batch, found)


def _sequence_reports(base: Base, batch: PackedBatch, found: _Scores) -> list[SequenceReport]:
    tokens, classes = found.tokens, found.classes
    sums = torch.zeros(4, batch.num_sequences, dtype=torch.float64, device=base.device)
    if tokens is not None:
        weights_P = batch.target_weight_P.double()
        values = (
            tokens.nll_P.double() * weights_P,
            weights_P,
            tokens.is_correct_P.double(),
            torch.ones_like(weights_P),
        )
        for row, value_P in zip(sums, values, strict=True):
            row.index_add_(0, batch.target_rows_P, value_P)
    if classes is not None:
        scores = classes.scores
        ones_C = torch.ones_like(scores.nll_P, dtype=torch.float64)
        for row, value_C in zip(
            sums, (scores.nll_P.double(), ones_C, scores.is_correct_P.double(), ones_C), strict=True
        ):
            row.index_add_(0, batch.class_rows_C, value_C)
    read = _probabilities(base, batch, classes) if classes is not None else {}
    reports: dict[int, SequenceReport] = {
        n: SequenceReport(nll, weight, int(correct), int(count), *read.get(n, (-1, None)))
        for n, (nll, weight, correct, count) in enumerate(sums.t().tolist())
    }
    if found.pairs is not None and batch.pairs is not None:
        _report_pairs(found.pairs, batch.pairs.chosen_rows, reports)
    return list(reports.values())


def _report_pairs(pairs: PairScores, chosen_rows: tuple[int, ...], reports: dict[int, SequenceReport]) -> None:
    """Put one report of the pair in place of those of its two sides."""
    values = zip(
        chosen_rows, pairs.loss_M.tolist(), pairs.logprobs_M2.tolist(), pairs.reward_margin_M.tolist(), strict=True
    )
    for row, loss, logprobs, margin in values:
        reports[row] = SequenceReport(loss, 1.0, 0, 0, pair=PairReport(logprobs[0], logprobs[1], margin))
        del reports[row + 1]


def _probabilities(base: Base, batch: PackedBatch, classes: _Classes) -> dict[int, tuple[int, NDArray[np.float32]]]:
    """Sequence -> its class, if a sequence head read one, and the probabilities at its positions."""
    rows_C = batch.class_rows_C.cpu().numpy()
    found: dict[int, tuple[int, NDArray[np.float32]]] = {}
    for segment, logits_CK in zip(batch.class_segments, classes.logits, strict=True):
        kind = base.bank.slots[segment.slot].spec.head
        probabilities_CK = class_probabilities(logits_CK, kind).cpu().numpy()
        rows = rows_C[segment.start : segment.end]
        is_sequence = kind == "sequence"
        for row in np.unique(rows):
            own_CK = probabilities_CK[rows == row]
            found[int(row)] = (int(own_CK[0].argmax()) if is_sequence else -1, own_CK)
    return found


def class_probabilities(logits_CK: Tensor, kind: HeadKind) -> Tensor:
    """float32 [C, K]: of the classes, which exclude each other, or of each of a multilabel head's labels by itself."""
    return logits_CK.float().sigmoid() if kind == "multilabel" else logits_CK.float().softmax(dim=-1)


def _scores(base: Base, batch: PackedBatch) -> _Scores:
    has_tokens = batch.target_at_P.numel() > 0
    result = base.forward(batch, keep=batch.target_at_P if has_tokens else None, only_scored=True)
    tokens = _token_scores(base, batch, result) if has_tokens else None
    classes = _class_scores(base, batch, result) if batch.class_at_C.numel() > 0 else None
    pairs = _pair_scores(batch.pairs, tokens) if batch.pairs is not None else None
    return _Scores(tokens, classes, pairs)


def _pair_scores(pairs: PackedPairs, tokens: TokenScores | None) -> PairScores:
    if tokens is None:
        raise ValueError("no token of the batch's preference pairs is supervised")
    nll_Q = _rows(tokens.nll_P, pairs.at_Q)
    logprobs_M2 = side_logprobs(nll_Q, pairs.side_Q, len(pairs.chosen_rows))
    return preference_loss(logprobs_M2, pairs.reference_M, pairs.beta_M, pairs.smoothing_M)


def _token_scores(base: Base, batch: PackedBatch, result: Forward) -> TokenScores:
    if result.logits_PV is not None:
        return next_token_nll_reference(result.logits_PV, batch.target_token_P)
    hidden_PD = _rows(result.hidden_TD, batch.target_at_P)
    if base.bank.head_is_plain_for(batch.target_segments) and not base.bank.use_reference:
        weight_VD, bias_V = base.head_weight_VD, base.head_bias_V
        is_trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        compute = trained_head_nll if is_trained and torch.is_grad_enabled() else frozen_head_nll
        return compute(hidden_PD, weight_VD, bias_V, batch.target_token_P)
    return next_token_nll_reference(base.logits(hidden_PD, batch.target_segments), batch.target_token_P)


class _UniqueRows(torch.autograd.Function):
    """Rows that differ from one another: the backward copies where plain indexing would sort and add."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, at_P: Tensor) -> Tensor:
        ctx.save_for_backward(at_P)
        ctx.shape = hidden_TD.shape
        return hidden_TD.index_select(0, at_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (at_P,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, at_P, grads[0]), None


def _rows(hidden_TD: Tensor, at_P: Tensor) -> Tensor:
    if hidden_TD.device.type == "cpu":
        return hidden_TD[at_P]
    rows_PD: Tensor = _UniqueRows.apply(hidden_TD, at_P)  # type: ignore[no-untyped-call]
    return rows_PD


def _class_scores(base: Base, batch: PackedBatch, result: Forward) -> _Classes:
    """Classes, labels and tags alike: each segment by the head of its slot."""
    read_CD = _rows(result.hidden_TD, base.reads_at(batch))
    nll, correct, logits = [], [], []
    for segment, flags_CK in zip(batch.class_segments, batch.class_flags, strict=True):
        slot = base.bank.slots.get(segment.slot)
        if slot is None or slot.head is None:
            raise ValueError(f"slot {segment.slot} has no head")
        rows = slice(segment.start, segment.end)
        logits_CK = read_classes(slot.head, read_CD[rows])
        if (slot.spec.head == "multilabel") != (flags_CK is not None):
            raise ValueError(f"slot {segment.slot} has a {slot.spec.head} head, and its examples are of another")
        scores = class_nll(logits_CK, batch.class_index_C[rows]) if flags_CK is None else flags_nll(logits_CK, flags_CK)
        nll.append(scores.nll_P)
        correct.append(scores.is_correct_P)
        logits.append(logits_CK.detach())
    return _Classes(TokenScores(torch.cat(nll), torch.cat(correct)), tuple(logits))


def _per_row(segments: tuple[Segment, ...], denominators: Mapping[int, float], like: Tensor) -> Tensor:
    values = torch.tensor([denominators[segment.slot] for segment in segments], dtype=like.dtype)
    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    return _on(values.repeat_interleave(lengths), like.device)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that does not wait for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _segment_sums(values_P: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """The sum over each segment."""
    if values_P.device.type == "cpu":
        return torch.stack([values_P[segment.start : segment.end].sum() for segment in segments])
    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    rows_P = _on(torch.arange(len(segments)).repeat_interleave(lengths), values_P.device)
    return values_P.new_zeros(len(segments)).index_add_(0, rows_P, values_P)


def _slot_reports(batch: PackedBatch, found: _Scores) -> dict[int, SlotReport]:
    tokens = found.tokens
    nll: dict[int, float] = {}
    weight: dict[int, float] = {}
    count: dict[int, int] = {}
    right: dict[int, float] = {}
    judged: dict[int, int] = {}
    # One read for all slots: every read waits for the device.
    if tokens is not None:
        weight_P = batch.target_weight_P.double()
        values = (tokens.nll_P.detach().double() * weight_P, weight_P, tokens.is_correct_P.double())
        sums_3S = torch.stack([_segment_sums(part, batch.target_segments) for part in values])
        for segment, nll_sum, weight_sum, correct in zip(batch.target_segments, *sums_3S.tolist(), strict=True):
            nll[segment.slot], weight[segment.slot], right[segment.slot] = nll_sum, weight_sum, correct
            count[segment.slot] = judged[segment.slot] = segment.end - segment.start
    if found.classes is not None:
        scores = found.classes.scores
        sums_2S = torch.stack(
            [
                _segment_sums(part, batch.class_segments)
                for part in (scores.nll_P.detach().double(), scores.is_correct_P.double())
            ]
        )
        for segment, part, correct in zip(batch.class_segments, *sums_2S.tolist(), strict=True):
            size = segment.end - segment.start
            nll[segment.slot] = nll.get(segment.slot, 0.0) + part
            weight[segment.slot] = weight.get(segment.slot, 0.0) + size
            count[segment.slot] = count.get(segment.slot, 0) + size
            right[segment.slot] = right.get(segment.slot, 0.0) + correct
            judged[segment.slot] = judged.get(segment.slot, 0) + size
    if found.pairs is not None and batch.pairs is not None:
        pair_values = (found.pairs.loss_M.detach(), prefers_chosen(found.pairs.reward_margin_M))
        sums_2S = torch.stack([_segment_sums(part, batch.pairs.segments) for part in pair_values])
        for segment, part, preferred in zip(batch.pairs.segments, *sums_2S.tolist(), strict=True):
            size = segment.end - segment.start
            nll[segment.slot] = nll.get(segment.slot, 0.0) + part
            weight[segment.slot] = weight.get(segment.slot, 0.0) + size
            right[segment.slot], judged[segment.slot] = preferred, size  # in place of the tokens of their sides
    return {
        segment.slot: SlotReport(
            nll.get(segment.slot, 0.0),
            weight.get(segment.slot, 0.0),
            segment.end - segment.start,
            count.get(segment.slot, 0),
            right.get(segment.slot, 0.0),
            judged.get(segment.slot, 0),
        )
        for segment in batch.segments
    }
