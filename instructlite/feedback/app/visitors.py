"""Who is asking: a voter by the cookie of his browser, or somebody who has logged in.

Passwords are kept as scrypt hashes in memory, sessions until the server ends. Without a login every browser is a voter of its own.
"""

import hashlib
import html
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import InstructLiteError
from ..store import MAX_NAME, Store
from .guard import Bucket, address

VOTER, SESSION = "instructlite_voter", "instructlite_session"
SESSION_SECONDS, VOTER_SECONDS = 12 * 3600, 365 * 24 * 3600
MIN_PASSWORD = 8
TRIES_PER_MINUTE = 6
MAX_SESSIONS = 10_000


class Users:
    """Names and passwords. The latter are not kept, only what they hash to."""

    def __init__(self, passwords: Mapping[str, str]):
        self._salt = secrets.token_bytes(16)
        self._hashes = {name: self._hash(password) for name, password in passwords.items()}
        self._nobody = self._hash(secrets.token_urlsafe())

    def __len__(self) -> int:
        return len(self._hashes)

    def knows(self, name: str, password: str) -> bool:
        """Takes as long for a name that is not there."""
        expected = self._hashes.get(name, self._nobody)
        return secrets.compare_digest(self._hash(password), expected) and name in self._hashes

    def _hash(self, password: str) -> bytes:
        return hashlib.scrypt(password.encode("utf-8", "replace"), salt=self._salt, n=2**14, r=8, p=1)


def read_users(logins: Sequence[str]) -> Users:
    """From `name:password` and from files of such lines, which nobody else on this machine may read."""
    found: dict[str, str] = {}
    for given in logins:
        path = Path(given)
        if path.is_file():
            if path.stat().st_mode & 0o077:
                raise InstructLiteError(f"--login {given}: others on this machine may read it (chmod 600 {given})")
            lines = path.read_text(encoding="utf-8").splitlines()
            pairs = [(f"{given}:{number}", line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
        elif ":" in given:
            pairs = [("--login", given)]
        else:
            raise InstructLiteError(f"--login {given}: neither a file nor name:password")
        for where, line in pairs:
            name, _, password = line.strip().partition(":")
            if not name or len(name) > MAX_NAME or len(password) < MIN_PASSWORD:
                raise InstructLiteError(f"{where}: expected name:password, the password of at least {MIN_PASSWORD} characters")
            found[name] = password
    if not found:
        raise InstructLiteError(f"--login {' '.join(logins)}: holds no name:password")
    return Users(found)


class Visitors:
    """ASGI middleware that knows every visitor; `key` tells the pages who he is.

    users: None lets everybody in. Cookies are out of reach of scripts; over HTTPS they are sent over HTTPS only.
    """

    def __init__(self, app: Callable, store: Store, users: Users | None, *, framed: bool = False):
        self.app, self.store, self.users, self.framed = app, store, users, framed
        self._sessions: dict[str, tuple[str, float]] = {}
        self._tries = Bucket(TRIES_PER_MINUTE)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            request = Request(scope, receive)
            path = scope["path"]
            if path in ("/login", "/logout"):
                await (await self._login(request) if path == "/login" else self._logout(request))(scope, receive, send)
                return
            if self.users and not self.name(request) and not path.startswith(("/ui/", "/favicon")):
                page = request.method in ("GET", "HEAD") and path.rstrip("/").count("/") <= 1
                refused: Response = RedirectResponse("/login", 303) if page else Response("log in first", 401)
                await refused(scope, receive, send)
                return
            if not self.users and request.method == "GET" and path.rstrip("/") == "/arena":
                send = await self._introduced(request, send)
        await self.app(scope, receive, send)

    def name(self, request: HTTPConnection) -> str | None:
        """Of somebody who has logged in."""
        name, until = self._sessions.get(request.cookies.get(SESSION, ""), (None, 0.0))
        return name if until > time.time() else None

    def key(self, request: HTTPConnection) -> str:
        """The key of the voter whose request it is. Raises InstructLiteError for a browser that sends no cookie of ours."""
        if self.users:
            name = self.name(request)
            if name is None:
                raise InstructLiteError("your login has ended (load the page again)")
            return self.store.voter(name=name).key
        if key := request.cookies.get(VOTER):
            return key
        raise InstructLiteError("this browser is not known (allow cookies for this page and load it again)")

    async def _introduced(self, request: Request, send: Callable) -> Callable:
        """A cookie for a browser that has none yet, with the page that needs it."""
        key = request.cookies.get(VOTER)
        voter = await to_thread.run_sync(self.store.voter, key)
        if voter.key == key:
            return send

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                cookies = Response()
                self._set(request, cookies, VOTER, voter.key, VOTER_SECONDS)
                MutableHeaders(scope=message).append("set-cookie", cookies.headers["set-cookie"])
            await send(message)

        return sending

    async def _login(self, request: Request) -> Response:
        if not self.users or self.name(request):
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return _login_page()
        form = await request.form()
        name, password = (str(form.get(field, ""))[:200] for field in ("name", "password"))
        if not (self._tries.take(address(request)) and self._tries.take(f"name {name}")):
            return _login_page("Too many tries. Wait a minute.", 429)
        if not await to_thread.run_sync(self.users.knows, name, password):
            return _login_page("This name and password do not match.", 403)
        if len(self._sessions) >= MAX_SESSIONS:
            self._sessions = {token: session for token, session in self._sessions.items() if session[1] > time.time()}
        token = secrets.token_urlsafe(32)
        self._sessions[token] = (name, time.time() + SESSION_SECONDS)
        response = RedirectResponse("/", 303)
        self._set(request, response, SESSION, token, SESSION_SECONDS)
        return response

    def _logout(self, request: Request) -> Response:
        self._sessions.pop(request.cookies.get(SESSION, ""), None)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(SESSION)
        return response

    def _set(self, request: HTTPConnection, response: Response, name: str, value: str, seconds: int) -> None:
        secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto", "").startswith("https")
        # In a frame of another site (a Space's page) a browser sends no other kind; whose request it is, the origin tells.
        across = "none" if self.framed and secure else "lax"
        response.set_cookie(name, value, max_age=seconds, httponly=True, secure=secure, samesite=across)


_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Log in · InstructLite</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="/ui/icon.svg"><link rel="stylesheet" href="/ui/login.css"></head><body><main>
<h1>InstructLite</h1><p role="alert">{said}</p>
<form method="post" action="/login">
<label>Name <input name="name" autocomplete="username" required maxlength="80" autofocus></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required maxlength="200"></label>
<button>Log in</button></form></main></body></html>"""


def _login_page(said: str = "", status: int = 200) -> HTMLResponse:
    return HTMLResponse(_LOGIN.format(said=html.escape(said)), status)
