"""Counters for Prometheus, in its text form. One process's own; what all share is read from the store when asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

BUCKETS = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 10.0, 60.0)


class Measures:
    """Requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[method, route, status] += 1
            self._seconds[route] += seconds  # type: ignore[assignment]
            for bucket in (*BUCKETS, float("inf")):
                if seconds <= bucket:
                    self._buckets[route, bucket] += 1

    def count_tokens(self, kind: str, count: int) -> None:
        with self._lock:
            self._tokens[kind] += count

    def text(self, gauges: Iterable[tuple[str, dict[str, str], float]]) -> str:
        """Everything, and the given gauges: (name, labels, value)."""
        with self._lock:
            lines = ["# TYPE luthier_http_requests_total counter"]
            lines += [
                _line("luthier_http_requests_total", {"method": m, "route": r, "status": str(s)}, n)
                for (m, r, s), n in sorted(self._requests.items())
            ]
            lines.append("# TYPE luthier_http_request_seconds histogram")
            for route in sorted(self._seconds):
                for bucket in (*BUCKETS, float("inf")):
                    name = "+Inf" if bucket == float("inf") else f"{bucket:g}"
                    labels = {"route": route, "le": name}
                    lines.append(_line("luthier_http_request_seconds_bucket", labels, self._buckets[route, bucket]))
                count = self._buckets[route, float("inf")]
                lines.append(_line("luthier_http_request_seconds_count", {"route": route}, count))
                lines.append(_line("luthier_http_request_seconds_sum", {"route": route}, self._seconds[route]))
            lines.append("# TYPE luthier_tokens_total counter")
            lines += [_line("luthier_tokens_total", {"kind": k}, n) for k, n in sorted(self._tokens.items())]
        seen: set[str] = set()
        for name, labels, value in gauges:
            if name not in seen:
                lines.append(f"# TYPE {name} gauge")
                seen.add(name)
            lines.append(_line(name, labels, value))
        return "\n".join(lines) + "\n"


def _line(name: str, labels: dict[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
