"""What a worker holds: the key by which jobs and requests find the workers that can serve them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class HeldBase:
    """A base as a worker holds it. Jobs train together, and replies come from the same worker, where these are equal.

    Attributes:
        name: The base's name, as tenants call it.
        quantization: "nf4", or empty for the base as it is.
        weights: Key prefix of the files of a tuned model, where the worker holds that in place of the base itself: a
            model whose own weights were trained, or one of peft's layers. Empty for the base.
    """

    name: str
    quantization: str = ""
    weights: str = ""

    def __str__(self) -> str:
        what = f"{self.name} in {self.quantization.upper()}" if self.quantization else self.name
        return f"a tuned model of {what}" if self.weights else what
