"""Runs batches: reads the input line by line, sends each through the same code as a request, writes the answers."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from luthier.registry.problems import RefusedError
from luthier.registry.tenants import Caller
from luthier.service.bodies import ChatCreate, CompletionCreate
from luthier.service.chat import chat_answer, completion_answer
from luthier.service.context import Context
from luthier.service.errors import error_body
from luthier.store.database import new_id, now_seconds
from luthier.store.tables import Batch

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MAX_LINES = 50_000
LEASE_SECONDS = 30.0
NUM_AT_ONCE = 8


class BatchRunner:
    """Claims open batches and answers them. Several processes may run one each; a batch has one runner at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._name = f"runner_{secrets.token_hex(8)}"

    async def run_one(self) -> bool:
        """Run the oldest open batch to its end; False where there is none."""
        batch = await run_in_threadpool(self._context.batches.claim, self._name, LEASE_SECONDS)
        if batch is None:
            return False
        lines, problems = await run_in_threadpool(self._read, batch)
        if problems:
            await run_in_threadpool(self._context.batches.set_status, batch.id, "failed", problems=problems)
            return True
        if batch.status == "validating":
            counts = {"total": len(lines), "completed": 0, "failed": 0}
            await run_in_threadpool(self._context.batches.set_status, batch.id, "in_progress", counts=counts)
        await self._answer_all(batch, lines)
        return True

    def _read(self, batch: Batch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The lines, or what is wrong with them."""
        lines: list[dict[str, Any]] = []
        problems: list[dict[str, Any]] = []
        seen: set[str] = set()
        try:
            file = self._context.files.get(batch.tenant, batch.input_file)
            content = b"".join(self._context.files.pieces(file))
        except RefusedError as error:
            return [], [_problem(None, error.message)]
        for number, raw in enumerate(content.splitlines(), 1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
                custom, url, body = line["custom_id"], line["url"], line["body"]
                if not isinstance(body, dict) or not isinstance(custom, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                problems.append(_problem(number, "Expected {custom_id, method, url, body}."))
            else:
                if url != batch.endpoint:
                    problems.append(_problem(number, f"url is {str(url)[:100]!r}; the batch's is {batch.endpoint!r}."))
                elif custom in seen:
                    problems.append(_problem(number, f"custom_id {custom[:100]!r} stands twice."))
                seen.add(custom)
                lines.append(line)
            if len(problems) >= 50:
                break
        if not lines and not problems:
            problems.append(_problem(None, "The file has no lines."))
        if len(lines) > MAX_LINES:
            problems.append(_problem(None, f"A batch has at most {MAX_LINES:,} lines; found {len(lines):,}."))
        return lines, problems

    async def _answer_all(self, batch: Batch, lines: list[dict[str, Any]]) -> None:
        done = await run_in_threadpool(self._context.batches.done_lines, batch.id)
        todo = iter([(at, line) for at, line in enumerate(lines) if at not in done])
        stopped: list[str] = []

        async def work() -> None:
            for at, line in todo:
                status = await run_in_threadpool(self._context.batches.keep, batch.id, self._name, LEASE_SECONDS)
                if status is None or status == "cancelling" or batch.times["expires_at"] < now_seconds():
                    stopped.append("lost" if status is None else "cancelled" if status == "cancelling" else "expired")
                    return
                answer, is_error = await self._answer(batch, at, line)
                await run_in_threadpool(self._context.batches.add_answer, batch.id, at, answer, is_error)

        # A group, not gather: where one of them fails, the others end before the batch is given to another runner.
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_AT_ONCE):
                group.create_task(work())
        if "lost" not in stopped:
            await run_in_threadpool(self._finish, batch, stopped[0] if stopped else "completed")

    async def _answer(self, batch: Batch, at: int, line: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        request_id = new_id("req_")
        status, body = 200, {}
        try:
            caller = Caller(batch.tenant, "", "", frozenset({"infer"}))
            values = {**line["body"], "stream": False}
            if batch.endpoint == ENDPOINTS[0]:
                checked = ChatCreate.model_validate(values)
                answer = await run_in_threadpool(chat_answer, self._context, caller, checked)
            else:
                plain = CompletionCreate.model_validate(values)
                answer = await run_in_threadpool(completion_answer, self._context, caller, plain)
            answer.billed_as = batch.id, at
            body = await answer.whole()
        except RefusedError as error:
            status, body = error.status, error_body(error)
        except ValidationError as error:
            first = error.errors()[0]
            message = f"Invalid '{'.'.join(map(str, first['loc']))}': {first['msg']}"
            status = 400
            body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        response = {"status_code": status, "request_id": request_id, "body": body}
        answered = {"id": new_id("batch_req_"), "custom_id": line["custom_id"], "response": response, "error": None}
        return answered, status != 200

    def _finish(self, batch: Batch, status: str) -> None:
        files: dict[str, str] = {}
        for name, is_error in (("output_file", False), ("error_file", True)):
            rows = self._context.batches.answers(batch.id, is_error)
            if rows:
                stored = self._context.files.add_result(
                    batch.tenant, f"{batch.id}_{name}.jsonl", "batch_output", _json_lines(rows)
                )
                files[name] = stored.id
        self._context.batches.set_status(batch.id, status, **files)


def _json_lines(rows: list[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _problem(line: int | None, message: str) -> dict[str, Any]:
    return {"code": "invalid_request", "line": line, "message": message, "param": None}
