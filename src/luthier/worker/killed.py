"""A run whose process was killed: a trace of what it did tells a later resume, which then goes on smaller.

On a CPU memory that runs out raises nothing: the system's killer ends the process. What no process can do when it is
killed is to say so, so a run notes when it begins to train, and an end of any other kind takes the note away. The note
holds the size of its forwards, and how many processes the kernel had killed for want of memory by then. If that number
is the same at the resume, on the same boot, the kill was somebody's wish and nothing shrinks, so that the resumed run
still equals one that never stopped; if it has grown, or cannot be known, the forwards are halved.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, ProcessLostError
from luthier.types import LEAST_MICRO_BATCH_TOKENS
from luthier.worker.run_folder import RunFolder

NOTE, TOTAL_STEPS = "training", "total_steps"
"""Of state.json: the note, and the steps of the whole run."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNTERS = Path("/proc/vmstat")


def note_training(folder: RunFolder, forward_tokens: int, total_steps: int) -> None:
    """Say that the run trains from now on, in forwards of at most `forward_tokens`."""
    note = {"forward_tokens": forward_tokens, **memory_kills()}
    folder.set_state("training", **{TOTAL_STEPS: total_steps, NOTE: note})


def note_end(folder: RunFolder, error: BaseException) -> None:
    """Say that the run ended by an error, which is no kill; where even that cannot be written, it stays unsaid.

    One that has lost another of its processes may have lost it to a kill: its note stays.
    """
    with contextlib.suppress(LuthierError):
        state = folder.state()
        if state["status"] == "training":
            if isinstance(error, ProcessLostError):
                mark_killed(folder, error.found)
                return
            how = "failed" if isinstance(error, Exception) else "interrupted"
            folder.set_state(how, problem=str(error) or type(error).__name__, **_kept(state, TOTAL_STEPS))


def mark_killed(folder: RunFolder, problem: str) -> None:
    """Say of a run whose process is gone that it failed; its note stays for the resume."""
    folder.set_state("failed", problem=problem, **_kept(folder.state(), NOTE, TOTAL_STEPS))


def tokens_after_kill(folder: RunFolder) -> tuple[int | None, str]:
    """Most tokens in a forward of a run that is resumed, and a sentence for people; (None, "") where it was not killed.

    (None, a sentence) where it was killed, and not for want of memory.
    """
    note = folder.state().get(NOTE)
    if not note:
        return None, ""
    before, now = _evidence(note), _evidence(memory_kills())
    if None not in before and before == now:
        return None, f"{folder.path} was killed, and not for want of memory: it goes on as it was"
    is_sure = None not in (*before, *now) and before[0] == now[0]
    tokens = max(LEAST_MICRO_BATCH_TOKENS, int(note["forward_tokens"]) // 2)
    return tokens, (
        f"{folder.path} was killed{', for want of memory' if is_sure else ', perhaps for want of memory'}: "
        f"it goes on with at most {tokens:,} tokens in a forward, half as many as before, and the same optimizer batch"
    )


def memory_kills() -> dict[str, Any]:
    """Processes that the kernel has killed for want of memory since it was booted, and which boot that is.

    Both are None where the system does not tell.
    """
    try:
        counters = dict(line.split(maxsplit=1) for line in _COUNTERS.read_text().splitlines())
        return {"boot": _BOOT.read_text().strip(), "memory_kills": int(counters["oom_kill"])}
    except (OSError, ValueError, KeyError):
        return {"boot": None, "memory_kills": None}


def _kept(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: state[name] for name in names if state.get(name)}


def _evidence(note: dict[str, Any]) -> tuple[Any, Any]:
    return note.get("boot"), note.get("memory_kills")
