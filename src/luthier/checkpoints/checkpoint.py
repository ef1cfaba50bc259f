"""Checkpoints of one job: its slot's values, the optimizer's moments, and the numbers that the rest follows from.

    RUN/checkpoints/step-000042/
        adapter_config.json, adapter_model.safetensors    a slot of the bank, to the bit; also a usable adapter
        trained-00001-of-00001.safetensors                an exclusive job's trained tensors instead, to the bit
        optimizer.safetensors                             both moments of every parameter
        state.json                                        step, tokens, losses that are watched, digests of the files

The order of the data, dropout masks and the schedule are functions of seed and step, so a step number restores them
all; no random generator has a state to keep. A checkpoint is written under a temporary name and renamed once it is
whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier.base.load import Base
from luthier.checkpoints.slot_files import keeps_moments, read_slot, write_slot
from luthier.checkpoints.tensor_file import read_tensors, write_tensors
from luthier.engine.adamw import MOMENTS
from luthier.engine.job import TrainingJob
from luthier.errors import ModelError, RunError, StorageError
from luthier.files import atomic_folder, write_text

logger = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"^step-(\d+)$")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(
    root: Path,
    job: TrainingJob,
    base: Base,
    extra: dict[str, Any],
    *,
    base_name: str,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    threshold: float | None = None,
) -> Path:
    """Save a job between two steps; a checkpoint of the same step gives way once the new one is whole.

    Args:
        root: Folder of the run's checkpoints.
        extra: The caller's own JSON values; `load_checkpoint` gives them back.
        base_name, labels, pad_token_id, threshold: As `write_adapter` takes them.

    Raises:
        ValueError: in the middle of an optimizer batch.
        StorageError: when it cannot be written; earlier checkpoints are whole.
    """
    if not job.is_between_steps:
        raise ValueError("a checkpoint holds whole steps: call restart_step() first")
    folder = checkpoint_folder(root, job.step)
    aside = folder.with_name(f".{folder.name}-aside")
    with _named(folder), atomic_folder(folder) as temporary:
        write_slot(
            job.slot,
            base,
            temporary,
            base_name=base_name,
            labels=labels,
            pad_token_id=pad_token_id,
            threshold=threshold,
        )
        write_tensors(temporary / OPTIMIZER_FILE, job.optimizer.state())
        state = {
            "format": FORMAT,
            "step": job.step,
            "job": job.progress_state(),
            "settings": _settings(job),
            "base": _base_key(base),
            "files": _digests(temporary),
            "extra": extra,
        }
        write_text(temporary / STATE_FILE, json.dumps(state, indent=2, allow_nan=False) + "\n")
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    _sync(root)
    return folder


def load_checkpoint(folder: Path, job: TrainingJob, base: Base) -> dict[str, Any]:
    """Put a job, made as it was made before, where the checkpoint left it; returns the caller's own values.

    Raises:
        RunError: for a checkpoint of another format, or of a job with other settings.
        ModelError: for one over another base or of another shape, or damaged files.
    """
    state = _read_state(folder)
    _check_same(folder, state["settings"], _settings(job))
    _check_base(folder, state["base"], _base_key(base))
    read_slot(job.slot, base, folder)
    moments = read_tensors(folder / OPTIMIZER_FILE)
    if state["step"] > 0:
        _check_moments(folder, moments, job)
    job.optimizer.load_state(moments, state["step"])
    job.load_progress_state(state["job"])
    if job.step >= job.total_steps:
        job.state = "done"
    return dict(state["extra"])


def latest_checkpoint(root: Path, warn: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest whole checkpoint, or None where there is none at all.

    Args:
        warn: Hears of each damaged one that is passed over.

    Raises:
        RunError: when there are checkpoints and every one is damaged.
    """
    if not root.exists():
        return None
    folders = sorted((path for path in root.iterdir() if _NAME.match(path.name)), key=step_of, reverse=True)
    for folder in folders:
        problem = damage(folder)
        if not problem:
            return folder
        warn(f"the checkpoint {folder} is damaged ({problem}), so it is passed over")
    if folders:
        raise RunError(
            f"every checkpoint in {root} is damaged",
            "one that is whole",
            "restore the folder from a backup, or delete it to train from the beginning",
        )
    return None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or an empty string.

    Raises:
        RunError: for a checkpoint of another format, which is no damage.
    """
    try:
        expected = _read_state(folder)["files"]
        found = _digests(folder)
    except (ModelError, OSError, KeyError) as error:
        return str(error).splitlines()[0]
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    changed = sorted(name for name, digest in expected.items() if found[name] != digest)
    return f"{changed[0]} is not what was written" if changed else ""


def prune(root: Path, keep: set[int]) -> None:
    """Remove checkpoints of other steps, and what a killed process left half-written."""
    for path in list(root.iterdir()):
        if _NAME.match(path.name):
            if step_of(path) in keep:
                continue
            # Renamed first, so that a half-removed folder never passes for a checkpoint.
            away = path.with_name(f".{path.name}-removed")
            shutil.rmtree(away, ignore_errors=True)
            path = path.replace(away)
        if path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Let an error name the checkpoint, rather than the temporary folder that is gone already."""
    try:
        yield
    except StorageError as error:
        reason = error.found.rpartition("could not be written: ")[2]
        raise StorageError(f"{folder} could not be written: {reason}", error.expected, error.fix) from error


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "a whole checkpoint", "take an earlier one") from None
    if not isinstance(state, dict) or "format" not in state:
        raise ModelError(f"{path} names no format", "a whole checkpoint", "take an earlier one")
    if state["format"] != FORMAT:
        raise RunError(
            f"{folder} is of checkpoint format {state['format']}", f"format {FORMAT}", "use the Luthier that wrote it"
        )
    return state


def _settings(job: TrainingJob) -> dict[str, Any]:
    """All that a resumed run must share with the one that was saved, as JSON values."""
    values = {**asdict(job.spec), "num_examples": len(job.examples), "total_steps": job.total_steps}
    return dict(json.loads(json.dumps(values)))


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise RunError(
            f"{folder} was trained with " + ", ".join(f"{name} = {before.get(name)}" for name in changed),
            ", ".join(f"{name} = {now.get(name)}" for name in changed),
            "resume with the same settings and data; to go on with others, start a new run from its adapter",
        )


def _base_key(base: Base) -> dict[str, Any] | None:
    key = base.key()
    return key.to_dict() if key is not None else None


def _check_base(folder: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    # Where the weights came from does not change what they are.
    names = ("weights_hash", "quantization", "dtype")
    changed = [name for name in names if before and now and before[name] != now[name]]
    if changed and before and now:
        raise ModelError(
            f"{folder} was trained over another base: " + ", ".join(f"{n} {str(before[n])[:12]}" for n in changed),
            ", ".join(f"{name} {str(now[name])[:12]}" for name in changed),
            "name in `base`, `method` and train.dtype what the run began with",
        )


def _check_moments(folder: Path, moments: dict[str, Any], job: TrainingJob) -> None:
    def both(names: Iterable[str]) -> set[str]:
        return {f"{name}.{moment}" for name in names for moment in MOMENTS}

    needed = both(name for name in job.optimizer.parameters if keeps_moments(name, job.slot))
    found = {key for key in moments if "." in key and key.rpartition(".")[2] in MOMENTS}
    odd = sorted((needed - found) | (found - both(job.optimizer.parameters)))
    if odd:
        raise ModelError(f"{folder / OPTIMIZER_FILE} does not fit the job: {odd[0]}", "both moments of each parameter")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the state, by its path within the folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != STATE_FILE:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _sync(folder: Path) -> None:
    """Force the folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
