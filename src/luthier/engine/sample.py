"""Sampling: replies to many requests at once, for any slots, on the resident base.

    sampler = Sampler(base, decode)
    sampler.submit(Request("a", tokens, slot.index, SamplingParams(max_new_tokens=64)))
    while sampler.has_work:
        for event in sampler.step():
            print(event.text_delta, end="")

Batching is continuous: a step is one forward with a new token of every request that is being answered and the prompts
(or parts of them) of those that just came in; requests come and go between steps. Company changes no reply: each row
has its own keys, its own slot and its own draws.

A base that cannot run packed has no cache: each step runs the whole sequences again, which is right and slow.

Shapes: P sequences that get a token in this step, D hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.base.load import Base
from luthier.engine.cache import RowCache
from luthier.engine.choose import Choice, choose
from luthier.engine.pack import BASE_SLOT, PackedBatch, PackItem, pack, segments_of
from luthier.engine.reply_graphs import build_reply_graphs
from luthier.engine.reply_text import Decode, ReplyText
from luthier.engine.request import (
    Completion,
    FinishReason,
    Request,
    SamplingError,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    check_prompt,
)
from luthier.engine.rows import Reply, Rows
from luthier.engine.waiting import Waiting
from luthier.ops.product import forward_product
from luthier.types import Example

__all__ = ["Completion", "Request", "Sampler", "SamplingError", "SamplingParams", "TokenEvent", "TokenLogprob"]

MAX_ROWS = 64
"""Requests answered at a time, unless the caller says otherwise."""


@dataclass(frozen=True, slots=True)
class _Feed:
    """Tokens [start, end) of a reply's sequence, to go through the base."""

    reply: Reply
    start: int
    end: int

    @property
    def wants_token(self) -> bool:
        return self.end == self.reply.num_tokens

    @property
    def is_next_token(self) -> bool:
        """Whether it is the sequence's last token, and all before it are stored."""
        return 0 < self.start == self.end - 1 and self.wants_token


