"""A web server on this machine that fails as it is told."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><title>Sign in</title>" + b" " * 2000


class Loopback:
    """Serves `files` (path -> bytes).

    Attributes:
        faults: path -> what goes wrong with its next GETs, first to last; "*" for ever.
        asked: (method, path, Range header) of all requests.
        quirks: "no HEAD", "no Range", "other Range" (than what was asked for).
        moved: path -> address that it redirects to.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.asked: list[tuple[str, str, str]] = []
        self.quirks: set[str] = set()
        self.moved: dict[str, str] = {}
        self.over = threading.Event()

    def gets(self, path: str) -> list[str]:
        """The Range headers of all GETs of a path."""
        return [range_ for method, asked, range_ in self.asked if (method, asked) == ("GET", path)]

    def fault(self, path: str) -> str:
        left = self.faults[path]
        if not left:
            return ""
        return left[0].rstrip("*") if left[0].endswith("*") else left.pop(0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Loopback

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        served, asked = self.served, self.headers.get("Range", "")
        served.asked.append((self.command, self.path, asked))
        if self.path in served.moved:
            return self._send(302, b"", body, Location=served.moved[self.path])
        if not body and "no HEAD" in served.quirks:
            return self._send(405, b"", body)
        if self.path not in served.files:
            return self._send(404, b"<html>no such file", body, **{"Content-Type": "text/html"})
        data, tag = served.files[self.path], f'"{hash(served.files[self.path])}"'
        fault = served.fault(self.path) if body else ""
        if fault.isdigit():
            return self._send(int(fault), b"busy", body)
        if fault == "html":
            return self._send(200, PAGE, body, **{"Content-Type": "text/html; charset=utf-8"})
        if fault == "plain html":
            return self._send(200, PAGE + bytes(max(0, len(data) - len(PAGE))), body, ETag=tag)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if match and "no Range" not in served.quirks:
            start, stop = int(match[1]), int(match[2]) + 1 if match[2] else len(data)
            start += "other Range" in served.quirks
            told = f"bytes {start}-{stop - 1}/{len(data)}"
            return self._send(206, data[start:stop], body, fault, ETag=tag, **{"Content-Range": told})
        return self._send(200, data, body, fault, ETag=tag)

    def _send(self, status: int, data: bytes, body: bool, fault: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        self.wfile.write(data[: len(data) // 2] if fault else data)
        self.wfile.flush()
        if fault == "stall":
            self.served.over.wait(20)
        if fault == "reset":  # RST in place of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Loopback]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of connections that we break
    handler.served = Loopback(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield handler.served
    finally:
        handler.served.over.set()
        server.shutdown()
        server.server_close()
