"""What stands before the app: who may ask, how much, and what a browser may do with the answers.

The page shows training text, which nobody vouches for, and the app asks a server that trusts this machine. So: only the
page's own origin may ask; its Host must be one that no other site can point here (DNS rebinding); and a page that was
somehow made to run foreign code could not load or send any.
"""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import problem

MAX_BODY_BYTES = 1 << 20
HEADERS = {
    # Plotly writes styles into the page; images are its charts on their way to a PNG.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests of strangers, and sends the headers above with every answer.

    Args:
        app: what it guards.
        hosts: names that requests may be for, beside localhost and IP addresses: a name that an attacker owns can be
            pointed here, an address can't.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await problem(*refusal)(scope, receive, send_guarded)
            return
        body = await _body(receive)
        if body is None:
            text = f"the request is too large, expected at most {MAX_BODY_BYTES:,} bytes"
            await problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)(scope, receive, send_guarded)
            return
        messages = [body]

        async def receive_whole() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_whole, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> tuple[HTTPStatus, str] | None:
        host = headers.get("host", "")
        if not self._knows(host):
            text = f"this explorer does not answer for the host {host!r}; open it by localhost or its address"
            return HTTPStatus.MISDIRECTED_REQUEST, text
        if method in ("GET", "HEAD"):
            return None
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return HTTPStatus.FORBIDDEN, "only the explorer's own page may ask"
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # The one type of these that a browser sends to another origin only after asking leave, which none gets.
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json"
        return None

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
            if name is None or name in self._hosts:
                return name is not None
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def _body(receive: Receive) -> Message | None:
    """The whole request body as one message. None: it is too large."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return message
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            return None
    return {"type": "http.request", "body": b"".join(parts), "more_body": False}
