"""Files and uploads in parts: bytes arrive once, whole or not at all, with their hash.

The bytes are written first, under a key made of ids; the record that makes them a file follows in one transaction. What
a broken upload leaves behind in the store is nothing, or a blob that `sweep` removes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sqlalchemy import delete, select

from luthier.registry.problems import InvalidRequestError, TooLargeError, missing
from luthier.registry.tenants import LIVE_STATUSES, check_storage
from luthier.store.blobs import PIECE_BYTES, Blobs
from luthier.store.database import Database, locking, new_id, now_seconds
from luthier.store.tables import Batch, File, Job, Upload, UploadPart

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_FILE_BYTES = 512 * 2**20
MAX_UPLOAD_BYTES = 8 * 2**30
MAX_PART_BYTES = 64 * 2**20
UPLOAD_LIFE_SECONDS = 3600
OPEN_BATCHES = ("validating", "in_progress", "finalizing", "cancelling")
"""Statuses of batches that still need their input."""
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3_600, 2_592_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, newest first unless it was asked for otherwise."""

    items: list
    has_more: bool


class Files:
    """The verbs on files and uploads. All are about one tenant's."""

    def __init__(self, database: Database, blobs: Blobs, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._database = database
        self._blobs = blobs
        self.max_file_bytes = max_file_bytes

    def create(
        self, tenant: str, filename: str, purpose: str, stream: BinaryIO, expires_seconds: int | None = None
    ) -> File:
        """Store a file from a stream.

        Raises:
            InvalidRequestError: for a purpose, name, ending or expiry that is not taken.
            TooLargeError: past the size limit; nothing is kept.
            QuotaError: when the tenant's storage would not hold it.
        """
        name = clean_filename(filename)
        check_purpose(purpose, name)
        _check_expiry(expires_seconds)
        file_id = new_id("file-")
        blob = f"tenants/{tenant}/files/{file_id}"
        written = self._blobs.write(blob, self._limited(stream, self.max_file_bytes))
        return self._record(tenant, file_id, name, purpose, blob, written.num_bytes, written.sha256, expires_seconds)

    def add_result(self, tenant: str, filename: str, purpose: str, content: Iterator[bytes]) -> File:
        """Store a file that Luthier itself makes."""
        file_id = new_id("file-")
        blob = f"tenants/{tenant}/files/{file_id}"
        written = self._blobs.write(blob, content)
        now = now_seconds()
        row = File(
            id=file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            num_bytes=written.num_bytes,
            sha256=written.sha256,
            blob=blob,
            created_at=now,
        )
        with self._database.writing() as session:
            session.add(row)
        return row

    def page(
        self,
        tenant: str,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
    ) -> Page:
        with self._database.reading() as session:
            query = select(File).where(File.tenant == tenant, _unexpired())
            if purpose is not None:
                query = query.where(File.purpose == purpose)
            if after is not None:
                start = session.scalar(select(File.seq).where(File.tenant == tenant, File.id == after))
                if start is None:
                    raise missing("file", after, "after")
                query = query.where(File.seq < start if order == "desc" else File.seq > start)
            query = query.order_by(File.seq.desc() if order == "desc" else File.seq).limit(limit + 1)
            rows = list(session.scalars(query))
        return Page(rows[:limit], len(rows) > limit)

    def get(self, tenant: str, file: str) -> File:
        with self._database.reading() as session:
            row = session.scalar(select(File).where(File.tenant == tenant, File.id == file, _unexpired()))
        if row is None:
            raise missing("File object", file, "id")
        return row

    def pieces(self, file: File) -> Iterator[bytes]:
        """The file's bytes."""
        return self._blobs.pieces(file.blob)

    def delete(self, tenant: str, file: str) -> None:
        """Delete a file.

        Raises:
            InvalidRequestError: while a job or batch that has not ended needs it.
        """
        with self._database.writing() as session:
            row = session.scalar(select(File).where(File.tenant == tenant, File.id == file).with_for_update())
            if row is None:
                raise missing("File object", file, "id")
            users = select(Job.id).where(
                Job.tenant == tenant,
                Job.status.in_((*LIVE_STATUSES, "paused")),
                (Job.training_file == file) | (Job.validation_file == file),
            )
            running = select(Batch.id).where(
                Batch.tenant == tenant, Batch.input_file == file, Batch.status.in_(OPEN_BATCHES)
            )
            user = session.scalar(users) or session.scalar(running)
            if user is not None:
                raise InvalidRequestError(
                    f"{file} is in use by {user}; cancel it, or wait for its end.", param="id", code="file_in_use"
                )
            session.delete(row)
        self._blobs.delete(row.blob)

    # -- uploads in parts

    def begin_upload(
        self, tenant: str, filename: str, purpose: str, num_bytes: int, expires_seconds: int | None = None
    ) -> Upload:
        """Announce a file that will come in parts."""
        name = clean_filename(filename)
        check_purpose(purpose, name)
        _check_expiry(expires_seconds)
        if not 0 < num_bytes <= MAX_UPLOAD_BYTES:
            raise InvalidRequestError(f"bytes is 1 to {MAX_UPLOAD_BYTES:,}; found {num_bytes}.", param="bytes")
        now = now_seconds()
        row = Upload(
            id=new_id("upload_"),
            tenant=tenant,
            filename=name,
            purpose=purpose,
            num_bytes=num_bytes,
            status="pending",
            created_at=now,
            expires_at=now + UPLOAD_LIFE_SECONDS,
            file_expires_seconds=expires_seconds,
        )
        with self._database.writing() as session:
            check_storage(session, tenant, num_bytes)
            session.add(row)
        return row

    def add_part(self, tenant: str, upload: str, stream: BinaryIO) -> UploadPart:
        """Store one part."""
        self._open_upload(tenant, upload)
        part = new_id("part_")
        blob = f"tenants/{tenant}/uploads/{upload}/{part}"
        written = self._blobs.write(blob, self._limited(stream, MAX_PART_BYTES))
        row = UploadPart(id=part, upload=upload, num_bytes=written.num_bytes, blob=blob, created_at=now_seconds())
        with self._database.writing() as session:
            session.add(row)
        return row

    def complete_upload(
        self, tenant: str, upload: str, parts: list[str], md5: str | None = None
    ) -> tuple[Upload, File]:
        """Join the parts, in the order given, into a file.

        Raises:
            InvalidRequestError: for unknown or doubled parts, another size than announced, or another checksum.
        """
        import hashlib

        row = self._open_upload(tenant, upload)
        with self._database.reading() as session:
            found = {p.id: p for p in session.scalars(select(UploadPart).where(UploadPart.upload == upload))}
        odd = [part for part in parts if part not in found]
        if odd or len(set(parts)) < len(parts) or not parts:
            raise InvalidRequestError(
                f"part_ids names each of the upload's parts once; {odd[0] if odd else 'found ' + str(parts)[:200]} "
                "is not one of them."
                if odd
                else "part_ids names each part once, and at least one.",
                param="part_ids",
            )
        total = sum(found[part].num_bytes for part in parts)
        if total != row.num_bytes:
            raise InvalidRequestError(
                f"The parts have {total:,} bytes; {row.num_bytes:,} were announced.", param="part_ids"
            )
        digest = hashlib.md5(usedforsecurity=False)

        def pieces() -> Iterator[bytes]:
            for part in parts:
                for piece in self._blobs.pieces(found[part].blob):
                    digest.update(piece)
                    yield piece

        file_id = new_id("file-")
        blob = f"tenants/{tenant}/files/{file_id}"
        written = self._blobs.write(blob, pieces())
        if md5 is not None and digest.hexdigest() != md5.lower():
            self._blobs.delete(blob)
            raise InvalidRequestError("The checksum differs: the bytes received are not those sent.", param="md5")
        now = now_seconds()
        expires = None if row.file_expires_seconds is None else now + row.file_expires_seconds
        file = File(
            id=file_id,
            tenant=tenant,
            filename=row.filename,
            purpose=row.purpose,
            num_bytes=written.num_bytes,
            sha256=written.sha256,
            blob=blob,
            created_at=now,
            expires_at=expires,
        )
        with self._database.writing() as session:
            current = session.scalars(locking(select(Upload).where(Upload.id == upload))).one()
            if current.status != "pending":
                raise InvalidRequestError(f"The upload is {current.status} already.", param="upload_id")
            current.status, current.file = "completed", file_id
            session.execute(delete(UploadPart).where(UploadPart.upload == upload))
            session.add(file)
        self._blobs.delete(f"tenants/{tenant}/uploads/{upload}")
        return current, file

    def cancel_upload(self, tenant: str, upload: str) -> Upload:
        """Give an upload up."""
        with self._database.writing() as session:
            row = session.scalar(locking(select(Upload).where(Upload.tenant == tenant, Upload.id == upload)))
            if row is None:
                raise missing("upload", upload, "upload_id")
            if row.status != "pending":
                raise InvalidRequestError(f"The upload is {row.status} and cannot be cancelled.", param="upload_id")
            row.status = "cancelled"
            session.execute(delete(UploadPart).where(UploadPart.upload == upload))
        self._blobs.delete(f"tenants/{tenant}/uploads/{upload}")
        return row

    def sweep(self) -> int:
        """Remove what has expired: files past their time, and uploads nobody completed. Returns how many."""
        now = now_seconds()
        gone: list[str] = []
        with self._database.writing() as session:
            old = select(File).where(File.expires_at.is_not(None), File.expires_at <= now).order_by(File.seq)
            for file in session.scalars(old.with_for_update(skip_locked=True)):
                gone.append(file.blob)
                session.delete(file)
            late = select(Upload).where(Upload.status == "pending", Upload.expires_at <= now).order_by(Upload.seq)
            for upload in session.scalars(locking(late, skip_locked=True)):
                upload.status = "expired"
                session.execute(delete(UploadPart).where(UploadPart.upload == upload.id))
                gone.append(f"tenants/{upload.tenant}/uploads/{upload.id}")
        for blob in gone:
            self._blobs.delete(blob)
        return len(gone)

    def _open_upload(self, tenant: str, upload: str) -> Upload:
        with self._database.reading() as session:
            row = session.scalar(select(Upload).where(Upload.tenant == tenant, Upload.id == upload))
        if row is None:
            raise missing("upload", upload, "upload_id")
        status = "expired" if row.status == "pending" and row.expires_at <= now_seconds() else row.status
        if status != "pending":
            raise InvalidRequestError(f"The upload is {status} already.", param="upload_id")
        return row

    def _limited(self, stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
        size = 0
        while piece := stream.read(PIECE_BYTES):
            size += len(piece)
            if size > max_bytes:
                raise TooLargeError(
                    f"The file is larger than {max_bytes // 2**20} MB. Send it in parts, or split it.",
                    param="file",
                    code="file_too_large",
                )
            yield piece

    def _record(
        self,
        tenant: str,
        file_id: str,
        name: str,
        purpose: str,
        blob: str,
        num_bytes: int,
        sha256: str,
        expires_seconds: int | None,
    ) -> File:
        now = now_seconds()
        row = File(
            id=file_id,
            tenant=tenant,
            filename=name,
            purpose=purpose,
            num_bytes=num_bytes,
            sha256=sha256,
            blob=blob,
            created_at=now,
            expires_at=None if expires_seconds is None else now + expires_seconds,
        )
        try:
            with self._database.writing() as session:
                check_storage(session, tenant, num_bytes)
                session.add(row)
        except BaseException:
            self._blobs.delete(blob)
            raise
        return row


def clean_filename(filename: str) -> str:
    """The last part of a name as it was sent; it is shown, and never used as a path.

    Raises:
        InvalidRequestError: when nothing is left of it.
    """
    name = _CONTROL.sub("", filename.replace("\\", "/").rsplit("/", 1)[-1]).strip()
    name = name.encode("utf-8", "replace").decode()[:255]
    if name in ("", ".", ".."):
        raise InvalidRequestError(f"{filename[:80]!r} is no file name.", param="file")
    return name


def check_purpose(purpose: str, filename: str) -> None:
    """Whether files of this purpose and name are taken."""
    if purpose not in PURPOSES:
        raise InvalidRequestError(f"{purpose[:80]!r} is not one of {', '.join(PURPOSES)}.", param="purpose")
    if purpose in ("fine-tune", "batch") and not filename.lower().endswith(".jsonl"):
        raise InvalidRequestError(
            f"Files for {purpose} are JSON Lines and end in .jsonl; found {filename!r}.",
            param="file",
            code="invalid_file_format",
        )


def _check_expiry(seconds: int | None) -> None:
    if seconds is not None and not MIN_EXPIRY_SECONDS <= seconds <= MAX_EXPIRY_SECONDS:
        raise InvalidRequestError(
            f"expires_after.seconds is {MIN_EXPIRY_SECONDS:,} to {MAX_EXPIRY_SECONDS:,}; found {seconds}.",
            param="expires_after",
        )


def _unexpired():  # type: ignore[no-untyped-def]
    return (File.expires_at.is_(None)) | (File.expires_at > now_seconds())
