"""Random preference pairs, and what their reference makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from luthier.base.load import Base
from luthier.engine.pack import BASE_SLOT
from luthier.engine.scoring import reference_margins
from luthier.types import Example, Pair


def make_pairs(num: int, seed: int, *, longest: int = 44, beta: float = 0.1, smoothing: float = 0.05) -> list[Example]:
    """Random preference pairs: a prompt and two replies that differ in their first token and in length."""
    random = np.random.default_rng([seed, 1])
    examples = []
    for row in range(num):
        prompt = random.integers(4, 250, size=int(random.integers(1, longest // 2)))
        sides = [random.integers(4, 250, size=int(random.integers(2, longest // 2))) for _ in range(2)]
        sides[1][0] = (sides[0][0] + 1) % 250
        tokens = np.concatenate([prompt, sides[0], prompt, sides[1]]).astype(np.int32)
        reply = [np.r_[np.zeros(len(prompt)), np.ones(len(side))] for side in sides]
        pair = Pair(len(prompt) + len(sides[0]), beta, smoothing)
        examples.append(Example(tokens, np.concatenate(reply).astype(np.float32), row=row, pair=pair))
    return examples


def referenced(base: Base, pairs: list[Example], slot: int = BASE_SLOT) -> list[Example]:
    """The pairs with what the reference makes of them."""
    margins = reference_margins(base, pairs, slot)
    return [
        replace(example, pair=replace(example.pair, reference=float(margin)))
        for example, margin in zip(pairs, margins, strict=True)
        if example.pair is not None
    ]
