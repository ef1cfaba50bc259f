"""One side of a benchmark in a process of its own: its time, its memory, its losses."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.engine.engine import Engine


@dataclass(frozen=True)
class Measured:
    """What a side reports.

    Attributes:
        losses: Mean loss of each optimizer step.
        seconds: Wall time of each optimizer step.
        num_tokens: Real tokens (no padding) of each optimizer step.
        peak_bytes: Most resident memory of the process.
    """

    losses: list[float]
    seconds: list[float]
    num_tokens: list[int]
    peak_bytes: int

    def tokens_per_second(self, warmup: int = 2) -> float:
        """Real tokens over wall time, the first steps left out."""
        return sum(self.num_tokens[warmup:]) / sum(self.seconds[warmup:])


def peak_bytes() -> int:
    """Most resident memory of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(engine: Engine) -> Measured:
    """Run the engine's one job to its end, and time each of its steps."""
    losses, seconds, tokens = [], [], []
    started = time.perf_counter()
    while engine.has_work:
        for step in engine.step():
            now = time.perf_counter()
            losses.append(step.loss)
            seconds.append(now - started)
            tokens.append(step.num_tokens)
            started = now
    return Measured(losses, seconds, tokens, peak_bytes())


def report(measured: Measured) -> None:
    """Hand the result to the parent process, as the last line of standard output."""
    print(json.dumps(asdict(measured)))


def run_side(script: Path, arguments: Sequence[str]) -> Measured:
    """Run `script` with `arguments` in a fresh process and read its result."""
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, check=True)
    values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(**values)


def run_ranks(script: Path, arguments: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Run `script` as `size` processes that meet, and read what each has to say.

    Each gets `--size`, `--rank` and `--meeting`, a place for torch.distributed, besides `arguments`. A size of 0 is one
    process without ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = [*arguments, "--size", str(size), "--meeting", (Path(folder) / "meeting").as_uri()]
        processes = [
            subprocess.Popen([sys.executable, str(script), *flags, "--rank", str(n)], stdout=subprocess.PIPE, text=True)
            for n in range(max(1, size))
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process of {script.name} {' '.join(arguments)} failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in said]
