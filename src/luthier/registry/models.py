"""Models: tuned ones with their lineage, checkpoints under names of their own, and who may use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from luthier.methods.config import BANK_TYPES
from luthier.registry.problems import InvalidRequestError, MissingError
from luthier.registry.tenants import LIVE_STATUSES
from luthier.store.blobs import Blobs
from luthier.store.database import Database
from luthier.store.held_base import HeldBase
from luthier.store.tables import Checkpoint, Job, Model, Permission


@dataclass(frozen=True, slots=True)
class Servable:
    """What a name stands for when somebody wants a reply of it.

    Attributes:
        name: As it was asked for.
        base: What a worker must hold to answer.
        adapter: Key prefix of the adapter's files; None for what the worker holds as it is.
        task: What it was tuned for, as its job's spec has it; None for a base.
    """

    name: str
    base: HeldBase
    adapter: str | None
    task: dict[str, Any] | None


class Models:
    """The verbs on tuned models. All are about what one tenant may see."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    def owned(self, tenant: str) -> list[Model]:
        """The tenant's own, newest first."""
        with self._database.reading() as session:
            return list(session.scalars(select(Model).where(Model.tenant == tenant).order_by(Model.seq.desc())))

    def get(self, tenant: str, name: str) -> Model:
        with self._database.reading() as session:
            row = session.scalar(select(Model).where(Model.id == name, Model.tenant == tenant))
        if row is None:
            raise no_such_model(name)
        return row

    def find(self, tenant: str, name: str) -> Servable:
        """A tuned model or a checkpoint that the tenant owns or was given.

        Raises:
            MissingError: where there is none.
        """
        with self._database.reading() as session:
            tuned = session.execute(select(Model, Job).join(Job, Job.id == Model.job).where(Model.id == name)).first()
            if tuned is not None and self._may_use(session, tenant, tuned[0].tenant, name):
                return _servable(*tuned)
            found = session.execute(
                select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job).where(Checkpoint.model == name)
            ).first()
            if found is not None:
                checkpoint, job = found
                if checkpoint.blob is not None and self._may_use(session, tenant, checkpoint.tenant, name):
                    _check_answers(job, name)
                    return Servable(name, job.held_base, checkpoint.blob, job.spec["task"])
        raise no_such_model(name)

    def delete(self, tenant: str, name: str) -> None:
        """Delete a tuned model and its files.

        Raises:
            InvalidRequestError: while a job that has not ended goes on from it, or models stand on its weights.
        """
        with self._database.writing() as session:
            row = session.scalar(select(Model).where(Model.id == name, Model.tenant == tenant).with_for_update())
            if row is None:
                raise no_such_model(name)
            user = session.scalar(select(Job.id).where(Job.parent == name, Job.status.in_((*LIVE_STATUSES, "paused"))))
            if user is not None:
                raise InvalidRequestError(
                    f"{name} is in use: the job {user} goes on from it. Cancel the job, or wait for its end.",
                    param="model",
                    code="model_in_use",
                )
            above = session.scalar(select(Model.id).where(Model.weights == row.blob))
            if above is not None:
                raise InvalidRequestError(
                    f"{name} is in use: {above} was tuned over its weights. Delete that one first.",
                    param="model",
                    code="model_in_use",
                )
            session.execute(delete(Permission).where(Permission.model == name))
            session.delete(row)
        self._blobs.delete(row.blob)

    @staticmethod
    def _may_use(session: Session, tenant: str, owner: str, name: str) -> bool:
        if tenant == owner:
            return True
        query = select(Permission.id).where(Permission.model == name, Permission.project == tenant)
        return session.scalar(query) is not None


def _servable(model: Model, job: Job) -> Servable:
    """An adapter answers on what it was trained over; anything else is what a worker of its own holds."""
    if model.form == "adapter":
        return Servable(model.id, model.held_base, model.blob, job.spec["task"])
    return Servable(model.id, HeldBase(model.base, weights=model.blob), None, job.spec["task"])


def _check_answers(job: Job, name: str) -> None:
    """A checkpoint of the bank's is an adapter; one of an exclusive method is there to be gone on from."""
    method = job.spec["method"]["type"]
    if method not in BANK_TYPES:
        raise InvalidRequestError(
            f"{name} is a checkpoint of a {method} job, which cannot answer; the finished model {job.tuned_model} can.",
            param="model",
            code="checkpoint_not_served",
        )


def no_such_model(name: str) -> MissingError:
    """The answer for a model that does not exist, or that the caller may not use."""
    return MissingError(
        f"The model `{name}` does not exist or you do not have access to it.", param="model", code="model_not_found"
    )
