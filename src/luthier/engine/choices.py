"""A reply that must be one of a few texts: a constraint for the sampler.

Shape: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OneOf:
    """Lets a reply go on with what some choice goes on with, and end where a choice ends.

    The likeliest allowed token at each place gives the likeliest choice where the choices differ in their first token;
    where they differ later, it is decided token by token.

    Args:
        choices: Token ids of each choice, the one that ends it included; none empty.
        vocabulary_size: V.
    """

    def __init__(self, choices: Sequence[Sequence[int]], vocabulary_size: int) -> None:
        if not choices or not all(choices):
            raise ValueError("a reply needs at least one choice, and each at least one token")
        self._left = [tuple(choice) for choice in choices]
        self._size = vocabulary_size

    def allowed_V(self) -> Tensor:
        """bool [V] on the CPU."""
        allowed_V = torch.zeros(self._size, dtype=torch.bool)
        allowed_V[sorted({choice[0] for choice in self._left})] = True
        return allowed_V

    def take(self, token: int) -> None:
        """The reply goes on with `token`."""
        self._left = [choice[1:] for choice in self._left if choice[0] == token and len(choice) > 1]
