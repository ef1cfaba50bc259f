"""A run's folder: fixed names, atomic writes, and one state file that says how far it came."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from luthier.base.folder import RESULT_MODEL
from luthier.errors import RunError, StorageError
from luthier.evaluate.metrics import RowScore
from luthier.files import write_text
from luthier.methods.config import exclusive_spec
from luthier.recipe import Recipe, validate

FORMAT = 1
LOCK_FILE, HOLDER_FILE = ".lock", ".holder.json"
"""Who trains the folder now: `worker/run_lock.py` keeps them."""

LOG_FILE = "log.txt"
"""What a run in the background has said."""

MAY_CHANGE = ("output", "compute.devices", "compute.zero", "compute.offload", "compute.deepspeed")
"""Fields in which a resume may differ: where the folder is now, over how many processes it goes on, and what of the
states they share out."""

PACKAGES = ("luthier", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Paths and records of one run.

    Attributes:
        path: The folder.
        adapter: The result: PEFT files, tokenizer, chat template.
        model: The result where a method trained the base's own weights: a whole model, tokenizer, chat template.
        checkpoints: One folder a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.model = path / RESULT_MODEL
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """Begin a new run in `recipe.output`; one that never came to its training gives way.

        Raises:
            RunError: when a run, or anything else, is there already.
        """
        run = cls(Path(recipe.output))
        is_unused = run.is_unused
        if run.has_state and not is_unused:
            raise RunError(
                f"{run.path} holds a run already ({run.state()['status']})",
                fix="go on with --resume, or choose another folder with --set output=...",
            )
        if run.path.exists() and not run.path.is_dir():
            raise RunError(f"{run.path} is a file", "a new or empty folder", "choose another with --set output=...")
        if not is_unused and run.path.exists() and not run.is_empty:
            raise RunError(f"{run.path} is not empty", "a new or empty folder", "choose another with --set output=...")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{run.path} cannot be made: {error}", fix="choose another folder for `output`"
            ) from None
        # The state first: should the disk be full behind it, the folder is still known as a run that may give way.
        run.set_state("preparing")
        write_text(run.path / "recipe.yaml", recipe.to_yaml())
        write_text(run.path / "versions.json", _json(resolved_versions()))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            RunError: when there is none, or it is of another format.
        """
        run = cls(Path(path))
        if not run.has_state:
            raise RunError(f"{path} holds no run", "a folder that `luthier train` wrote", "see the recipe's `output`")
        found = run.state().get("format")
        if found != FORMAT:
            raise RunError(f"{path} is of run format {found}", f"format {FORMAT}", "use the Luthier that wrote it")
        return run

    @property
    def has_state(self) -> bool:
        return (self.path / "state.json").exists()

    @property
    def is_unused(self) -> bool:
        """Whether a run was begun here that never came to its training.

        Its data did not hold, or it was stopped before the base was loaded: nothing of it is worth keeping, and the
        mended recipe need not be the same.
        """
        return self.has_state and self.state()["status"] == "preparing" and not self.checkpoints.exists()

    @property
    def is_empty(self) -> bool:
        """Whether nothing but a lock stands in the folder."""
        return all(path.name in (LOCK_FILE, HOLDER_FILE) for path in self.path.iterdir())

    def tuned(self, recipe: Recipe) -> Path:
        """Where the run's result stands, by its method: `model` or `adapter`."""
        return self.model if owns_weights(recipe) else self.adapter

    def recipe(self) -> Recipe:
        """The complete recipe that the run was started with."""
        text = (self.path / "recipe.yaml").read_text(encoding="utf-8")
        return validate(Recipe, yaml.safe_load(text), str(self.path / "recipe.yaml"))

    def check_same(self, recipe: Recipe) -> None:
        """Refuse to resume with another recipe.

        Raises:
            RunError: naming the fields that differ.
        """
        before, now = self.recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
        found = [difference for difference in _differences(before, now) if difference[0] not in MAY_CHANGE]
        changed = [f"{n}: was {b!r}, is {a!r}" for n, b, a in found]
        if changed:
            raise RunError(
                f"{self.path} was started with another recipe:\n  " + "\n  ".join(changed),
                "the same recipe, so that the resumed run equals an uninterrupted one",
                "take the changes back, or start a new run with another `output` (`start_from` can name this one)",
            )

    # -- records

    def state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'state.json'} cannot be read: {error}") from None

    def set_state(self, status: str, **more: Any) -> None:
        """Say how far the run came: preparing, training, interrupted, failed, done."""
        write_text(self.path / "state.json", _json({"format": FORMAT, "status": status, **more}))

    def append_metric(self, **values: Any) -> None:
        """Add a line to metrics.jsonl; it survives a kill of the process, at worst the last line is cut."""
        line = json.dumps(values, allow_nan=False, default=str)
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(
                f"{self._metrics} cannot be written: {error}", fix="free some space, then --resume"
            ) from None

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines past `step`, which a resumed run will write again."""
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the line that a kill cut short
        write_text(self._metrics, "".join(line + "\n" for line in kept))

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path / name, _json(value))

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, or None where it is not there yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_scores(self, who: str, scores: Sequence[RowScore]) -> None:
        """Keep what a model did on each row, for a resume and for the report."""
        self.write_json(f"scores/{who}.json", [asdict(score) for score in scores])

    def read_scores(self, who: str) -> list[RowScore] | None:
        values = self.read_json(f"scores/{who}.json")
        return None if values is None else [RowScore(**value) for value in values]


def owns_weights(recipe: Recipe) -> bool:
    """Whether the recipe's method trains the base's own weights, so that its result is a whole model."""
    return recipe.method.runs == "exclusive" and exclusive_spec(recipe.method).owns_weights


def resolved_versions() -> dict[str, Any]:
    """The versions that a run used, and the machine in words."""
    versions: dict[str, Any] = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in {**before, **now}
            for difference in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [(name, before, now)]
