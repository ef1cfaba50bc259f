"""What is asked of the sampler, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.pack import BASE_SLOT
from luthier.engine.reply_text import Decode
from luthier.errors import LuthierError

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingError(LuthierError):
    """A request to sample that does not hold."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a reply is drawn, and when it ends.

    Attributes:
        max_new_tokens: Most tokens of the reply.
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it.
        top_p: Draw from the smallest set of likeliest tokens that has this much of the probability (Holtzman et al.
            2020, arXiv:1904.09751).
        seed: With the position, decides each draw: the same seed gives the same reply, whoever else is in the batch.
        stop_ids: Tokens that end the reply and are no part of it.
        stop_strings: Strings that end the reply; its text ends before the first of them.
        num_logprobs: Report each token's log-probability, and this many of the likeliest; None reports nothing.

    Raises:
        SamplingError: naming the field that does not hold.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SamplingError(f"max_new_tokens is {self.max_new_tokens}", "1 or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature is {self.temperature}", "0 (the likeliest token) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p is {self.top_p}", "more than 0 and at most 1 (no restriction)")
        if "" in self.stop_strings:
            raise SamplingError("a stop string is empty", "one character or more", "leave it out")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise SamplingError(f"num_logprobs is {self.num_logprobs}", "0 or more, or None for no log-probabilities")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural, of the model itself: temperature and top_p play no part) at one position.

    Attributes:
        token, logprob: The token that was chosen.
        top: The likeliest tokens and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """What a reply must obey, such as a grammar: says which tokens may come next."""

    def allowed_V(self) -> Tensor:
        """bool [V] on the CPU, V up to the vocabulary: whether each token may come next. At least one may."""

    def take(self, token: int) -> None:
        """The reply goes on with `token`, which was allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        name: Unique among the sampler's requests.
        tokens: int32 [length]. The rendered prompt.
        slot: Index of the slot in the bank, or `BASE_SLOT`.
        params: How to draw the reply.
        constraint: What the reply must obey, or None. It has a state, so each request has its own.
        decode: Token ids -> text, where the slot's tokenizer knows tokens that the sampler's does not.
    """

    name: str
    tokens: NDArray[np.int32]
    slot: int = BASE_SLOT
    params: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    decode: Decode | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply.

    Attributes:
        tokens: The reply's tokens, without the stop token that ended it.
        text: Their text, up to the first stop string.
        finish_reason: "stop" (a stop token or string), "length" (`max_new_tokens`, or the model's positions are used
            up), "cancelled".
        logprobs: An entry for each token, or None where none were asked for.
        num_prompt_tokens: Length of the prompt.
        problem: Why Luthier itself cancelled the reply; empty otherwise.
    """

    name: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    num_prompt_tokens: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one reply, for streaming.

    Attributes:
        token: The token (a stop token too), or None for a cancellation.
        text_delta: Text that became certain with it; a reply's deltas add up to its text.
        logprob: Where the request asks for it.
        finish_reason: Set on the reply's last event, with the whole `completion`.
    """

    name: str
    token: int | None
    text_delta: str
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


def check_writes(base: Base) -> None:
    """Refuse a base that reads texts and writes none.

    Raises:
        SamplingError: naming what it is.
    """
    if base.is_encoder:
        raise SamplingError(
            f"the base is an encoder ({base.config.model_type}), which reads texts and does not write",
            "a base that writes",
            "ask a model tuned on it about rows, with `luthier predict` or over /v1/luthier/predict",
        )


def check_prompt(base: Base, request: Request) -> None:
    """Refuse what the base cannot continue.

    Raises:
        SamplingError: for a base that writes nothing, and a prompt that is empty, too long for the base, or of tokens
            that the slot does not know.
    """
    check_writes(base)
    length, most = len(request.tokens), base.max_positions
    if length == 0:
        raise SamplingError("the prompt has no tokens", "one token or more")
    if most is not None and length >= most:
        raise SamplingError(
            f"the prompt has {length:,} tokens",
            f"fewer than the {most:,} positions of the base, so that there is room for a reply",
            "shorten the prompt, or drop the conversation's oldest turns",
        )
    known = request.tokens < base.vocabulary_size
    slot = base.bank.slots.get(request.slot)
    if slot is not None and slot.token_rows is not None:
        known |= np.isin(request.tokens, slot.token_rows.ids_K.cpu().numpy())
    if not (known & (request.tokens >= 0)).all():
        odd = int(request.tokens[~known | (request.tokens < 0)][0])
        raise SamplingError(
            f"the prompt holds token {odd}",
            f"tokens from 0 to {base.vocabulary_size - 1}, or new ones of the slot",
            "tokenize the prompt with the tokenizer that was saved with the adapter",
        )
