"""The newest metric line over HTTP, for Prometheus: gauges and counters at ``/metrics``, from a thread of its own.

Owns the text format and the port; knows no metric. In: metric lines and counts. Out: ``r1mega_NAME{run="..."}``, where a line's key
``NAME/SOURCE`` is ``r1mega_NAME_by_source`` with a label ``source``. Text and lists of a line are left out. Standard library alone.
"""

from __future__ import annotations

import math
import re
import socketserver
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from r1mega.config.errors import UserError

PREFIX = "r1mega_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "rollouts": "Rollouts that this process has trained on.",
    "samples": "Responses that this process has trained on.",
    "reward_failures": "Responses of which a reward failed.",
    "engine_deaths": "Servers that have died.",
    "events": "Events (skipped steps, roll-backs and the like) of metrics.jsonl that this process has written.",
}
"""Of every process: count up from 0 since its start; what a roll-back undoes stays counted."""


class Exporter:
    """One run's endpoint. Raises UserError, naming the port, where it cannot be opened. ``port`` is the one that is served."""

    def __init__(self, host: str, port: int, run: str):
        self._run, self._lock = run, threading.Lock()
        self._line: dict[str, float] = {}
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        self._time = 0.0
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.path.partition("?")[0] == "/metrics"
                body = (exporter.text() if is_known else "the metrics are at /metrics\n").encode()
                self.send_response(200 if is_known else 404)
                self.send_header("Content-Type", CONTENT_TYPE if is_known else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """A scrape is no news."""

        try:
            self._server = _Server((host, port), Handler)
        except (OSError, OverflowError) as error:
            got = f"{host}:{port}, which cannot be opened ({getattr(error, 'strerror', None) or error})"
            raise UserError(f"log.prometheus_port: a free port; got {got}; give another one, or 0 for none") from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True)
        self._thread.start()

    def line(self, values: Mapping[str, Any]) -> None:
        """``values`` are the newest line."""
        with self._lock:
            self._line = {
                name: float(value)
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self._time = time.time()

    def count(self, **more: float) -> None:
        """Add to some of :data:`COUNTERS`."""
        with self._lock:
            for name, value in more.items():
                self._counts[name] += value

    def text(self) -> str:
        """What a scrape gets."""
        with self._lock:
            line, counts, at = dict(self._line), dict(self._counts), self._time
        run = f'run="{_escaped(self._run)}"'
        parts = [_family(f"{name}_total", "counter", COUNTERS[name], [(run, value)]) for name, value in counts.items()]
        if line:
            about = "When the newest metric line was written, in seconds since 1970."
            parts.append(_family("line_timestamp_seconds", "gauge", about, [(run, at)]))
        families: dict[str, list[tuple[str, float]]] = {}
        for name, value in line.items():
            base, slash, source = name.partition("/")
            labels = f'{run},source="{_escaped(source)}"' if slash else run
            families.setdefault(f"{base}_by_source" if slash else base, []).append((labels, value))
        for name, rows in families.items():
            parts.append(_family(name, "gauge", f"{name} of the newest metric line.", rows))
        return "".join(parts)

    def close(self) -> None:
        """Free the port; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who it is, which may take long
        self.server_name, self.server_port = self.server_address[:2]


def _family(name: str, kind: str, about: str, rows: list[tuple[str, float]]) -> str:
    name = PREFIX + re.sub(r"[^A-Za-z0-9_]", "_", name)
    about = about.replace("\\", "\\\\").replace("\n", "\\n")
    body = "".join(f"{name}{{{labels}}} {_number(value)}\n" for labels, value in rows)
    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n{body}"


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
