"""What came of a run, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.base.folder import RESULT_MODEL
from luthier.worker.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: The run folder.
        status: "done" or "failed".
        evaluation: What eval.json holds.
        result: What result.json holds: steps, tokens, seconds, memory, and why training stopped.
    """

    folder: Path
    status: str
    evaluation: dict[str, Any]
    result: dict[str, Any]

    @property
    def has_adapter(self) -> bool:
        """Whether the run made an adapter rather than a whole model."""
        return not (self.folder / RESULT_MODEL).exists()

    @property
    def tuned(self) -> Path:
        """Where the result stands."""
        return self.folder / ("adapter" if self.has_adapter else RESULT_MODEL)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "status": self.status,
            "adapter" if self.has_adapter else "model": str(self.tuned),
            "evaluation": self.evaluation,
            "result": self.result,
        }


def kept_result(folder: RunFolder) -> RunResult | None:
    """The result of a run that is done, or None where something is left to do."""
    values, result = folder.read_json("eval.json"), folder.read_json("result.json")
    has_weights = folder.adapter.exists() or folder.model.exists()
    is_done = folder.has_state and folder.state()["status"] == "done" and has_weights
    # The card is written last.
    if not is_done or values is None or result is None or not (folder.path / "README.md").exists():
        return None
    return RunResult(folder.path, "done", values, result)
