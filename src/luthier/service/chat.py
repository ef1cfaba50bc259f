"""Chat and plain completions: from a checked body to a worker's reply, whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anyio
from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool

from luthier.registry.models import Servable, no_such_model
from luthier.registry.problems import InvalidRequestError, RefusedError
from luthier.registry.seam import SampleEvent, SampleRequest
from luthier.registry.tenants import Caller
from luthier.service.bodies import ChatCreate, CompletionCreate, Sampling
from luthier.service.context import Context
from luthier.service.errors import error_body
from luthier.service.tool_calls import Piece, ToolCallReader
from luthier.store.database import new_id
from luthier.store.held_base import HeldBase
from luthier.tasks.config import TaskConfig
from luthier.tasks.registry import head_of, task_for

_TASK: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)


@dataclass
class Reply:
    """One choice as it grows."""

    reader: ToolCallReader | None
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    has_role: bool = False

    def take(self, event: SampleEvent) -> list[Piece]:
        """Add an event; the pieces that became certain with it."""
        self.num_tokens = event.num_tokens or self.num_tokens
        self.num_prompt_tokens = event.num_prompt_tokens or self.num_prompt_tokens
        self.logprobs += event.logprobs or []
        if self.reader is None:
            pieces = [Piece(text=event.text)] if event.text else []
        else:
            pieces = self.reader.add(event.text)
            if event.finish_reason is not None:
                pieces += self.reader.finish()
        for piece in pieces:
            if piece.call is not None:
                self.calls.append(piece.call)
            self.text += piece.text
        if event.finish_reason is not None:
            self.finish_reason = "tool_calls" if self.calls else event.finish_reason
        return pieces


class Answering:
    """One request on its way. Make it with `chat_answer` or `completion_answers`; then `whole()` or `stream()`."""

    def __init__(
        self, context: Context, caller: Caller, model: Servable, request: SampleRequest, form: ChatForm | TextForm
    ) -> None:
        self._context, self._caller = context, caller
        self._model, self._request, self._form = model, request, form
        self.billed_as: tuple[str, int] = request.id, 0
        """What it is billed under, once: the request, or a batch and its line."""
        self.replies = [
            Reply(ToolCallReader(form.max_calls) if form.reads_calls else None) for _ in range(request.num_choices)
        ]
        self.created = int(time.time())
        self.problem: RefusedError | None = None

    async def _events(self) -> AsyncIterator[tuple[int, list[Piece], SampleEvent]]:
        """Events with the pieces they made certain; what was used is billed when they end, however they end."""
        refuse = self._context.content_filter.problem
        is_open = [True] * len(self.replies)
        try:
            async with aclosing(self._context.dispatcher.sample(self._model.base, self._request)) as events:  # type: ignore[type-var]
                async for event in events:
                    reply = self.replies[event.choice]
                    if not is_open[event.choice]:
                        continue
                    before = reply.text
                    pieces = reply.take(event)
                    if pieces and refuse(reply.text):
                        reply.text, reply.finish_reason = before, "content_filter"
                        pieces, is_open[event.choice] = [], False
                    yield event.choice, pieces, event
        finally:
            with anyio.CancelScope(shield=True):  # a caller that goes away cancels all that is awaited
                await run_in_threadpool(self._bill)

    def _bill(self) -> None:
        prompt = max(reply.num_prompt_tokens for reply in self.replies)
        generated = sum(reply.num_tokens for reply in self.replies)
        self._context.measures.count_tokens("prompt", prompt)
        self._context.measures.count_tokens("generated", generated)
        self._context.usage.record_request(
            tenant=self._caller.tenant,
            request=self.billed_as[0],
            line=self.billed_as[1],
            base=self._model.base.name,
            model=self._model.name,
            num_prompt_tokens=prompt,
            num_tokens=generated,
        )

    @property
    def usage(self) -> dict[str, int]:
        prompt = max(reply.num_prompt_tokens for reply in self.replies)
        generated = sum(reply.num_tokens for reply in self.replies)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    async def finish(self) -> None:
        """Wait for the whole reply."""
        async for _ in self._events():
            pass

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        await self.finish()
        choices = [self._form.choice(index, reply) for index, reply in enumerate(self.replies)]
        return {**self._head(self._form.object), "choices": choices, "usage": self.usage}

    async def stream(self, wants_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error after the first byte comes as an event of its own."""
        more = {"usage": None} if wants_usage else {}
        try:
            async with aclosing(self._events()) as events:  # type: ignore[type-var]
                async for index, pieces, event in events:
                    reply = self.replies[index]
                    for choice in self._form.deltas(index, reply, pieces, event):
                        yield _sse({**self._head(self._form.chunk), "choices": [choice], **more})
            if wants_usage:
                yield _sse({**self._head(self._form.chunk), "choices": [], "usage": self.usage})
            yield b"data: [DONE]\n\n"
        except RefusedError as error:
            self.problem = error
            yield _sse(error_body(error))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._request.id, "object": kind, "created": self.created, "model": self._model.name}


