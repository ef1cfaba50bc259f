"""The OpenAI surface's objects, from the record's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.registry.files import Page
from luthier.service.bases import BaseFacts
from luthier.store.tables import Batch, Checkpoint, Event, File, Job, Model, Permission, Upload, UploadPart

CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def page_object(page: Page, make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page of a list."""
    data = [make(item) for item in page.items]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": page.has_more}


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "luthier": {"sha256": file.sha256},
    }


def upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.num_bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file_object(file) if file is not None else None,
    }


def part_object(part: UploadPart) -> dict[str, Any]:
    return {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload}


def job_object(job: Job, cost: float) -> dict[str, Any]:
    """A job. `luthier` holds what the surface has no place for."""
    kind = "dpo" if job.spec["task"]["type"] == "preference" else "supervised"
    method = {"type": kind, kind: {"hyperparameters": dict(job.hyperparameters)}}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": job.error,
        "fine_tuned_model": job.tuned_model if job.status == "succeeded" else None,
        "finished_at": job.finished_at,
        "hyperparameters": {name: value for name, value in job.hyperparameters.items() if name != "beta"},
        "model": job.model,
        "organization_id": job.tenant,
        "result_files": [job.result_file] if job.result_file else [],
        "seed": job.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens if job.status in ("succeeded", "failed", "cancelled") else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": job.labels or None,
        "method": method,
        "user_provided_suffix": job.suffix,
        "luthier": {
            "spec": job.spec,
            "step": job.step,
            "total_steps": job.total_steps,
            "trained_tokens": job.trained_tokens,
            "estimate": job.estimate,
            "cost": cost,
            "evaluation": job.evaluation,
        },
    }


def _estimated_finish(job: Job) -> int | None:
    """When the job's last step is done at the pace since it was taken up last; None where no pace is known yet."""
    if job.status != "running" or None in (job.total_steps, job.pace_step, job.pace_at, job.stepped_at):
        return None
    assert job.total_steps is not None
    assert job.pace_step is not None
    assert job.pace_at is not None
    assert job.stepped_at is not None
    num_steps = job.step - job.pace_step
    if num_steps <= 0:
        return None
    return job.stepped_at + round((job.stepped_at - job.pace_at) / num_steps * (job.total_steps - job.step))


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    metrics = {name: checkpoint.metrics[name] for name in CHECKPOINT_METRICS if name in checkpoint.metrics}
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": checkpoint.job,
        "metrics": metrics,
        "step_number": checkpoint.step,
    }


def permission_object(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project,
    }


def base_object(base: BaseFacts) -> dict[str, Any]:
    return {"id": base.name, "object": "model", "created": base.created_at, "owned_by": base.owner}


def model_object(model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created_at,
        "owned_by": model.tenant,
        "luthier": {
            "base": model.base,
            "quantization": model.quantization or None,
            "form": model.form,
            "task": model.task,
            "job": model.job,
            "lineage": model.lineage,
        },
    }


def batch_object(batch: Batch) -> dict[str, Any]:
    names = (
        "in_progress_at",
        "expires_at",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
    )
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.problems} if batch.problems else None,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": batch.created_at,
        **{name: batch.times.get(name) for name in names},
        "request_counts": {name: batch.counts.get(name, 0) for name in ("total", "completed", "failed")},
        "metadata": batch.labels or None,
    }
