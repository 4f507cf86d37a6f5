"""What stands between the network and the pages: who may ask, what there is to ask for, how much, and what a browser may do with it.

Gradio serves files, uploads, a proxy and an API that these pages do not use, and answers requests of foreign sites on a public
host. So only the routes named here exist, and each request passes host, origin, size and rate before Gradio sees it.
"""

import re
import time
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

Scope, Receive, Send = dict[str, Any], Callable[[], Awaitable[dict]], Callable[[dict], Awaitable[None]]

MAX_BODY = 2_000_000  # bytes: nine edited answers, and what Gradio wraps around them
POSTS_PER_MINUTE = 240  # of one address; each click, and each tick of the insight page, is one
_POLICY = (
    # Scripts of the page itself only, and none in attributes: an injected onerror= would not run even if it were not escaped.
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; frame-src 'none'; object-src 'none'; form-action 'self'; "
    "base-uri 'self'; frame-ancestors {ancestors}"
)
_NAME = r"[\w-][\w.-]*"
_READ = re.compile(
    rf"/|/login|/favicon\.ico|/ui/{_NAME}|(?P<page>/[a-z]+)(/|/config/?|/theme\.css|/(assets|static)(/{_NAME})+|/svelte(/{_NAME})+|/manifest\.json"
    rf"|/gradio_api/(theme\.css|startup-events|queue/data|heartbeat/{_NAME}|app_id/?))?",
    re.ASCII,
)
_WRITE = re.compile(r"/login|/logout|(?P<page>/[a-z]+)/gradio_api/(queue/join|cancel|reset/?)", re.ASCII)


class Bucket:
    """So many requests a minute of each key; what was not used adds up to one minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> bool:
        now = self._clock()
        if len(self._left) > 10_000:  # whoever waited a minute has a full bucket again, known or not
            self._left = {key: (left, then) for key, (left, then) in self._left.items() if now - then < 60}
        left, then = self._left.get(key, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        self._left[key] = (left - 1 if left >= 1 else left, now)
        return left >= 1


class Guard:
    """ASGI middleware around the whole application.

    pages: the paths that Gradio is mounted at. loopback: answer only to the names of this machine, so that a foreign name which
    resolves to 127.0.0.1 gets nothing. ancestors: who may show the pages in a frame.
    """

    def __init__(self, app: Callable, *, pages: Iterable[str], loopback: bool, ancestors: str = "'self'"):
        self.app, self.pages, self.loopback = app, set(pages), loopback
        self.policy = _POLICY.format(ancestors=ancestors)
        self.bucket = Bucket(POSTS_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page uses websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        send = self._with_headers(scope["path"], send)
        request = Request(scope)
        refused = self._refusal(request)
        if refused:
            await refused(scope, receive, send)
            return
        await self.app(scope, _limited(receive), send)

    def _refusal(self, request: Request) -> Response | None:
        headers, path = request.headers, request.url.path
        if self.loopback and not _is_this_machine(_hostname(headers.get("host", ""))):
            return _refuse(403, "this server answers only on this machine")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        reading = request.method in ("GET", "HEAD")
        if foreign or (not reading and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            return _refuse(403, "a request from another site")
        known = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(request.method)
        if known is None:
            return _refuse(405, "not allowed")
        found = known.fullmatch(path)
        if not found or (found["page"] and found["page"] not in self.pages):
            return _refuse(404, "not found")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return _refuse(413, f"more than {MAX_BODY:,} bytes")
        if request.method == "POST" and not self.bucket.take(address(request)):
            return _refuse(429, "too many requests from your address; wait a minute")
        return None

    def _with_headers(self, path: str, send: Send) -> Send:
        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.lower().startswith("access-control-")]:
                    del headers[name]
                headers["Content-Security-Policy"] = self.policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                headers["Permissions-Policy"] = "camera=(), microphone=(), geolocation=()"
                if not re.search(r"/(assets|static|svelte|ui)/", path):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        return sending


def _limited(receive: Receive) -> Receive:
    """A body that came without a length, and goes on and on, is cut off."""
    seen = 0

    async def receiving() -> dict:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            return {"type": "http.disconnect"}
        return message

    return receiving


def address(request: Request) -> str:
    """Of whoever is at the other end of the connection: a header that says otherwise could say anything."""
    return request.client.host if request.client else ""


def _hostname(host: str) -> str:
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def _is_this_machine(name: str) -> bool:
    return name == "localhost" or is_loopback(name)


def is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _refuse(status: int, why: str) -> Response:
    return PlainTextResponse(why, status_code=status)