class ChatForm:
    """How a chat answer looks."""

    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, has_tools: bool, wants_logprobs: bool, max_calls: int | None = None) -> None:
        self.reads_calls = has_tools
        self.max_calls = max_calls
        self.wants_logprobs = wants_logprobs

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.calls:
            message |= {"content": reply.text or None, "tool_calls": reply.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": reply.finish_reason or "stop",
        }

    def deltas(self, index: int, reply: Reply, pieces: list[Piece], event: SampleEvent) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        logprobs = self._logprobs(event.logprobs or [])
        if not reply.has_role:
            reply.has_role = True
            made.append({"role": "assistant", "content": ""})
        first_call = len(reply.calls) - sum(piece.call is not None for piece in pieces)
        for piece in pieces:
            if piece.call is not None:
                made.append({"tool_calls": [{"index": first_call, **piece.call}]})
                first_call += 1
            else:
                made.append({"content": piece.text})
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in made
        ]
        if logprobs is not None and event.logprobs:
            if len(made) == 0 or "content" not in made[-1]:
                choices.append({"index": index, "delta": {"content": ""}, "logprobs": None, "finish_reason": None})
            choices[-1]["logprobs"] = logprobs
        if reply.finish_reason is not None and (event.finish_reason or reply.finish_reason == "content_filter"):
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reply.finish_reason})
        return choices

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [{**_entry(entry), "top_logprobs": [_entry(top) for top in entry["top"]]} for entry in entries]
        return {"content": content, "refusal": None}


class TextForm:
    """How a plain completion looks."""

    object = "text_completion"
    chunk = "text_completion"
    reads_calls = False
    max_calls: int | None = None

    def __init__(self, wants_logprobs: bool) -> None:
        self.wants_logprobs = wants_logprobs

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        return {
            "index": index,
            "text": reply.text,
            "logprobs": self._logprobs(reply.logprobs, 0),
            "finish_reason": reply.finish_reason or "stop",
        }

    def deltas(self, index: int, reply: Reply, pieces: list[Piece], event: SampleEvent) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in pieces)
        ends = event.finish_reason is not None or reply.finish_reason == "content_filter"
        if not text and not ends and not event.logprobs:
            return []
        logprobs = self._logprobs(event.logprobs or [], len(reply.text) - len(text))
        reason = reply.finish_reason if ends else None
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]

    def _logprobs(self, entries: list[dict[str, Any]], offset: int) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top"]} for entry in entries],
            "text_offset": offsets,
        }


def find_model(context: Context, caller: Caller, name: str) -> Servable:
    """The base or tuned model that a request names.

    Raises:
        MissingError: where the caller has no such model.
    """
    if context.bases.find(name) is not None:
        return Servable(name, HeldBase(name), None, None)
    if not name.startswith("ft:"):
        raise no_such_model(name)
    return context.models.find(caller.tenant, name)


