"""The processes that a test has started, looked at from outside, and where servers among them listen."""

from __future__ import annotations

import secrets
import socket

import psutil


def children_running(module: str) -> list[psutil.Process]:
    """Processes that this one started which run `module` and have not ended, whether or not anybody asked how."""
    found = []
    for child in psutil.Process().children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and module in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:  # it ends just now
            continue
    return found


def free_port() -> int:
    """A port at which nobody listens, below those that systems give out by themselves: it stays free until a server
    starts at it, or starts there again."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
