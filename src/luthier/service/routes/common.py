"""What routes share: parameters, and the statuses that each may answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path, Query

V1 = "/v1"
"""What the surface's paths begin with. Each router has it itself, so that what is logged of a route is its path."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, text in {
        400: "The request does not hold.",
        401: "No valid key.",
        403: "The key may not do this.",
        404: "No such thing.",
        405: "No such method here.",
        413: "Too large.",
        429: "A limit is reached.",
        500: "A defect.",
        503: "Nobody can do it just now.",
    }.items()
}

After = Annotated[str | None, Query(max_length=128)]
Limit = Annotated[int, Query(ge=1, le=100)]
IdPath = Annotated[str, Path(min_length=1, max_length=128)]
NamePath = Annotated[str, Path(min_length=1, max_length=512)]
Order = Annotated[Literal["asc", "desc"], Query()]
__all__ = ["ERRORS", "V1", "After", "IdPath", "Limit", "NamePath", "Order"]
