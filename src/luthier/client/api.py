"""A server's API as the command line uses it: any server with the OpenAI surface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from luthier.errors import LuthierError

TIMEOUT_SECONDS = 120.0


class ServerError(LuthierError):
    """What a server refused, in its own words, or that it is not there."""


class Server:
    """One server.

    Args:
        url: With or without the /v1.
        key: An API key.
        transport: For tests.
    """

    def __init__(self, url: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_SECONDS, transport=transport
        )

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._ask("GET", path, params={k: v for k, v in query.items() if v is not None}).json()  # type: ignore[no-any-return]

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._ask("POST", path, json=body or {}).json()  # type: ignore[no-any-return]

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path).json()  # type: ignore[no-any-return]

    def upload(self, file: Path, purpose: str) -> dict[str, Any]:
        """Send a file."""
        try:
            with file.open("rb") as stream:
                parts = {"file": (file.name, stream)}
                return self._ask("POST", "/files", files=parts, data={"purpose": purpose}).json()  # type: ignore[no-any-return]
        except OSError as error:
            raise ServerError(f"{file} cannot be read: {error.strerror}", "a readable file") from None

    def content(self, path: str) -> bytes:
        return self._ask("GET", path).content

    def pages(self, path: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The items of a list, page by page."""
        after: str | None = None
        seen = 0
        while True:
            page = self.get(path, after=after)
            for item in page["data"]:
                if limit is not None and seen >= limit:
                    return
                seen += 1
                yield item
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def _ask(self, method: str, path: str, **values: Any) -> httpx.Response:
        try:
            response = self._client.request(method, self._url + path, **values)
        except httpx.HTTPError as error:
            raise ServerError(
                f"{self._url} does not answer: {type(error).__name__}", fix="look at --server, and whether it runs"
            ) from None
        if response.is_success:
            return response
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"the server answered {response.status_code}"
        raise ServerError(str(message))
