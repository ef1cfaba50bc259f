"""What an operator's machines ask: alive, ready, figures for Prometheus. No key is needed, no tenant is named."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from luthier.registry.placement import live_workers
from luthier.service.auth import ContextDep

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "Not ready."}})
def readyz(context: ContextDep) -> JSONResponse:
    """Database and storage can be used."""
    problems = {
        name: problem
        for name, problem in (("database", context.database.ping()), ("storage", context.blobs.ping()))
        if problem
    }
    # The reasons may hold addresses of the operator's, so they go to the log and only the names are answered.
    body: dict[str, Any] = {"status": "not ready", "failing": sorted(problems)} if problems else {"status": "ready"}
    return JSONResponse(body, 503 if problems else 200)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(context: ContextDep) -> str:
    """This process's counters, and the shared queue."""
    gauges = [("luthier_jobs", {"status": s}, float(n)) for s, n in sorted(context.jobs.queue_length().items())]
    with context.database.reading() as session:
        workers = live_workers(session, None, context.database.now(session))
    held = Counter((worker.base, worker.quantization) for worker in workers)
    for (base, quantization), count in sorted(held.items()):
        gauges.append(("luthier_workers", {"base": base, "quantization": quantization}, float(count)))
    return context.measures.text(gauges)
