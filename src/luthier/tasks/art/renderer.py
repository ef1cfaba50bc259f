"""Renders drawings in a process of their own, which may take so much time and memory and no more.

    python -m luthier.tasks.art.renderer     reads requests from standard input and answers on standard output

A request is a line "SIDE BYTES", then the SVG; an answer is a line "png BYTES" or "error BYTES", then the picture or
the reason. The time is the processor's: a busy machine makes no drawing invalid.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import BinaryIO

MAX_SECONDS = 2
"""Of processor time a drawing."""
MAX_MEMORY_BYTES = 2**30


def main() -> None:
    """Answer requests until standard input ends."""
    import resvg_py

    with contextlib.suppress(ValueError, OSError):  # not on every system; the time is limited on all
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        side, size = map(int, line.split())
        svg = requests.read(size).decode("utf-8")
        _allow_time()
        try:
            # Without fonts: pictures must not depend on what the machine has.
            png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
        except Exception as error:
            _answer(answers, "error", str(error).encode("utf-8"))
        else:
            _answer(answers, "png", png)


def _allow_time() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 1 + MAX_SECONDS, hard))


def _answer(answers: BinaryIO, kind: str, content: bytes) -> None:
    answers.write(f"{kind} {len(content)}\n".encode() + content)
    answers.flush()


if __name__ == "__main__":
    main()
