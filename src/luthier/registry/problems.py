"""What the record refuses. Each has what an HTTP answer needs, so that the service adds nothing but the envelope."""

from __future__ import annotations

from luthier.errors import LuthierError


class RefusedError(LuthierError):
    """A request that is not carried out.

    Args:
        message: What is wrong and what to do, in a sentence or two.
        param: The field concerned, as the caller named it.
        code: A short fixed name.
        retry_after_seconds: When to try again, where that helps.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(RefusedError):
    """The request does not hold, or something is in a state that forbids it (400: the client would retry a 409)."""


class InvalidKeyError(RefusedError):
    """No key, or one that is not valid."""

    status = 401


class ScopeError(RefusedError):
    """The key is valid and may not do this."""

    status = 403
    type = "permission_error"


class MissingError(RefusedError):
    """There is no such thing, or it is another tenant's: the two answer alike."""

    status = 404


class TooLargeError(RefusedError):
    """More bytes than are taken."""

    status = 413


class QuotaError(RefusedError):
    """A quota or a rate limit is used up."""

    status = 429
    type = "rate_limit_error"


class UnavailableError(RefusedError):
    """Nobody can do it just now."""

    status = 503
    type = "server_error"


class LeaseLostError(LuthierError):
    """A worker speaks of a job that it no longer holds."""


def missing(noun: str, name: str, param: str | None = None) -> MissingError:
    """The one answer for what does not exist and for what is somebody else's."""
    return MissingError(f"No such {noun}: {name}", param=param, code="not_found")