def chat_answer(context: Context, caller: Caller, body: ChatCreate) -> Answering:
    """A chat request, checked.

    Raises:
        RefusedError: for what does not hold.
    """
    model = _writing_model(context, caller, body.model)
    filter_prompt(context, json.dumps([message.get("content") for message in body.messages], ensure_ascii=False))
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
    for at, message in enumerate(body.messages):
        if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise InvalidRequestError(
                f"messages[{at}].role is one of system, developer, user, assistant and tool.",
                param=f"messages[{at}].role",
            )
    grammar = _chat_grammar(body)
    tools = body.tools if body.tool_choice != "none" else None
    request = _request(
        body,
        model,
        "chatcmpl-",
        messages=body.messages,
        tools=tools or None,
        grammar=grammar,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    max_calls = 1 if body.parallel_tool_calls is False else None
    return Answering(context, caller, model, request, ChatForm(bool(tools), bool(body.logprobs), max_calls))


def completion_answer(context: Context, caller: Caller, body: CompletionCreate) -> Answering:
    """A plain completion, checked. One prompt a request.

    Raises:
        RefusedError: for what does not hold.
    """
    model = _writing_model(context, caller, body.model)
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise InvalidRequestError("One prompt a request is served; send a request each.", param="prompt")
        prompt = prompt[0]
    if len(prompt) == 0:
        raise InvalidRequestError("prompt is empty.", param="prompt")
    if isinstance(prompt, str):
        filter_prompt(context, prompt)
    request = _request(
        body, model, "cmpl-", prompt=prompt, max_tokens=body.max_tokens or 16, num_logprobs=body.logprobs
    )
    return Answering(context, caller, model, request, TextForm(body.logprobs is not None))


def _writing_model(context: Context, caller: Caller, name: str) -> Servable:
    model = find_model(context, caller, name)
    if model.task is not None and head_of(task_for(_TASK.validate_python(model.task))) is not None:
        raise InvalidRequestError(
            f"{name} is a {model.task['type']} model, which does not write; ask it over /v1/luthier/predict.",
            param="model",
        )
    return model


def filter_prompt(context: Context, text: str) -> None:
    """Ask the content filter about what came in.

    Raises:
        InvalidRequestError: where it is not let through.
    """
    if problem := context.content_filter.problem(text):
        raise InvalidRequestError(problem, code="content_filter")


def _request(body: Sampling, model: Servable, prefix: str, **values: Any) -> SampleRequest:
    seed = body.seed if body.seed is not None else int.from_bytes(new_id("", 8).encode(), "big")
    return SampleRequest(
        id=new_id(prefix),
        adapter=model.adapter,
        num_choices=body.n or 1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed % 2**63,
        stop=body.stop_texts,
        **values,
    )


def _chat_grammar(body: ChatCreate) -> dict[str, Any] | None:
    """What the reply must obey, from `response_format` and `tool_choice`."""
    choice = body.tool_choice
    if choice in ("required",) or isinstance(choice, dict):
        return {"tools": _forced_tools(body)}
    form = body.response_format
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"json_object": True}
    if form.get("type") == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise InvalidRequestError(
                "response_format.json_schema.schema is a JSON schema.", param="response_format.json_schema.schema"
            )
        return {"json_schema": schema}
    raise InvalidRequestError("response_format.type is text, json_object or json_schema.", param="response_format.type")


def _forced_tools(body: ChatCreate) -> list[dict[str, Any]]:
    functions = [tool.get("function") for tool in body.tools or []]
    if not functions or not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise InvalidRequestError("tool_choice needs tools of type function, each with a name.", param="tools")
    if isinstance(body.tool_choice, dict):
        name = (body.tool_choice.get("function") or {}).get("name")
        functions = [f for f in functions if f and f["name"] == name]
        if not functions:
            raise InvalidRequestError(
                f"tool_choice names {str(name)[:80]!r}, which is no tool here.", param="tool_choice"
            )
    return [f for f in functions if f is not None]


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "bytes": entry["bytes"], "logprob": entry["logprob"]}


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