class Sampler:
    """Answers requests on `base`.

    Args:
        base: The resident base; requests name slots of its bank. A slot must not train while it is sampled from (take a
            snapshot for that).
        decode: Token ids -> text, without special tokens.
        max_rows: Most requests answered at a time; the others wait, the slots taking turns.
        max_prefill_tokens: Most prompt tokens in one forward; longer prompts come in parts.
        remembers: Keep the keys of finished replies while there is nothing to do, so that a conversation's next turn
            computes only what is new. Only for slots that do not change at all. Otherwise an idle sampler holds no
            memory.
    """

    def __init__(
        self,
        base: Base,
        decode: Decode,
        max_rows: int = MAX_ROWS,
        max_prefill_tokens: int = 4096,
        *,
        remembers: bool = False,
    ) -> None:
        if max_rows < 1 or max_prefill_tokens < 1:
            raise ValueError("max_rows and max_prefill_tokens are at least 1")
        self.base = base
        self.decode = decode
        self.max_rows = max_rows
        self.max_prefill_tokens = max_prefill_tokens
        self.remembers = remembers
        self._rows = Rows(RowCache(), lends=base.is_packed)
        self._graphs = build_reply_graphs(base, self._rows.cache)
        self._max_positions = base.max_positions
        self._waiting: Waiting[Request] = Waiting()
        self._active: dict[str, Reply] = {}  # in the order of admission
        self._cancelled: list[TokenEvent] = []
        self._num_steps = 0

    # -- requests

    def submit(self, request: Request) -> None:
        """Take a request in; it is answered from the next step on.

        Raises:
            SamplingError: for a prompt that is empty, too long for the base, or of tokens that the slot does not know.
            ValueError: for a name in use, or a slot that is not in the bank.
        """
        if request.name in self._active or request.name in self._waiting:
            raise ValueError(f"a request named {request.name} is here already")
        if not self._has_slot(request.slot):
            raise ValueError(f"slot {request.slot} is not in the bank")
        check_prompt(self.base, request)
        self._waiting.put(request.name, request.slot, request)

    def cancel(self, name: str, problem: str = "") -> bool:
        """End a request wherever it stands; the next step reports it. False where no such request is here.

        Args:
            problem: The reason, for its completion.
        """
        waiting = self._waiting.take(name)
        reply = Reply(waiting, self._text(waiting)) if waiting is not None else self._active.get(name)
        if reply is None:
            return False
        self._cancelled.append(self._finish(reply, None, "", None, "cancelled", problem))
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting or self._cancelled)

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take now."""
        return self._rows.cache.num_bytes

    def run(
        self,
        requests: Sequence[Request],
        on_progress: Callable[[int, int], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Answer all requests; returns the replies in the order given.

        Args:
            on_progress: Called with the numbers of finished and of all requests, as replies finish.
            between: Called after each step, for callers who have other work to see to.

        Raises:
            SamplingError: for a request that does not hold; none has been answered then.
            ValueError: when the sampler is busy with other requests.
        """
        if self.has_work:
            raise ValueError("this sampler is busy with other requests")
        done: dict[str, Completion] = {}
        try:
            for request in requests:
                self.submit(request)
            while self.has_work:
                finished = [event.completion for event in self.step() if event.completion is not None]
                done |= {completion.name: completion for completion in finished}
                if finished and on_progress is not None:
                    on_progress(len(done), len(requests))
                if between is not None:
                    between()
        finally:
            if self.has_work:
                self._drop_all()
        return [done[request.name] for request in requests]

    # -- one step

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit who waits, run one forward, and choose a token for each sequence that is ready for one."""
        self._num_steps += 1
        self._cancel_orphans()
        self._rows.lend(self._active.values())
        self._admit()
        self._rows.compact()
        events, self._cancelled = self._cancelled, []
        feeds = self._feeds() if self.base.is_packed else self._whole_feeds()
        if feeds:
            # pack() sorts by slot and keeps the order within one; the feeds stay in step with it, and with the rows.
            feeds.sort(key=lambda feed: (feed.reply.request.slot, feed.reply.row))
            logits_PV = self._replay(feeds)
            if logits_PV is None:
                logits_PV = self._forward(feeds)
            ready = [feed.reply for feed in feeds if feed.wants_token]
            if logits_PV is not None:
                logits_PV = _constrained(logits_PV, ready)
                choices = choose(logits_PV, [r.request.params for r in ready], [r.num_tokens for r in ready])
                events += [self._take(reply, choice) for reply, choice in zip(ready, choices, strict=True)]
        if not self.has_work and not self.remembers:
            self._rows.clear()
            if self._graphs is not None:
                self._graphs.clear()
        return events

    def _admit(self) -> None:
        """Give rows to waiting requests; the slot with the fewest rows comes first."""
        num_held = Counter(reply.request.slot for reply in self._active.values())
        limit = self.base.longrope_limit
        while self._waiting and len(self._active) < self.max_rows:
            request = self._waiting.next(num_held)
            is_long = limit is not None and len(request.tokens) > limit
            reply = Reply(request, self._text(request), is_long)
            self._rows.place(reply)
            if self._graphs is not None and not num_held[request.slot]:
                self._graphs.renew(request.slot)
            self._active[request.name] = reply
            num_held[request.slot] += 1

    def _feeds(self) -> list[_Feed]:
        """A token of every reply that is under way, and prompts in order of admission as far as the budget goes."""
        feeds, budget, limit = [], self.max_prefill_tokens, self.base.longrope_limit
        for reply in self._active.values():
            if reply.lender is not None:
                continue
            is_long = limit is not None and reply.num_tokens > limit
            if is_long != reply.is_long:  # LongRoPE's other factors: every key of the sequence changes
                reply.num_cached, reply.is_long = 0, is_long
            num_new = reply.num_tokens - reply.num_cached
            if num_new > 1:
                num_new = min(num_new, budget)
                budget -= num_new
            if num_new:
                feeds.append(_Feed(reply, reply.num_cached, reply.num_cached + num_new))
        return feeds

    def _whole_feeds(self) -> list[_Feed]:
        """Without a cache: whole sequences, those that waited longest first, as many as the padded budget holds."""
        feeds: list[_Feed] = []
        longest = 0
        for reply in sorted(self._active.values(), key=lambda reply: reply.fed_at):
            longest = max(longest, reply.num_tokens)
            if feeds and longest * (len(feeds) + 1) > self.max_prefill_tokens:
                break
            feeds.append(_Feed(reply, 0, reply.num_tokens))
        return feeds

    def _replay(self, feeds: Sequence[_Feed]) -> Tensor | None:
        """Logits [P, V] by a captured step, where every feed is one token; None where there is none for it."""
        if self._graphs is None or not all(feed.is_next_token for feed in feeds):
            return None
        logits_PV = self._graphs.run(
            [feed.reply.request.slot for feed in feeds],
            [feed.reply.last_token for feed in feeds],
            [feed.reply.row for feed in feeds],
            [feed.end for feed in feeds],
        )
        if logits_PV is not None:
            for feed in feeds:
                feed.reply.fed_at, feed.reply.num_cached = self._num_steps, feed.end
        return logits_PV

    def _forward(self, feeds: Sequence[_Feed]) -> Tensor | None:
        """Logits [P, V] of the P feeds that want a token, in their order; None where none does."""
        base = self.base
        batch = self._batch(feeds)
        wanted = [index for index, feed in enumerate(feeds) if feed.wants_token]
        at_P = torch.from_numpy((np.cumsum(batch.lengths) - 1)[wanted]).to(base.device)
        segments = segments_of([feeds[index].reply.request.slot for index in wanted])
        cache = self._rows.cache if base.is_packed else None
        if cache is not None:
            # A prompt that comes in parts has its whole length's LongRoPE class from the first part on.
            cache.begin(
                batch,
                rows=[feed.reply.row for feed in feeds],
                starts=[feed.start for feed in feeds],
                totals=[feed.reply.num_tokens for feed in feeds],
            )
        routing = dataclasses.replace(base.routing(batch, training=False), head_segments=segments)
        with base.bank.routed(routing):
            result = base.forward(batch, keep=at_P if wanted else None, cache=cache)
        for feed in feeds:
            feed.reply.fed_at = self._num_steps
            feed.reply.num_cached = feed.end if cache is not None else 0
        if not wanted:
            return None
        if result.logits_PV is not None:
            return result.logits_PV
        hidden_PD = result.hidden_TD[at_P]
        if base.bank.head_is_plain_for(segments):
            return forward_product(hidden_PD, base.head_weight_VD, base.head_bias_V)
        return base.logits(hidden_PD, segments)

    def _batch(self, feeds: Sequence[_Feed]) -> PackedBatch:
        items = []
        for feed in feeds:
            tokens = feed.reply.tokens(feed.start, feed.end)
            items.append(PackItem(Example(tokens, np.zeros(len(tokens), np.float32)), feed.reply.request.slot))
        batch = pack(items, self.base.device)
        starts_T = torch.from_numpy(np.repeat([feed.start for feed in feeds], batch.lengths))
        return dataclasses.replace(batch, positions_T=batch.positions_T + starts_T.to(self.base.device))

    # -- replies

    def _take(self, reply: Reply, choice: Choice) -> TokenEvent:
        """Add the chosen token to the reply, and see whether that ends it."""
        params, most = reply.request.params, self._max_positions
        if not choice.is_finite:
            problem = "the model's logits are not finite: the adapter has diverged, or the base is damaged"
            return self._finish(reply, None, "", None, "cancelled", problem)
        if choice.token in params.stop_ids:
            return self._finish(reply, choice.token, "", choice.logprob, "stop")
        if reply.request.constraint is not None:
            reply.request.constraint.take(choice.token)
        reply.generated.append(choice.token)
        if choice.logprob is not None:
            reply.logprobs.append(choice.logprob)
        delta = reply.text.add(choice.token)
        if reply.text.is_stopped:
            return self._finish(reply, choice.token, delta, choice.logprob, "stop")
        if len(reply.generated) >= params.max_new_tokens or (most is not None and reply.num_tokens >= most):
            return self._finish(reply, choice.token, delta, choice.logprob, "length")
        return TokenEvent(reply.request.name, choice.token, delta, choice.logprob)

    def _finish(
        self,
        reply: Reply,
        token: int | None,
        delta: str,
        logprob: TokenLogprob | None,
        reason: FinishReason,
        problem: str = "",
    ) -> TokenEvent:
        request = reply.request
        delta += reply.text.finish()
        reply.is_active = False
        self._active.pop(request.name, None)
        logprobs = None if request.params.num_logprobs is None else tuple(reply.logprobs)
        completion = Completion(
            request.name, tuple(reply.generated), reply.text.text, reason, logprobs, reply.num_prompt, problem
        )
        return TokenEvent(request.name, token, delta, logprob, reason, completion)

    def _text(self, request: Request) -> ReplyText:
        return ReplyText(request.decode or self.decode, request.params.stop_strings)

    def _has_slot(self, slot: int) -> bool:
        return slot == BASE_SLOT or slot in self.base.bank.slots

    def _cancel_orphans(self) -> None:
        """Requests whose slot has left the bank: the base must not answer in its place."""
        slots = {reply.request.slot for reply in self._active.values()} | set(self._waiting.slots())
        for slot in sorted(slots):
            if not self._has_slot(slot):
                active = [name for name, reply in self._active.items() if reply.request.slot == slot]
                for name in [*active, *self._waiting.names(slot)]:
                    self.cancel(name, f"slot {slot} has left the bank")

    def _drop_all(self) -> None:
        for name in self._waiting.names():
            self._waiting.take(name)
        self._active.clear()
        self._cancelled.clear()
        self._rows.clear()


def _constrained(logits_PV: Tensor, replies: Sequence[Reply]) -> Tensor:
    """The logits with what constraints forbid at minus infinity."""
    bound = [(row, reply.request.constraint) for row, reply in enumerate(replies) if reply.request.constraint]
    if not bound:
        return logits_PV
    logits_PV = logits_PV.clone()
    for row, constraint in bound:
        assert constraint is not None
        allowed_V = constraint.allowed_V().to(logits_PV.device)
        logits_PV[row, : len(allowed_V)].masked_fill_(~allowed_V, float("-inf"))
        logits_PV[row, len(allowed_V) :] = float("-inf")
    return logits_PV
