"""The processes that a test has started, looked at from outside."""

from __future__ import annotations

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
