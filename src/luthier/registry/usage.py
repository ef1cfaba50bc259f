"""Usage: every trained and generated token once, what it costs, and what a job will cost.

A row's key is (source, step, kind): a job's step, a request, or a batch's line. Recording it again does nothing, so a
step that is replayed after a crash is billed once. The price of the moment is written into the row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.registry.problems import InvalidRequestError
from luthier.store.database import Database, now_seconds
from luthier.store.tables import Price, Usage

Kind = Literal["trained", "prompt", "generated"]
KINDS: tuple[Kind, ...] = ("trained", "prompt", "generated")
ANY_BASE = "*"
SECONDS_PER_DAY = 86_400


def add_usage(
    session: Session, *, tenant: str, source: str, step: int, kind: Kind, base: str, model: str, num_tokens: int
) -> bool:
    """Record tokens once; False where they are recorded already."""
    if num_tokens <= 0 or session.get(Usage, (source, step, kind)) is not None:
        return False
    now = now_seconds()
    session.add(
        Usage(
            source=source,
            step=step,
            kind=kind,
            tenant=tenant,
            base=base,
            model=model,
            num_tokens=num_tokens,
            price_per_million=price_of(session, base, kind),
            day=now // SECONDS_PER_DAY,
            created_at=now,
        )
    )
    return True


def price_of(session: Session, base: str, kind: Kind) -> float:
    """Price of a million tokens; 0 where none is set."""
    row = session.get(Price, base) or session.get(Price, ANY_BASE)
    return float(getattr(row, kind)) if row is not None else 0.0


def job_cost(session: Session, job: str) -> float:
    """What the job's trained tokens have cost so far."""
    total = select(func.sum(Usage.num_tokens * Usage.price_per_million)).where(
        Usage.source == job, Usage.kind == "trained"
    )
    return round(float(session.scalar(total) or 0.0) / 1e6, 6)


def job_costs(session: Session, jobs: Sequence[str]) -> dict[str, float]:
    """As `job_cost`, for several jobs in one query; a job that cost nothing is 0."""
    query = select(Usage.source, func.sum(Usage.num_tokens * Usage.price_per_million))
    query = query.where(Usage.source.in_(jobs), Usage.kind == "trained").group_by(Usage.source)
    found = {source: round(float(total) / 1e6, 6) for source, total in session.execute(query)}
    return {job: found.get(job, 0.0) for job in jobs}


class UsageBook:
    """The verbs on usage and prices."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record_request(
        self,
        *,
        tenant: str,
        request: str,
        base: str,
        model: str,
        num_prompt_tokens: int,
        num_tokens: int,
        line: int = 0,
    ) -> None:
        """Bill one inference request, or one line of a batch, once however often it was answered."""
        with self._database.writing() as session:
            counts: tuple[tuple[Kind, int], ...] = (("prompt", num_prompt_tokens), ("generated", num_tokens))
            for kind, count in counts:
                add_usage(
                    session,
                    tenant=tenant,
                    source=request,
                    step=line,
                    kind=kind,
                    base=base,
                    model=model,
                    num_tokens=count,
                )

    def by_day(self, tenant: str | None, since_day: int = 0) -> list[dict[str, Any]]:
        """Tokens and cost of each tenant, day and model, newest day first."""
        query = (
            select(
                Usage.tenant,
                Usage.day,
                Usage.model,
                Usage.kind,
                func.sum(Usage.num_tokens),
                func.sum(Usage.num_tokens * Usage.price_per_million),
            )
            .where(Usage.day >= since_day)
            .group_by(Usage.tenant, Usage.day, Usage.model, Usage.kind)
        )
        if tenant is not None:
            query = query.where(Usage.tenant == tenant)
        rows: dict[tuple[str, int, str], dict[str, Any]] = defaultdict(dict)
        with self._database.reading() as session:
            for owner, day, model, kind, tokens, cost in session.execute(query):
                row = rows[owner, day, model]
                row[f"{kind}_tokens"] = int(tokens)
                row["cost"] = round(row.get("cost", 0.0) + float(cost) / 1e6, 6)
        return [
            {"tenant": owner, "day": day * SECONDS_PER_DAY, "model": model, **{f"{k}_tokens": 0 for k in KINDS}, **row}
            for (owner, day, model), row in sorted(rows.items(), key=lambda item: (-item[0][1], item[0]))
        ]

    def prices(self) -> list[Price]:
        with self._database.reading() as session:
            return list(session.scalars(select(Price).order_by(Price.base)))

    def set_price(self, base: str, trained: float, prompt: float, generated: float) -> Price:
        """Set a base's prices a million tokens; base "*" is for all that have none of their own."""
        if min(trained, prompt, generated) < 0:
            raise InvalidRequestError("A price is 0 or more.", param="price")
        with self._database.writing() as session:
            return session.merge(Price(base=base, trained=trained, prompt=prompt, generated=generated))
