"""What requests hold, checked: the OpenAI surface's fields, and nothing that would be passed over in silence."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f]+$")]
Id = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$")]
Auto = Literal["auto"]
MAX_SEED = 2**31 - 1
_UNFIT = re.compile("[\x00\ud800-\udfff]")


class Body(BaseModel):
    """An unknown field is an error: what is not understood is not passed over."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _texts_can_be_stored(cls, values: Any) -> Any:
        left = [values]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                left += [*value, *value.values()]
            elif isinstance(value, list):
                left += value
            elif isinstance(value, str) and _UNFIT.search(value):
                raise ValueError("a text holds a NUL, or half of a surrogate pair")
        return values


class Hyperparameters(Body):
    """How a job learns, in OpenAI's words."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto = "auto"


class DpoHyperparameters(Hyperparameters):
    """How a preference job learns."""

    beta: Annotated[float, Field(gt=0, le=2)] | Auto = "auto"


class MethodPart(Body):
    """A method's own part."""

    hyperparameters: Hyperparameters = Hyperparameters()


class DpoPart(Body):
    """Preference tuning's own part."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Body):
    """OpenAI's `method`."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: MethodPart | None = None
    dpo: DpoPart | None = None
    reinforcement: dict[str, Any] | None = None


class JobCreate(Body):
    """`POST /fine_tuning/jobs`. Our own fields come under `luthier`."""

    model: Name
    training_file: Id
    validation_file: Id | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    user_provided_suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[dict[str, Any]], Field(max_length=5)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    luthier: dict[str, Any] | None = None

    @field_validator("suffix", "user_provided_suffix")
    @classmethod
    def _fits_a_name(cls, value: str | None) -> str | None:
        if value is not None and not all(c.isascii() and (c.isalnum() or c in "-_.") for c in value):
            raise ValueError("a suffix holds letters, digits, '-', '_' and '.'")
        return value


class PermissionCreate(Body):
    """`POST /fine_tuning/checkpoints/{checkpoint}/permissions`."""

    project_ids: Annotated[list[Id], Field(min_length=1, max_length=100)]


class ExpiresAfter(Body):
    """When a file goes away by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3_600, le=2_592_000)]


class UploadCreate(Body):
    """`POST /uploads`."""

    bytes: Annotated[int, Field(ge=1, le=8 * 2**30)]
    filename: Annotated[str, Field(min_length=1, max_length=255)]
    mime_type: Annotated[str, Field(max_length=128)]
    purpose: Annotated[str, Field(max_length=32)]
    expires_after: ExpiresAfter | None = None


class UploadComplete(Body):
    """`POST /uploads/{id}/complete`."""

    part_ids: Annotated[list[Id], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, Field(max_length=64)] | None = None


class Sampling(Body):
    """What chat and plain completions share."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not served; leave it out, or 0")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("logit_bias is not served; leave it out")
        return value

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class ChatCreate(Sampling):
    """`POST /chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionCreate(Sampling):
    """`POST /completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class PredictCreate(Body):
    """`POST /luthier/predict`: what a tuned model makes of rows of its task, each an object, or a text for short."""

    model: Name
    input: str | dict[str, Any] | Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256


class BatchCreate(Body):
    """`POST /batches`."""

    input_file_id: Id
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class WebhookCreate(Body):
    """`POST /luthier/webhooks`."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    events: list[Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]] | None = (
        None
    )


class TenantCreate(Body):
    """`POST /luthier/admin/tenants`."""

    name: str
    weight: Annotated[float, Field(gt=0, lt=1e6)] = 1.0
    max_storage_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_running_jobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_trained_tokens_per_day: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_requests_per_minute: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class TenantUpdate(Body):
    """`POST /luthier/admin/tenants/{tenant}`: only what is given changes; null takes a quota away."""

    weight: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    max_storage_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_running_jobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_trained_tokens_per_day: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_requests_per_minute: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class KeyCreate(Body):
    """`POST /luthier/admin/tenants/{tenant}/keys`."""

    scopes: list[Literal["admin", "tune", "infer"]]
    name: Annotated[str, Field(max_length=64)] = ""
    expires_in_seconds: Annotated[int, Field(ge=1, lt=2**40)] | None = None


class KeyRotate(Body):
    """`POST /luthier/admin/keys/{key}/rotate`."""

    overlap_seconds: Annotated[int, Field(ge=0, le=31 * 86_400)] = 0


class PriceSet(Body):
    """`POST /luthier/admin/prices/{base}`: prices a million tokens."""

    trained: Annotated[float, Field(ge=0, lt=1e9)]
    prompt: Annotated[float, Field(ge=0, lt=1e9)]
    generated: Annotated[float, Field(ge=0, lt=1e9)]
