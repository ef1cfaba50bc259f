"""Which label a language model finds likeliest for each text, by the words of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.base.load import Base
from luthier.data.template import Renderer
from luthier.engine.continuations import MAX_TOKENS, Asked, score_continuations
from luthier.tasks.classification.schema import LabelledText
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.task import Probabilities


def choose_labels(
    base: Base,
    renderer: Renderer,
    task: WordsTask,
    records: Sequence[LabelledText],
    slot: int,
    *,
    shots: Sequence[LabelledText] = (),
    on_done: Callable[[int], None] = lambda done: None,
    max_tokens: int = MAX_TOKENS,
) -> list[Probabilities]:
    """Probabilities [1, K] of the labels for each text, in order.

    Args:
        shots: Records that every prompt shows first, solved; that of the text without content, too.

    Raises:
        RowError: for a text that the base's chat template refuses.
        DataError: for a text that is longer than the base takes.
    """
    asked = [Asked(*task.answers(record, renderer, shots)) for record in records]
    prior_K = np.zeros(len(task.labels))
    if task.config.calibration == "prior":
        (prior_K,) = score_continuations(base, [Asked(*task.answers(task.blank(), renderer, shots))], slot)
    scores = score_continuations(base, asked, slot, on_done, max_tokens)
    return [_softmax(scores_K - prior_K)[None].astype(np.float32) for scores_K in scores]


def _softmax(scores_K: NDArray[np.float64]) -> NDArray[np.float64]:
    odds_K = np.exp(scores_K - scores_K.max())
    return np.asarray(odds_K / odds_K.sum())
