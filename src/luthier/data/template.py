"""One renderer for training and for serving: the tokenizer and the chat template of a base.

It is loaded from the base's folder, saved with the adapter, and loaded from there again to chat, so that what a model
was trained on and what it is asked are the same tokens.

BOS exactly once: `encode` never adds any. Chat text holds the BOS that its template writes, and no other, as in
transformers' `apply_chat_template(tokenize=True)`. Raw text begins with `bos_id` where the tokenizer itself adds one.
An encoder's text ends with `sep_id` too, and likewise once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

from luthier.data import masks
from luthier.data.chat_template import render_template
from luthier.data.rows import RowError
from luthier.data.tokenizer import TokenizerFiles, read_tokenizer, write_tokenizer
from luthier.errors import ModelError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

_PROBE_REPLY = "Probe reply 7"
_PROBE = ({"role": "user", "content": "Probe question 3"}, {"role": "assistant", "content": _PROBE_REPLY})
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "Probe.", "parameters": {"type": "object", "properties": {}}},
}

_MAX_PIECES, _MAX_PIECE_CHARACTERS = 2048, 8192
"""How much of encoded conversations is remembered: 16 MB of text at most, and far less in practice."""


class Renderer:
    """The tokenizer and chat template of one base. Make it with `Renderer.load`."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._tokenizer = files.tokenizer
        self._templates = dict(files.templates)
        self._pieces: dict[tuple[str, str], list[int]] = {}

    @classmethod
    def load(cls, folder: Path | str, new_tokens: Sequence[str] = ()) -> Renderer:
        """Read tokenizer.json, its settings and the chat template from a model's or an adapter's folder.

        Args:
            folder: Holds tokenizer.json; tokenizer_config.json, special_tokens_map.json, generation_config.json,
                config.json and chat_template.jinja are read where they are there.
            new_tokens: Tokens to add where the tokenizer does not know them yet.

        Raises:
            ModelError: where tokenizer.json is missing or a file does not hold what its name says.
        """
        files = read_tokenizer(Path(folder))
        for token in new_tokens:
            if not token.strip():
                raise ModelError(f"the new token {token!r} is blank", "a text with visible characters")
            if files.tokenizer.token_to_id(token) is None:
                files.tokenizer.add_tokens([AddedToken(token, normalized=False)])
        return cls(files)

    def save(self, folder: Path | str) -> None:
        """Write everything that `load` reads, in the form that transformers' AutoTokenizer reads too.

        A base whose template knows no tools is given one that does as `additional_chat_templates/tool_use.jinja`, which
        transformers takes where a request has tools; its own template stays as it is.

        Raises:
            StorageError: where writing fails; files that were there before are then still whole.
        """
        files = self._files
        write_tokenizer(Path(folder), replace(files, templates=self._all_templates), self.stop_ids)

    # Tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in it are recognized; none is added.

        Raises:
            RowError: where the text holds half of a surrogate pair, which no encoding knows.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            broken = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
            if broken is None:
                raise
            raise RowError(
                "",
                f"the text holds {broken!r}, half of a character",
                "whole characters",
                "write the character itself, or both halves of its \\u escape",
            ) from None

    def encode_with_bounds(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, with the characters [start, end) of the text that each token stands for.

        A token that is part of a character stands for the whole of it; a space before a word may belong to its token.
        """
        ids = self.encode(text)
        return ids, [
            (int(start), int(end)) for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets
        ]

    def encode_rendered(self, text: str) -> list[int]:
        """`encode`, faster on a conversation whose beginning was encoded before, as when rendering turn by turn.

        A token that ends a turn separates what stands before it from what stands after, so the pieces between two such
        tokens are encoded each with the one before it, and remembered.
        """
        if self._border is None:
            return self.encode(text)
        ids: list[int] = []
        before, start = "", 0
        for match in self._border.finditer(text):
            ids += self._encode_piece(before, text[start : match.end()])
            before, start = match.group(), match.end()
        return ids + self._encode_piece(before, text[start:])

    def tokenizer_json(self) -> str:
        """The tokenizer in the form of tokenizer.json, added tokens included."""
        return str(self._tokenizer.to_str())

    def decode(self, ids: Sequence[int] | NDArray[np.int32], skip_special: bool = True) -> str:
        """The text of token ids, without special tokens unless `skip_special` is False."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def continuation(self, prompt: str, prompt_ids: Sequence[int], reply: str) -> list[int]:
        """Token ids of `reply` as they follow `prompt` when the prompt was tokenized alone, as serving does.

        Where tokenizing the whole leaves the prompt's tokens as they are, the reply's tokens are the rest. Where a
        token would straddle the border, the reply is tokenized by itself: a served model never sees such a token.
        """
        whole = self.encode_rendered(prompt + reply)
        if whole[: len(prompt_ids)] == list(prompt_ids):
            return whole[len(prompt_ids) :]
        # Some tokenizers put a space before whatever text comes first. An anchor in front takes that space; it is
        # usable when its own tokens do not merge with the reply's.
        for anchor in ("\n", ":", "."):
            anchor_ids = self.encode(anchor)
            anchored = self.encode(anchor + reply)
            if anchored[: len(anchor_ids)] == anchor_ids:
                return anchored[len(anchor_ids) :]
        return self.encode(reply)

    def token_id(self, token: str) -> int:
        """The id of one token.

        Raises:
            ModelError: where the tokenizer does not know it.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"the tokenizer does not know the token {token!r}",
                "a token of the base",
                "add it under `new_tokens` in the recipe's method",
            )
        return int(found)

    def token_id_of(self, name: str) -> int | None:
        """The id of a named special token such as "bos_token", or None where the tokenizer names none."""
        text = self._files.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included. A base's embedding may have more rows than this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The token that this tokenizer itself puts before a plain text, or None where it puts none."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        return int(full[0]) if len(full) > len(bare) and full[: len(bare)] != bare else None

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids behind `bos_id`, where this tokenizer puts one; it never stands twice."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def between(self, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
        """What stands before a text, the text's own tokens, and what stands behind it; nothing of it stands twice."""
        first = [] if self.bos_id is None else [self.bos_id]
        last = [] if self.sep_id is None else [self.sep_id]
        start = len(first) if first and ids[:1] == first else 0
        end = len(ids) - 1 if last and ids[start:][-1:] == last else len(ids)
        return first, ids[start:end], last

    @functools.cached_property
    def sep_id(self) -> int | None:
        """The token that an encoder's tokenizer puts behind a text, as `bos_id` before it; None for other bases.

        An encoder's is known by naming a `cls_token` and a `sep_token`, and putting the one before a text and the other
        behind it.
        """
        cls, sep = self.token_id_of("cls_token"), self.token_id_of("sep_token")
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        return sep if cls is not None and sep is not None and (full[0], full[-1]) == (cls, sep) else None

    def longest(self, max_length: int) -> int:
        """`max_length`, or what an encoder has positions for where that is less."""
        most = self._files.settings.get("model_max_length")
        if self.sep_id is None or not isinstance(most, int):
            return max_length
        return min(max_length, most)

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None where the base names none."""
        named = self.token_id_of("eos_token")
        return named if named is not None else next(iter(self._files.eos_ids), None)

    def require_eos_id(self) -> int:
        """`eos_id`, for those who cannot do without.

        Raises:
            ModelError: where the base names none.
        """
        if self.eos_id is None:
            raise ModelError(
                "the base names no token that ends a text, so a tuned model would never stop",
                "eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
                "name it in one of these files of the base",
            )
        return self.eos_id

    @property
    def pad_id(self) -> int:
        """The padding token: the tokenizer's own, else config.json's, else EOS, else 0. It never carries loss."""
        candidates = (self.token_id_of("pad_token"), self._files.pad_id, self.eos_id, 0)
        return next(candidate for candidate in candidates if candidate is not None)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: EOS, those of generation_config.json, and the template's end of turn."""
        ids = [self.token_id_of("eos_token"), *self._files.eos_ids, self._end_of_turn]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @functools.cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop ids as they stand in rendered text."""
        return tuple(text for i in self.stop_ids if (text := self._tokenizer.id_to_token(i)))

    @functools.cached_property
    def _border(self) -> re.Pattern[str] | None:
        """Matches the stop tokens that surely part a text in two: no other token can share a character with them."""
        added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}

        def parts(stop: str) -> bool:
            token = added.get(stop)
            others = [other for other in added if other and other != stop]
            return (
                token is not None
                and not (token.normalized or token.single_word)
                and not any(stop in other or _overlaps(other, stop) or _overlaps(stop, other) for other in others)
            )

        stops = [re.escape(stop) for stop in self.stop_texts if parts(stop)]
        return re.compile("|".join(stops)) if stops else None

    def _encode_piece(self, before: str, piece: str) -> list[int]:
        found = self._pieces.get((before, piece))
        if found is None:
            found = self.encode(before + piece)[1 if before else 0 :]
            if len(self._pieces) >= _MAX_PIECES:
                self._pieces.clear()
            if len(piece) <= _MAX_PIECE_CHARACTERS:
                self._pieces[before, piece] = found
        return found

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The token that ends an assistant's turn, as text: the template's own, else EOS."""
        stop = self._end_of_turn if self._end_of_turn is not None else self.eos_id
        return None if stop is None else self._tokenizer.id_to_token(stop)

    @property
    def end_of_turn_id(self) -> int:
        """The id of `end_of_turn`; errors as `require_eos_id`."""
        return self._end_of_turn if self._end_of_turn is not None else self.require_eos_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides which tokens a row becomes."""
        parts = [self._tokenizer.to_str(), self._all_templates, self._files.special_tokens, self.stop_ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # Chat

    @property
    def can_chat(self) -> bool:
        """Whether the base has a chat template."""
        return bool(self._templates)

    def render_chat(self, messages: Messages, tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` writes it.

        Raises:
            ModelError: where the base has no chat template.
            RowError: where the template refuses the conversation (kind "template").
        """
        source = self._template_for(tools)
        if not tools and self._tool_use and any(m.get("tool_calls") or m.get("role") == "tool" for m in messages):
            raise RowError(
                "tools",
                "the conversation calls functions but brings no `tools`",
                "the functions that may be called, for this base's chat template knows none by itself",
                "give the row its `tools`, or write the calls as plain text into `content`",
                kind="template",
            )
        return render_template(source, messages, tools, add_generation_prompt, self._files.special_tokens)

    def chat_prompt(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Tokens of a conversation that the assistant is to go on with. Raises as `render_chat` does."""
        return self.encode_rendered(self.render_chat(messages, tools, add_generation_prompt=True))

    def chat_examples(
        self, messages: Messages, tools: Tools = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """The conversation as training sequences, with a loss weight a token; see `luthier.data.masks`.

        Args:
            messages: Turns; an assistant's turn may carry `weight` (a float, 1 by default, 0 for no loss).
            tools: Function schemas, or None.

        Returns:
            (tokens int32 [length], weights float32 [length]) a sequence; several where the template rewrites earlier
            turns. Weights are unshifted: `weights[i]` belongs to `tokens[i]`.

        Raises:
            ModelError: where the base has no chat template.
            RowError: where the template refuses the conversation or leaves a reply out (kind "template").
        """
        return masks.chat_examples(self, messages, tools)

    def chat_turn(self, messages: Messages, index: int, tools: Tools = None) -> masks.Turn:
        """The assistant's turn `messages[index]` as prompt and reply. Raises as `chat_examples` does."""
        return masks.turn_at(self, messages, index, tools)

    def _template_for(self, tools: Tools) -> str:
        if tools is not None:
            if "tool_use" in self._templates:
                return self._templates["tool_use"]
            if self._tool_use:
                return self._tool_use
        if "default" in self._templates:
            return self._templates["default"]
        names = ", ".join(sorted(self._templates))
        raise ModelError(
            f"the base has chat templates ({names}) but none is the default"
            if names
            else "the base has no chat template",
            "chat_template.jinja beside tokenizer.json, or chat_template in tokenizer_config.json",
            "choose an instruct base, put a chat_template.jinja into the base's folder, or use `task: completion`",
        )

    @property
    def _all_templates(self) -> dict[str, str]:
        return {**self._templates, **({"tool_use": self._tool_use} if self._tool_use else {})}

    @functools.cached_property
    def _tool_use(self) -> str | None:
        """The template for conversations with tools, where the base's own would pass over them without a word."""
        own = self._templates.get("default")
        if own is None or "tool_use" in self._templates:
            return None
        if "probe_tool" in self._try_render(_PROBE, own, tools=(_PROBE_TOOL,)):
            return None
        system = {"role": "system", "content": "Probe system 5"}
        has_system = "Probe system 5" in self._try_render((system, *_PROBE), own)
        prelude = resources.files("luthier.data").joinpath("tool_use.jinja").read_text(encoding="utf-8")
        return prelude.replace("SYSTEM_TURN", "true" if has_system else "false") + own

    @functools.cached_property
    def _end_of_turn(self) -> int | None:
        """The added token that directly follows an assistant's reply, if the template writes one."""
        own = self._templates.get("default")
        if own is None:
            return None
        _, found, tail = self._try_render(_PROBE, own).partition(_PROBE_REPLY)
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.content}
        if not found or not added:
            return None
        longest_first = sorted(added, key=len, reverse=True)
        match = re.match(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")", tail)
        return added[match.group(1)] if match else None

    def _try_render(self, messages: Messages, source: str, tools: Tools = None) -> str:
        """A probe's text; empty where the template refuses the probe, which then tells nothing about it."""
        try:
            return render_template(source, messages, tools, False, self._files.special_tokens)
        except RowError:
            return ""


def _overlaps(left: str, right: str) -> bool:
    """Whether some end of `left` is a beginning of `right`, so that the two could share characters of a text."""
    return any(left.endswith(right[:size]) for size in range(1, len(right)))
