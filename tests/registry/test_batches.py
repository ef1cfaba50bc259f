"""A batch's answers come from several writers at once: none may be lost, none counted twice."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

from records import Record

from luthier.registry.batches import Batches

NUM_LINES = 60


def test_answers_from_many_writers_are_all_kept(record: Record) -> None:
    caller = record.caller("a")
    file = record.files.create(caller.tenant, "b.jsonl", "batch", io.BytesIO(b"{}\n"))
    batches = Batches(record.database)
    batch = batches.create(caller.tenant, file.id, "/v1/chat/completions", "24h", {})

    def answer(line: int) -> None:
        for _ in range(2):  # a runner that lost its lease may answer a line that another has answered
            batches.add_answer(batch.id, line, {"line": line}, is_error=line % 3 == 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(answer, range(NUM_LINES)))
    assert batches.done_lines(batch.id) == set(range(NUM_LINES))
    counts = batches.get(caller.tenant, batch.id).counts
    assert (counts["completed"], counts["failed"]) == (40, 20)
