"""A result that was put together from parts is loaded again, and must say what the model in memory says."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from luthier.engine.scoring import score_examples
from luthier.errors import RunError
from luthier.worker.loading import load_tuned, placement_of

if TYPE_CHECKING:
    from luthier.worker.run import Run

NUM_EXAMPLES = 4
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative, of losses; another dtype has `NARROW_TOLERANCE`."""
NARROW_TOLERANCE = 2e-2


def check_result(run: Run) -> None:
    """Load what the run has written, and hold its losses on a few training rows against those of the model in memory.

    Raises:
        RunError: when they differ; the result is not to be trusted, and the run is not done.
    """
    examples = [run.data.examples[i] for i in range(min(NUM_EXAMPLES, len(run.data.examples)))]
    ours = score_examples(run.base, examples, run.job.slot.index)
    tuned = load_tuned(run.folder, run.recipe, placement_of(run.recipe))
    theirs = score_examples(tuned.base, examples, tuned.slot)
    del tuned
    gc.collect()
    tolerance = TOLERANCE.get(run.base.dtype, NARROW_TOLERANCE)
    for one, other in zip(ours, theirs, strict=True):
        if not abs(one.nll_sum - other.nll_sum) <= tolerance * max(1.0, abs(one.nll_sum)):
            raise RunError(
                f"{run.folder.tuned(run.recipe)} has a loss of {other.nll_sum:.6g} on a row where the model in memory "
                f"has {one.nll_sum:.6g}",
                "the same from both: the files are what was trained",
                "go on from the last checkpoint with --resume, and report this",
            )
