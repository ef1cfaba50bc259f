"""The end of a child process: with its own exit code, while whoever started it still holds its input open."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import sys, time
from luthier.errors import RunError
from luthier.worker.child import serve_order

def work(order, progress):
    time.sleep(0.2)  # the thread that waits for the end of the input waits by now
    progress.send(verb="result")
    if order["fails"]:
        raise RunError("refused", "something else")

sys.exit(serve_order(work))
"""


@pytest.mark.parametrize("fails", ["true", "false"])
def test_a_child_ends_by_itself_while_its_input_is_open(fails: str) -> None:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(b'{"fails": %s}\n' % fails.encode())
        child.stdin.flush()
        assert child.wait(60) == 0
        assert child.stderr.read() == b""
        assert len(child.stdout.read().splitlines()) == (2 if fails == "true" else 1)
