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
from collections.abc import Callable
from types import FrameType
from typing import Any

from luthier.errors import LuthierError
from luthier.imports import forget_objects, importing
from luthier.worker.messages import SendingProgress, error_message, own_messages


def serve_order(work: Callable[[dict[str, Any], SendingProgress], None]) -> int:
    """Do what the order on standard input says. Exit codes: 0 done or refused, 130 interrupted, 1 a defect."""
    try:
        return _serve(work)
    except BrokenPipeError:  # orphaned by a parent that was killed, there is nobody to tell
        return 130
    finally:
        forget_objects()


def _serve(work: Callable[[dict[str, Any], SendingProgress], None]) -> int:
    messages = own_messages()
    order = json.loads(sys.stdin.readline())
    progress = SendingProgress(messages)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        work(order, progress)
    except LuthierError as error:
        progress.send(**error_message(error))
    except KeyboardInterrupt:
        progress.send(verb="interrupted")
        return 130
    return 0


def work(order: dict[str, Any], progress: SendingProgress) -> None:
    """Train the order's recipe, and say what came of it."""
    with importing():
        from luthier.recipe import load_recipe
        from luthier.worker.train import train_here

    result = train_here(load_recipe(order["recipe"]), resume=order["resume"], progress=progress)
    progress.send(verb="result", status=result.status, evaluation=result.evaluation, result=result.result)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    wait_for_end_of_input()
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_end_of_input() -> None:
    """Return once standard input is closed at its other end; for a thread that nothing waits for.

    It reads past Python's buffer: an interpreter that ends while a thread holds the buffer's lock waits for a second,
    and aborts.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass


if __name__ == "__main__":
    sys.exit(serve_order(work))
