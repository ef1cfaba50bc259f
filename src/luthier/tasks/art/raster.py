"""From a drawing's text to pixels: checked first, then rendered by a process beside this one."""

from __future__ import annotations

import atexit
import functools
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.tasks.art.guard import DrawingError, check_drawing

Picture = NDArray[np.float32]
"""[side, side, 3]: red, green and blue from 0 to 1, on white paper."""
Ink = NDArray[np.bool_]
"""[side, side]: where there is something on the paper."""

INK_FROM = 0.25
"""A pixel is ink where some channel is this much darker than the paper."""


def picture_of(svg: str, side: int) -> Picture:
    """The drawing on a square of white paper, `side` pixels wide, without fonts.

    Raises:
        DrawingError: where `guard.check_drawing` refuses it, or it cannot be rendered within the limits.
    """
    check_drawing(svg)
    return _decoded(_CHILD.render(svg.strip(), side), side)


def ink_of(svg: str, side: int) -> Ink | DrawingError:
    """Where the drawing has ink, or why there is none to see. The last few hundred are remembered."""
    found = _ink(svg, side)
    return found if isinstance(found, DrawingError) else found.copy()


def iou(found: Ink, wanted: Ink) -> float:
    """Intersection over union of what is inked, 0 to 1; two empty papers are equal."""
    union = int((found | wanted).sum())
    return int((found & wanted).sum()) / union if union else 1.0


@functools.lru_cache(maxsize=512)
def _ink(svg: str, side: int) -> Ink | DrawingError:
    try:
        return np.asarray((1.0 - picture_of(svg, side)).max(axis=2) >= INK_FROM)
    except DrawingError as error:
        return error


def _decoded(png: bytes, side: int) -> Picture:
    from matplotlib.image import imread

    rgba = np.asarray(imread(io.BytesIO(png), format="png"), dtype=np.float32)
    paper = np.ones((side, side, 3), dtype=np.float32)
    height, width = min(side, rgba.shape[0]), min(side, rgba.shape[1])
    top, left = (side - height) // 2, (side - width) // 2
    colour, alpha = rgba[:height, :width, :3], rgba[:height, :width, 3:]
    paper[top : top + height, left : left + width] = colour * alpha + (1.0 - alpha)
    return paper


class _Child:
    """The rendering process: started at the first drawing, started anew after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def render(self, svg: str, side: int) -> bytes:
        """The drawing as PNG.

        Raises:
            DrawingError: for what the renderer refuses, and where it took too much time or memory.
        """
        content = svg.encode("utf-8")
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(f"{side} {len(content)}\n".encode() + content)
                process.stdin.flush()
                kind, _, size = process.stdout.readline().decode().partition(" ")
                answer = process.stdout.read(int(size)) if size else b""
            except OSError:
                kind = ""
            if kind not in ("png", "error"):
                self._stop()
                raise DrawingError("rendering it takes too much time or memory")
        if kind == "error":
            raise DrawingError(f"it cannot be rendered: {answer.decode('utf-8', 'replace')[:200]}")
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            # By its path: the child needs nothing of this package but that file.
            command = [sys.executable, "-P", str(Path(__file__).with_name("renderer.py"))]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
            atexit.register(self._stop)
        return self._process

    def _stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        continue
        self._process = None


_CHILD = _Child()
