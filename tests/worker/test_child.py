"""The end of a child process: with its own exit code, while whoever started it still holds its input open."""

from __future__ import annotations

import subprocess
import sys

import pytest

from luthier.worker.child_process import ChildProcess

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


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_a_child_is_still_to_take(on_gpu: bool) -> None:
    """On a GPU all of its need until it has stepped: its resident pages say nothing of what it holds there."""
    need = 2**40
    child = ChildProcess.spawn("luthier.worker.child", {"recipe": "none.yaml", "resume": False}, need, on_gpu=on_gpu)
    try:
        before = child.bytes_to_come
        child.has_stepped = True
        after = child.bytes_to_come
    finally:
        child.kill()
        child.close()
    if on_gpu:
        assert (before, after) == (need, 0)
    else:
        assert 0 < after < need
        assert 0 < before < need
    assert child.bytes_to_come == 0, "it is gone"
