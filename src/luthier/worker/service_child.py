"""The process of one exclusive job of the service: `python -m luthier.worker.service_child`.

The order comes as one JSON line on standard input; what happens goes to standard output, one JSON object a line, and
the worker that started the process records it (`child_jobs.py`):

{"verb": "begin", "total_steps": 20, "num_rows": 40, "num_tokens": 900}
{"verb": "step", "step": {...}}                              a StepRecord
{"verb": "checkpoint", "files": {...}, "checkpoint": {...}}  SavedFiles and a CheckpointRecord
{"verb": "result", "files": {...}, "result": {...}}          SavedFiles and a JobResult
{"verb": "failed", "message": "..."}                         the training cannot go on
{"verb": "error", ...}                                       as in `messages.py`: the job cannot begin
{"verb": "saved"}                                            asked to stop, after the last checkpoint

SIGTERM saves and stops. The end of standard input means that the worker is gone, and what is saved here with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from luthier.errors import LuthierError
from luthier.imports import forget_objects, importing
from luthier.worker.child import wait_for_end_of_input
from luthier.worker.messages import SendingProgress, error_message, own_messages


def main() -> int:
    """Exit codes: 0 done, refused, or stopped; 1 a defect."""
    send = SendingProgress(own_messages()).send
    order = json.loads(sys.stdin.readline())
    is_stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_stopping.set())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with importing():
        from luthier.engine.engine import is_out_of_memory
        from luthier.worker.service_training import Order, StoppedError, work
    try:
        work(Order.from_dict(order), send, is_stopping)
    except StoppedError:
        send(verb="saved")
    except LuthierError as error:
        send(**error_message(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        send(verb="failed", message="one sequence alone does not fit into the memory; lower train.max_length")
    return 0


def _end_with_parent() -> None:
    wait_for_end_of_input()
    os._exit(130)


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # orphaned: there is nobody to tell
        code = 130
    forget_objects()
    sys.exit(code)
