"""Processes on this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil

from luthier.worker.child_process import ChildProcess
from luthier.worker.launch.place import RankPlace

_LOOPBACK = "127.0.0.1"


class LocalLauncher:
    """Starts `python -m luthier.worker.launch.process` for every rank. They meet through a file, so no port is chosen,
    and speak over the loopback interface alone."""

    def start(self, order: dict[str, Any], size: int, scratch: Path) -> list[ChildProcess]:
        """As `Launcher.start`."""
        rendezvous = (scratch / "rendezvous").resolve().as_uri()
        environment = _loopback() | os.environ
        started: list[ChildProcess] = []
        for rank in range(size):
            place = RankPlace(rank, size, rank, size, rendezvous)
            own_order = order | {"place": place.to_dict()}
            started.append(ChildProcess.spawn("luthier.worker.launch.process", own_order, 0, environment))
        return started


def _loopback() -> dict[str, str]:
    """What tells gloo to stay on this machine, where the interface can be named."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.family == socket.AF_INET and found.address == _LOOPBACK for found in addresses):
            return {"GLOO_SOCKET_IFNAME": name}
    return {}
