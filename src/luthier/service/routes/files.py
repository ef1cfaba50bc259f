"""Files, and uploads in parts."""

from __future__ import annotations

import re
from itertools import chain
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.responses import StreamingResponse

from luthier.registry.problems import InvalidRequestError
from luthier.service.answers import file_object, page_object, part_object, upload_object
from luthier.service.auth import ContextDep, Tuner
from luthier.service.bodies import UploadComplete, UploadCreate
from luthier.service.routes.common import ERRORS, V1, After, IdPath, Order

router = APIRouter(prefix=V1, responses=ERRORS, tags=["files"])


@router.post("/files")
def create_file(
    caller: Tuner,
    context: ContextDep,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form(max_length=32)],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]")] = None,
) -> dict[str, Any]:
    """Upload a file. It is there whole, or not at all."""
    if anchor not in (None, "created_at"):
        raise InvalidRequestError("expires_after.anchor is created_at.", param="expires_after")
    return file_object(context.files.create(caller.tenant, file.filename or "", purpose, file.file, seconds))


@router.get("/files")
def list_files(
    caller: Tuner,
    context: ContextDep,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
) -> dict[str, Any]:
    """Files, newest first."""
    return page_object(context.files.page(caller.tenant, purpose, after, limit, order), file_object)


@router.get("/files/{file_id}")
def retrieve_file(file_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """One file's record."""
    return file_object(context.files.get(caller.tenant, file_id))


@router.delete("/files/{file_id}")
def delete_file(file_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Delete a file. Refused while a job that has not ended needs it."""
    context.files.delete(caller.tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/files/{file_id}/content", response_class=StreamingResponse)
def file_content(file_id: IdPath, caller: Tuner, context: ContextDep) -> StreamingResponse:
    """The file's bytes."""
    file = context.files.get(caller.tenant, file_id)
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", file.filename)
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file.filename, safe='')}"
    headers = {"content-disposition": disposition, "content-length": str(file.num_bytes)}
    pieces = context.files.pieces(file)
    first = next(pieces, b"")  # where the bytes are lost, that is told before the answer begins
    return StreamingResponse(chain([first], pieces), media_type="application/octet-stream", headers=headers)


@router.post("/uploads")
def create_upload(body: UploadCreate, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Announce a file that comes in parts."""
    seconds = body.expires_after.seconds if body.expires_after else None
    return upload_object(context.files.begin_upload(caller.tenant, body.filename, body.purpose, body.bytes, seconds))


@router.post("/uploads/{upload_id}/parts")
def create_part(
    upload_id: IdPath, caller: Tuner, context: ContextDep, data: Annotated[UploadFile, File()]
) -> dict[str, Any]:
    """Upload one part, 64 MB at most."""
    return part_object(context.files.add_part(caller.tenant, upload_id, data.file))


@router.post("/uploads/{upload_id}/complete")
def complete_upload(upload_id: IdPath, body: UploadComplete, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Join the parts into a file."""
    upload, file = context.files.complete_upload(caller.tenant, upload_id, body.part_ids, body.md5)
    return upload_object(upload, file)


@router.post("/uploads/{upload_id}/cancel")
def cancel_upload(upload_id: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Give an upload up."""
    return upload_object(context.files.cancel_upload(caller.tenant, upload_id))
