"""Fine-tuning jobs, their events, checkpoints and permissions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from luthier.registry.jobs import NewJob
from luthier.registry.models import no_such_model
from luthier.registry.problems import InvalidRequestError
from luthier.registry.tenants import Caller
from luthier.registry.usage import price_of
from luthier.service.answers import checkpoint_object, event_object, job_object, page_object, permission_object
from luthier.service.auth import ContextDep, Tuner
from luthier.service.bodies import JobCreate, PermissionCreate
from luthier.service.check import look_at
from luthier.service.context import Context
from luthier.service.methods import goes_on, held_base
from luthier.service.routes.common import ERRORS, V1, After, IdPath, Limit, NamePath
from luthier.service.specs import read_wish
from luthier.store.tables import Job, Model

router = APIRouter(prefix=f"{V1}/fine_tuning", responses=ERRORS, tags=["fine-tuning"])
_METADATA = re.compile(r"^metadata\[(.{1,64})\]$")


@router.post("/jobs")
def create_job(body: JobCreate, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Create a job. What is wrong with the request or a file is answered at once, with the line."""
    base, parent = _base_of(context, caller, body.model)
    parent_job = context.jobs.get(caller.tenant, parent.job) if parent is not None else None
    wanted = read_wish(body, base, parent_job.spec["method"] if parent_job is not None else None)
    train = context.files.get(caller.tenant, body.training_file)
    validation = context.files.get(caller.tenant, body.validation_file) if body.validation_file else None
    spec, _ = wanted.spec(num_rows=1, step_tokens=context.settings.step_tokens)
    held, start_from = held_base(base, spec.method, parent)
    seen = look_at(
        spec,
        train,
        validation,
        wanted.hold_out,
        blobs=context.blobs,
        renderer=context.bases.renderer(base),
        scratch=context.settings.scratch / "checks",
    )
    spec, resolved = wanted.spec(seen.num_rows, context.settings.step_tokens)
    if parent is not None and not goes_on(parent.task, spec.task.type):
        raise InvalidRequestError(
            f"{parent.id} was tuned for the task {parent.task}; found {spec.task.type}.", param="luthier.task"
        )
    num_tokens = round(seen.num_tokens * spec.train.epochs)
    with context.database.reading() as session:
        cost = round(num_tokens * price_of(session, base, "trained") / 1e6, 6)
    new = NewJob(
        base=held,
        model=body.model,
        spec=spec.model_dump(mode="json"),
        hyperparameters=resolved,
        training_file=train,
        validation_file=validation,
        hold_out=wanted.hold_out,
        suffix=body.suffix or body.user_provided_suffix,
        seed=wanted.seed,
        labels=body.metadata or {},
        parent=parent,
        start_from=start_from,
        rows_checked=seen.is_whole,
        estimate={"trained_tokens": num_tokens, "cost": cost},
    )
    return _answer(context, context.jobs.create(caller, new))


@router.get("/jobs")
def list_jobs(
    request: Request, caller: Tuner, context: ContextDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """Jobs, newest first. `metadata[key]=value` filters; `metadata=null` means jobs without any."""
    pairs = {found[1]: value for name, value in request.query_params.items() if (found := _METADATA.match(name))}
    wants_none = request.query_params.get("metadata") == "null"
    metadata = pairs or ({} if wants_none else None)
    page = context.jobs.page(caller.tenant, after, limit, metadata)
    costs = context.jobs.costs(page.items)
    return page_object(page, lambda job: job_object(job, costs[job.id]))


@router.get("/jobs/{job_id}")
def retrieve_job(job_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """One job."""
    return _answer(context, context.jobs.get(caller.tenant, job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """End a job."""
    return _answer(context, context.jobs.cancel(caller.tenant, job_id))


@router.post("/jobs/{job_id}/pause")
def pause_job(job_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Let a job rest."""
    return _answer(context, context.jobs.pause(caller.tenant, job_id))


@router.post("/jobs/{job_id}/resume")
def resume_job(job_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Let a paused job go on."""
    return _answer(context, context.jobs.resume(caller.tenant, job_id))


@router.get("/jobs/{job_id}/events")
def list_events(
    job_id: IdPath, caller: Tuner, context: ContextDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """What happened to a job, newest first."""
    return page_object(context.jobs.events(caller.tenant, job_id, after, limit), event_object)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: IdPath, caller: Tuner, context: ContextDep, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """A job's checkpoints, newest first."""
    return page_object(context.jobs.checkpoints(caller.tenant, job_id, after, limit), checkpoint_object)


@router.post("/checkpoints/{checkpoint:path}/permissions")
def create_permissions(
    checkpoint: NamePath, body: PermissionCreate, caller: Tuner, context: ContextDep
) -> dict[str, Any]:
    """Let other tenants use a checkpoint."""
    made = context.jobs.permit(caller.tenant, checkpoint, body.project_ids)
    data = [permission_object(row) for row in made]
    return {"object": "list", "data": data, "first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}


@router.get("/checkpoints/{checkpoint:path}/permissions")
def list_permissions(
    checkpoint: NamePath,
    caller: Tuner,
    context: ContextDep,
    project_id: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Limit = 10,
    order: Annotated[Literal["ascending", "descending"], Query()] = "descending",
) -> dict[str, Any]:
    """Who may use a checkpoint."""
    page = context.jobs.permissions(caller.tenant, checkpoint, project_id, after, limit, order)
    return page_object(page, permission_object)


@router.delete("/checkpoints/{checkpoint:path}/permissions/{permission_id}")
def delete_permission(
    checkpoint: NamePath, permission_id: IdPath, caller: Tuner, context: ContextDep
) -> dict[str, Any]:
    """Take a permission back."""
    context.jobs.forbid(caller.tenant, checkpoint, permission_id)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def _base_of(context: Context, caller: Caller, model: str) -> tuple[str, Model | None]:
    """The base to train on, and the tuned model to go on from."""
    if context.bases.find(model) is not None:
        return model, None
    if not model.startswith("ft:"):
        raise no_such_model(model)
    parent = context.models.get(caller.tenant, model)
    return parent.base, parent


def _answer(context: Context, job: Job) -> dict[str, Any]:
    return job_object(job, context.jobs.costs([job])[job.id])
