"""A reply's text as it grows, token by token: whole characters, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are not a whole character


class ReplyText:
    """Turns tokens into text deltas; their concatenation is `text`.

    Args:
        decode: Token ids -> text, without special tokens.
        stop_strings: The text ends before the first of them that appears.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str]) -> None:
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._tokens: list[int] = []
        # Decoding starts a little before what is new, for some decoders write a token's leading space only in company.
        self._context = 0
        self._done = 0
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is now certain, often an empty string."""
        self._tokens.append(token)
        return self._emit(self._new_text(is_last=False), is_last=False)

    def finish(self) -> str:
        """The reply is over: whatever was held back."""
        return "" if self.is_stopped else self._emit(self._new_text(is_last=True), is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        before = self._decode(self._tokens[self._context : self._done])
        after = self._decode(self._tokens[self._context :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not is_last):
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return after[len(before) :]

    def _emit(self, new: str, *, is_last: bool) -> str:
        pending = self._held + new
        found = [at for at in (pending.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.is_stopped = True
            delta, self._held = pending[: min(found)], ""
        else:
            kept = 0 if is_last else self._num_held(pending)
            delta, self._held = pending[: len(pending) - kept], pending[len(pending) - kept :]
        self.text += delta
        return delta

    def _num_held(self, pending: str) -> int:
        """Length of the longest end of `pending` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        ends = (pending[-size:] for size in range(min(longest, len(pending)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop_strings)), 0)
