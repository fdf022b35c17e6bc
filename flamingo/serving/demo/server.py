"""Where the page is served, and what every answer of the server tells the browser."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# The browser loads nothing from anywhere else, and no other site may show the page in a frame.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
# Parts of Gradio's server that this page has no use for: fetching for others, its API's description,
# and whatever loads code or components.
CLOSED = ("proxy=", "info", "openapi.json", "component_server", "process_recording", "monitoring", "stream/")


@dataclass(frozen=True)
class Place:
    """root_path: where a proxy shows the page, as /demo or https://host/demo; empty without one."""

    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""

    def check(self) -> None:
        """Raises ValueError where the port is taken, or the host is none of this machine's."""
        try:
            family, kind, number, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, number) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
        except OSError as error:
            raise ValueError(
                f"{self.host}:{self.port} cannot be used ({error.strerror or error}): choose another with "
                "--port, or --host"
            ) from None


class Guard:
    """ASGI middleware: sets `HEADERS` on every answer, and answers 404 for what is `CLOSED`."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        if closed(scope["path"]):
            head = [(b"content-type", b"text/plain")]
            await guarded({"type": "http.response.start", "status": 404, "headers": head})
            await guarded({"type": "http.response.body", "body": b"not here"})
            return
        await self.app(scope, receive, guarded)


def closed(path: str) -> bool:
    """Whether a path of Gradio's server, with or without its prefix, is one of `CLOSED`."""
    return path.strip("/").removeprefix("gradio_api/").startswith(CLOSED)
