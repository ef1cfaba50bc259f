"""What passes between the record and the workers: one page of verbs, and the values in them.

    API --(tables)--> WorkRecord <--verbs-- worker          jobs, checkpoints, usage, leases
    API ----------(HTTP, NDJSON)----------> worker          requests to sample in, tokens out

The record never calls a worker to move a job: it writes what is wanted, and a worker reads it with its next verb. Only
replies, which must come at once, go the other way: a worker serves `POST /v1/sample` and `POST /v1/predict` on the
address that it registers, to whoever shows the secret that it registers with it (see docs/decisions/0012).

Nothing here imports torch, SQL or HTTP. `luthier.registry.work.StoredWork` implements the verbs over the store.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from luthier.store.held_base import HeldBase

Level = Literal["info", "warn", "error"]
Wish = Literal["pause", "cancel", "lost"]
"""What a worker is asked to do with a job that it holds: save and let go; drop; forget, for another may hold it now."""
Form = Literal["adapter", "layers", "model"]
"""What a job's files are: an adapter for the bank, layers of peft's, or a model with weights of its own."""


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """A worker as it presents itself.

    Attributes:
        id: Unique among all that ever were.
        base: What it holds.
        address: Where its HTTP endpoint listens, as in "http://127.0.0.1:40123".
        secret: What a caller must show there.
        place: The supervisor that started it, or None.
        free_bytes: What it can give jobs now beyond its base.
        total_bytes: The most that it could give one if it had no other; None, as above, where that is not known.
    """

    id: str
    base: HeldBase
    address: str
    secret: str
    place: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a base fits somewhere, in bytes of the memory in which it would be held.

    Attributes:
        base: What it takes, with what its process has still to take for itself.
        free: What is free now.
        total: What there is in all.
    """

    base: int
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class WantedBase:
    """What somebody waits for.

    Attributes:
        need_bytes: What the worker must have free beyond the base, so that one who waits is helped; 0 where that is not
            known.
    """

    base: HeldBase
    need_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a job until the lease ends.

    Attributes:
        job: The job's id.
        worker: The holder.
        epoch: Counts the job's holders. A verb with an epoch of the past raises `LeaseLostError`, so that a worker that
            was thought dead and comes back changes nothing.
    """

    job: str
    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job as a worker receives it.

    Attributes:
        claim: To be shown with every verb about it.
        tenant, weight: Whose it is, and the tenant's share against the others'.
        spec: A JobSpec's values.
        train_file, validation_file: Keys of blobs; the second may be None.
        hold_out: Share of the training rows to hold out where there is no validation file.
        start_from: Key prefix of the adapter to go on from, or None.
        checkpoints: Key prefixes of the checkpoint to resume from and, where that is another, of the best one so far;
            empty for a fresh start. A prefix ends in the checkpoint's own name.
        model: Name of the model that it makes: `ft:...`.
        rows_checked: Whether every line of the files has been looked at already.
    """

    claim: Claim
    tenant: str
    weight: float
    spec: dict[str, Any]
    train_file: str
    validation_file: str | None
    hold_out: float
    start_from: str | None
    checkpoints: tuple[str, ...]
    model: str
    rows_checked: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step did, or, with `valid_loss`, how the held-out rows stand after it.

    Recording is idempotent by (job, step): a step replayed after a crash adds no second event and bills nothing.
    """

    step: int
    total_steps: int
    train_loss: float
    num_tokens: int
    learning_rate: float
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint whose files are all in the blob store under `prefix`.

    Attributes:
        prefix: Key prefix of its files.
        sha256: Digest over the digests of its files.
        num_bytes: Their size.
        step: The optimizer step.
        metrics: As the OpenAI surface names them.
        best_step: The step with the best validation loss so far; its files are kept. 0 where nothing is held out.
    """

    step: int
    prefix: str
    sha256: str
    num_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int = 0


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended well.

    Attributes:
        prefix: Key prefix of the result's files, with tokenizer and chat template.
        lineage: What the model came from: data hash, base identity, versions.
        evaluation: What eval.json holds.
        form: What the files are.
    """

    prefix: str
    sha256: str
    num_bytes: int
    lineage: dict[str, Any]
    evaluation: dict[str, Any]
    num_steps: int
    form: Form = "adapter"


class WorkRecord(Protocol):
    """What the record offers a worker. Every verb is one transaction; those about a job need a live claim.

    Raises (all verbs that take a claim):
        LeaseLostError: when the job is held by another, or has ended.
    """

    def register(self, card: WorkerCard, lease_seconds: float) -> None:
        """A worker is here and takes jobs and requests for its base."""

    def attend(self, place: str, bases: Collection[str], lease_seconds: float) -> None:
        """A supervisor is here, and starts workers of these bases on its machine."""

    def wanted_bases(self) -> list[WantedBase]:
        """What somebody waits for and no live worker holds, or none that has the memory, the longest waiting first."""

    def note_room(self, place: str, base: HeldBase, room: Room, need_bytes: int) -> None:
        """A place has looked whether it can hold a base, with so much beyond it; who waits is told where nobody can."""

    def heartbeat(self, worker: str, lease_seconds: float, free_bytes: int | None = None) -> dict[str, Wish]:
        """Renew the worker's lease and those of its jobs; returns what is asked of jobs that it holds, by job id."""

    def erased(self, tenants: Collection[str]) -> set[str]:
        """Which of these tenants are no more, so that a worker forgets what it has of them."""

    def leave(self, worker: str) -> None:
        """The worker is gone; what it still held may be claimed by others at once."""

    def claim(self, worker: str, max_jobs: int, lease_seconds: float) -> list[ClaimedJob]:
        """Take up to `max_jobs` jobs that wait for the worker's base, or whose holder's lease has run out.

        A job that was declined for want of memory is left to workers that have as much free as it needs.

        Tenants with the fewest running jobs per weight come first, and of a tenant's jobs the oldest.
        """

    def begin(self, claim: Claim, total_steps: int, num_rows: int, num_tokens: int) -> None:
        """The job's data holds; it trains from now on."""

    def record_steps(self, claim: Claim, steps: Sequence[StepRecord]) -> Wish | None:
        """Keep metrics, events and trained tokens of whole steps; returns what is asked of the job now."""

    def record_event(self, claim: Claim, key: str, message: str, level: Level = "info", **data: Any) -> None:
        """Append an event unless the job has one with this key."""

    def register_checkpoint(self, claim: Claim, checkpoint: CheckpointRecord) -> list[str]:
        """A checkpoint is whole; returns key prefixes of earlier ones that nobody needs any more."""

    def finish(self, claim: Claim, result: JobResult) -> None:
        """The job succeeded: its model is registered, its result file written, its cost settled."""

    def fail(self, claim: Claim, code: str, message: str, param: str | None = None) -> None:
        """The job failed for a reason that its owner can read."""

    def decline(self, claim: Claim, need_bytes: int, free_bytes: int) -> None:
        """The job needs more beyond its base than the worker has free: it waits for one that has, and says so.

        It fails where no worker and no place that is here could ever have so much.
        """

    def release(self, claim: Claim, *, is_loss: bool = False) -> None:
        """Let the job go where its last checkpoint stands: paused, cancelled, or for others to claim.

        Args:
            is_loss: The process that trained it died. Too many such deaths without a checkpoint in between end the job.
        """


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request to sample, as the API sends it to a worker; answered by a stream of `SampleEvent`s, one JSON a line.

    Attributes:
        id: Unique; a second request with it is refused.
        adapter: Key prefix of the adapter's files, or None for what the worker holds.
        messages, tools: A conversation, or None where `prompt` is given.
        prompt: Plain text to be continued, or token ids.
        num_choices: How many replies; each has its own draws.
        grammar: What the reply must obey: {"json_schema": ...}, {"json_object": true} or
            {"tools": [...], "required": bool}; None for anything.
    """

    id: str
    adapter: str | None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    num_choices: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    grammar: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """A piece of one choice's reply.

    Attributes:
        choice: Which of the choices.
        text: Text that became certain.
        logprobs: Entries {token, bytes, logprob, top} for the tokens behind it, where asked for.
        finish_reason: Set on the choice's last event.
        num_prompt_tokens, num_tokens: Of the prompt, and of this choice's reply so far: a reply that is broken off is
            billed by them.
        problem: Why the reply could not be made; the stream ends with it.
        status: HTTP status that goes with the problem.
    """

    choice: int = 0
    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    problem: str = ""
    status: int = 500


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A request to predict, as the API sends it to a worker; answered by one `Predictions`.

    Attributes:
        id: Unique, as a SampleRequest's.
        adapter: As there.
        rows: Each a row of the model's task that may lack the answer, or a text where a text is all that it needs.
        max_tokens: Longest reply of a task that writes.
    """

    id: str
    adapter: str | None
    rows: list[str | dict[str, Any]]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model makes of rows.

    Attributes:
        rows: One of each row, as the task presents it; a reply that was cut short has {"finish_reason": "length"}.
        num_prompt_tokens, num_tokens: Of all rows together.
    """

    rows: list[dict[str, Any]]
    num_prompt_tokens: int
    num_tokens: int
