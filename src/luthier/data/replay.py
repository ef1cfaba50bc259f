"""General text that is trained on beside a text of its own kind, against forgetting.

Which examples are replayed follows from the seed and the share alone, so an epoch is the same list of examples whenever
it is asked for: a run resumes by its step number, as any does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from luthier.data.store import ExampleStore
from luthier.errors import RecipeError
from luthier.recipe import DataConfig
from luthier.tasks.task import Task
from luthier.types import Example

_STREAM = 7_083
"""Keys this draw apart from the others of the seed."""


def replay_data(data: DataConfig, task: Task) -> DataConfig | None:
    """The replayed files as a dataset of its own, or None where there are none.

    Raises:
        RecipeError: for a task that has no place for them.
    """
    if data.replay is None:
        return None
    if task.name != "text":
        raise RecipeError(
            f"data.replay: task {task.name} has no rows of plain text",
            "task: text",
            "leave data.replay out, or mix such rows into data.train",
        )
    return DataConfig(train=data.replay.file, validation=data.replay.validation)


class Mixed:
    """A text's own examples, and behind them as many of the replayed text as reach its share of all tokens.

    Args:
        own: The text's examples, each once.
        replayed: Examples to choose from, in an order drawn by the seed; they repeat where they do not suffice.
        share: Of the tokens of both, above 0 and below 1. The last example may overshoot it.
        seed: The job's.

    Attributes:
        num_tokens: int64 [examples]. Length of each example in tokens.
        total_tokens: Of all examples together.
        num_replayed_tokens: Of those that are replayed.
        num_passes: How often the replayed text is gone through, begun passes included.
    """

    def __init__(self, own: ExampleStore, replayed: ExampleStore, share: float, seed: int) -> None:
        self._own, self._replayed = own, replayed
        wanted = share / (1.0 - share) * own.total_tokens
        order = np.random.default_rng([seed, _STREAM]).permutation(len(replayed))
        self.num_passes = max(1, int(np.ceil(wanted / replayed.total_tokens)))
        order = np.tile(order, self.num_passes)
        ends = np.cumsum(replayed.num_tokens[order])
        self._chosen: NDArray[np.int64] = order[: int(np.searchsorted(ends, wanted)) + 1]
        self.num_tokens: NDArray[np.int64] = np.concatenate([own.num_tokens, replayed.num_tokens[self._chosen]])
        self.total_tokens = int(self.num_tokens.sum())
        self.num_replayed_tokens = self.total_tokens - own.total_tokens

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        at = index - len(self._own)
        return self._own[index] if at < 0 else self._replayed[int(self._chosen[at])]
