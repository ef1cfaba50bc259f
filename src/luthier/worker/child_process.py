"""A process that this one started and talks with: one JSON line as its order, JSON lines back, SIGTERM to end it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

NUM_LAST_WORDS = 4


@dataclass
class ChildProcess:
    """A running `python -m MODULE`.

    Attributes:
        need_bytes: Predicted memory.
        on_gpu: Whether that is a GPU's.
        has_stepped: Whether it has done a whole step, by which it has taken all; whoever reads its messages sets it.
        inbox: Messages that it sent and nobody has read.
        last_words: The end of its standard error.
    """

    need_bytes: int
    process: subprocess.Popen[bytes]
    on_gpu: bool = False
    has_stepped: bool = False
    inbox: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_WORDS))
    readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def spawn(
        cls,
        module: str,
        order: dict[str, Any],
        need_bytes: int,
        environment: Mapping[str, str] = os.environ,
        *,
        on_gpu: bool = False,
    ) -> ChildProcess:
        """Start the process and hand it its order."""
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        child = cls(need_bytes, process, on_gpu)
        child.readers = [
            threading.Thread(target=read, daemon=True) for read in (child._read_messages, child._read_words)
        ]
        for reader in child.readers:
            reader.start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; its end says so
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return child

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone and all that it said has been read."""
        return self.process.poll() is not None and not any(reader.is_alive() for reader in self.readers)

    @property
    def bytes_to_come(self) -> int:
        """What it is predicted to take beyond what it holds now.

        What it holds of a GPU is not in its resident pages. Until it has stepped all of its need counts, for what is
        there already a second time: rather too much than too little.
        """
        if self.on_gpu:
            return 0 if self.has_stepped or self.process.poll() is not None else self.need_bytes
        try:
            held = psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0
        return max(0, self.need_bytes - held)

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since this was asked last."""
        said = []
        while True:
            try:
                said.append(self.inbox.get_nowait())
            except queue.Empty:
                return said

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def problem(self) -> str:
        """Why it ended without a result, in one line."""
        code = self.process.returncode
        words = " ".join(line.strip() for line in self.last_words if line.strip())[-300:]
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
            hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        else:
            how, hint = f"ended with code {code}", ""
        return f"its process {how}{hint}" + (f"; its last words: {words}" if words else "")

    def _read_messages(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                self.inbox.put(json.loads(line))

    def _read_words(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_words.append(line.decode(errors="replace"))
