"""The process of one job that runs apart: `python -m luthier.worker.child`, started by `worker/children.py`.

The recipe comes as one JSON line on standard input, messages go to standard output (`worker/messages.py`). SIGTERM, or
the end of standard input (the parent is gone), saves and stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import TextIO

from luthier.errors import LuthierError
from luthier.worker.messages import SendingProgress, error_message


def main() -> int:
    """Train the recipe that standard input brings. Exit codes: 0 done or refused, 130 interrupted, 1 a defect."""
    messages = _own_messages()
    order = json.loads(sys.stdin.readline())
    progress = SendingProgress(messages)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        from luthier.recipe import load_recipe
        from luthier.worker.train import train_here

        result = train_here(load_recipe(order["recipe"]), resume=order["resume"], progress=progress)
    except LuthierError as error:
        progress.send(**error_message(error))
        return 0
    except KeyboardInterrupt:
        progress.send(verb="interrupted")
        return 130
    progress.send(verb="result", status=result.status, evaluation=result.evaluation, result=result.result)
    return 0


def _own_messages() -> TextIO:
    """The real standard output, kept for messages: what libraries print goes to standard error from now on."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    # Orphaned by a parent that was killed, there is nobody to tell.
    try:
        code = main()
    except BrokenPipeError:
        code = 130
    sys.exit(code)
