"""The values that pass from one stage to the next, without torch and without pydantic.

Everything here is a plain frozen dataclass over numpy, so that data checks run without loading torch and the engine
runs without loading pydantic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]

Objective = Literal["language_modelling", "sequence_head", "multilabel_head", "token_head", "preference"]

HeadKind = Literal["sequence", "multilabel", "token"]
"""What a head says: the class of a whole sequence, any number of labels of one, or the class of single tokens."""

HEAD_NOUNS: dict[HeadKind, str] = {
    "sequence": "classes",
    "multilabel": "labels of which a text may have several",
    "token": "tags",
}

HEAD_SAYINGS: dict[HeadKind, str] = {
    "sequence": "one class of each text",
    "multilabel": "any number of labels of each text",
    "token": "a tag of each token",
}
"""What a head of each kind says, for errors that hold one against another."""

LEAST_MICRO_BATCH_TOKENS = 16
"""A micro-batch is never asked to be smaller."""

DEFAULT_THRESHOLD = 0.5
"""The probability from which on a label is given where a text may have several."""

NO_CLASS = -1
"""`Example.class_index` of an example that has no class."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What makes one loss of an example's two sides.

    Attributes:
        rejected_at: Where the rejected side begins among the example's tokens; all before it is the chosen side.
        beta: How strongly the loss holds the model to its reference.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round.
        reference: log p(chosen) - log p(rejected), in nats, under the model that training starts from; NaN until it has
            been computed.
    """

    rejected_at: int
    beta: float
    label_smoothing: float = 0.0
    reference: float = math.nan


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence as the engine trains on it, or the two sequences of a preference pair.

    Attributes:
        tokens: int32 [length]. Token ids, BOS included where the model wants one. Of a pair, the chosen side's and then
            the rejected side's, each with the prompt.
        weights: float32 [length]. `weights[i]` is the loss weight of predicting `tokens[i]` from what stands before it
            (labels are unshifted; the engine shifts them in one place). `weights[0]` is always 0. All 0 for objectives
            that do not model language. Of a pair, 1 at the tokens whose probability counts.
        class_index: The target of the sequence head, or `NO_CLASS`.
        class_flags: uint8 [classes]. 1 for each label that the sequence has; None for objectives but the multilabel
            head.
        tags: int32 [length]. The token head's targets, `NO_CLASS` at tokens without one; None for other objectives.
        row: Index (from 0) of the source record in its dataset; several examples may share one.
        pair: For preferences, what the loss of the two sides needs; None for other objectives.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    class_index: int = NO_CLASS
    row: int = 0
    tags: NDArray[np.int32] | None = None
    class_flags: NDArray[np.uint8] | None = None
    pair: Pair | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of its sequences: one, or the two sides of a pair."""
        if self.pair is None:
            return (self.num_tokens,)
        return (self.pair.rejected_at, self.num_tokens - self.pair.rejected_at)


class Examples(Protocol):
    """A random-access collection of examples: a memory-mapped store, or a list in tests."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked on one held-out record, and the answer that counts as right.

    Attributes:
        tokens: int32 [length]. The rendered prompt, ready to be continued.
        reference: The expected continuation as text.
        text: The prompt as a person would read it, for reports.
        row: Index of the record in its dataset.
        choices: Token ids of the only replies there are, each with its end; empty where the reply is free.
    """

    tokens: NDArray[np.int32]
    reference: str
    text: str
    row: int = 0
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """How a slot of the bank changes the base: plain values, already validated.

    Attributes:
        method: Name of a bank method ("lora", "dora", "ia3").
        rank: Rank r of the update, where the method has one.
        alpha: Numerator of the scaling; the update is multiplied by alpha / r, or alpha / sqrt(r) if `rank_stabilized`.
        dropout: Probability of dropping an input feature of the low-rank branch while training.
        rank_stabilized: rsLoRA scaling (Kalajdzievski 2023, arXiv:2312.03732).
        init: What the factors start from: "default" (no change), "pissa" or "olora" (parts of the base's own weight).
        lora_plus_ratio: LoRA+: the learning rate of B as a multiple of the rest's (Hayou et al. 2024,
            arXiv:2402.12354).
        targets: "all-linear" (every linear layer but the output layer), "default" (what the method's paper adapts), or
            module-name suffixes.
        feedforward: Those of the targets, as suffixes, whose input ia3 scales rather than their output; None takes
            those that are named as feed-forward layers usually are.
        modules_to_save: Names of modules trained in full, a copy a slot.
        new_tokens: Token ids whose embedding rows the slot trains; ids past the base's vocabulary are new rows.
        num_classes: Size of the head, or None for none.
        head: What the head says a class of.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: Literal["default", "pissa", "olora"] = "default"
    lora_plus_ratio: float = 1.0
    targets: str | tuple[str, ...] = "all-linear"
    feedforward: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    new_tokens: tuple[int, ...] = ()
    num_classes: int | None = None
    head: HeadKind = "sequence"


@dataclass(frozen=True, slots=True)
class ExclusiveSpec:
    """How an exclusive job changes a base of its own: plain values, already validated.

    Attributes:
        method: "full", "last_layers", "bias" or "peft".
        num_layers: Blocks that `last_layers` trains.
        peft_type: PEFT's own word for the method, as in "BOFT", where `method` is "peft".
        options: Fields of PEFT's config of that method.
        num_classes: Size of the head, or None for none.
        head: What the head says a class of.
        total_steps: Optimizer steps of the job, for a method that plans with them (AdaLoRA).
    """

    method: str
    num_layers: int = 0
    peft_type: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    head: HeadKind = "sequence"
    total_steps: int | None = None

    @property
    def owns_weights(self) -> bool:
        """Whether weights of the base themselves are trained, so that the result is a whole model."""
        return self.method != "peft"


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """How a job is trained: plain values, already validated. Units are in the names."""

    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_tokens: int | None = None
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
