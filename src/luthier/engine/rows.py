"""Which reply sits in which row of the cache, and which keys one may take over from another.

A finished reply's keys stay in its row until somebody else moves in. Requests of one slot whose prompts begin alike
(the examples of a few-shot prompt, a conversation's earlier turns) compute that beginning once: the later ones copy its
keys from a reply that has them, or wait a step for one that is about to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.engine.cache import RowCache
from luthier.engine.reply_text import ReplyText
from luthier.engine.request import Request, TokenLogprob

MIN_SHARED_TOKENS = 32
"""A shorter common beginning is cheaper to compute again than to keep track of."""


@dataclass(slots=True, eq=False)
class Reply:
    """A request that is being answered.

    Attributes:
        num_cached: How many of the sequence's first tokens have their keys in the row.
        is_long: The LongRoPE class that those keys were (or will be) computed in.
        row: Its row of the cache.
        lender: The reply whose first `num_lent` keys this one waits to copy.
        fed_at: The step that last brought it forward.
    """

    request: Request
    text: ReplyText
    is_long: bool = False
    row: int = -1
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached: int = 0
    lender: Reply | None = None
    num_lent: int = 0
    fed_at: int = 0
    is_active: bool = True

    @property
    def num_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.generated)

    @property
    def last_token(self) -> int:
        return self.generated[-1] if self.generated else int(self.request.tokens[-1])

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """Tokens [start, end) of prompt and reply."""
        if start >= self.num_prompt:
            return np.array(self.generated[start - self.num_prompt : end - self.num_prompt], dtype=np.int32)
        return np.concatenate([self.request.tokens, np.array(self.generated, dtype=np.int32)])[start:end]


class Rows:
    """The rows of `cache` and who sits there."""

    def __init__(self, cache: RowCache, *, lends: bool) -> None:
        self.cache = cache
        self.lends = lends
        self._last: list[Reply | None] = []  # each row's last reply, active or not

    def place(self, reply: Reply) -> None:
        """Give `reply` a row, with what keys another can lend it."""
        if self.lends:
            self._find_lender(reply)
        lender = reply.lender
        if lender is not None and not lender.is_active:  # its row is free: go on where it stands
            reply.row, reply.num_cached, reply.lender = lender.row, reply.num_lent, None
        else:
            reply.row = self._free_row()
        if reply.row == len(self._last):
            self._last.append(None)
        self._last[reply.row] = reply
        self._copy_lent(reply)

    def lend(self, replies: Iterable[Reply]) -> None:
        """Copy the keys that replies wait for, where they are there by now."""
        for reply in replies:
            self._copy_lent(reply)

    def compact(self) -> None:
        """Move replies from the last rows into free ones: a forward computes over every row up to the last in use."""
        for row in range(len(self._last) - 1, -1, -1):
            reply = self._last[row]
            if reply is None or not reply.is_active:
                continue
            free = self._free_row()
            if free > row:
                return
            if reply.num_cached:
                self.cache.copy(row, free, reply.num_cached)
            self._last[row], self._last[free], reply.row = None, reply, free

    def clear(self) -> None:
        """Forget everything and give the cache's memory back."""
        self._last.clear()
        self.cache.clear()

    def _free_row(self) -> int:
        taken = (reply is not None and reply.is_active for reply in self._last)
        return next((row for row, is_taken in enumerate(taken) if not is_taken), len(self._last))

    def _find_lender(self, reply: Reply) -> None:
        """The reply, finished or not, whose keys can serve the longest beginning of this one's prompt."""
        now: tuple[int, Reply | None] = (0, None)
        soon: tuple[int, Reply | None] = (0, None)
        for other in self._last:
            if other is None or other.request.slot != reply.request.slot or other.is_long != reply.is_long:
                continue
            num_shared = _num_common(reply.request.tokens, other.tokens(0, other.num_tokens))
            num_shared = min(num_shared, reply.num_prompt - 1)  # the last token must run, for its logits
            now = max(now, (min(num_shared, other.num_cached), other), key=_length)
            # Only one that computes its prompt itself, so that nobody waits for one who waits.
            if other.is_active and other.lender is None:
                soon = max(soon, (num_shared, other), key=_length)
        reply.num_lent, reply.lender = soon if soon[0] - now[0] >= MIN_SHARED_TOKENS else now
        if reply.num_lent < MIN_SHARED_TOKENS:
            reply.lender = None

    def _copy_lent(self, reply: Reply) -> None:
        lender = reply.lender
        if lender is None:
            return
        fits = lender.is_long == reply.is_long
        if fits and lender.num_cached >= reply.num_lent:
            self.cache.copy(lender.row, reply.row, reply.num_lent)
            reply.num_cached, reply.lender = reply.num_lent, None
        elif not fits or not lender.is_active:  # it left too soon: do without
            reply.lender = None


def _num_common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _length(pair: tuple[int, Reply | None]) -> int:
    return pair[0]
