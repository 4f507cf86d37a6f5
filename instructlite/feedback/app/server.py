"""The application: three pages behind one guard, and the process that serves them."""

import logging
import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.responses import FileResponse, RedirectResponse, Response

from ...errors import InstructLiteError
from ...models.engine import Engine
from ...models.sampling import Sampling
from ..store import Store
from .arena import arena_page
from .booth import Booth
from .compare import compare_page
from .frame import TITLES, Frame
from .guard import Guard, is_loopback
from .insight_page import insight_page
from .theme import HEAD, STATIC, theme
from .visitors import Users, Visitors

PAGES = tuple(TITLES)
_SPACES = "'self' https://huggingface.co https://*.hf.space"


@dataclass(frozen=True)
class Address:
    """Where the pages are served. `behind_proxy`: on a machine that decides itself who gets here, as Hugging Face Spaces does."""

    host: str = "127.0.0.1"
    port: int = 7860
    behind_proxy: bool = False

    def check(self, users: Users | None) -> None:
        """Raises InstructLiteError for an address that others reach while nobody has to log in."""
        if not (is_loopback(self.host) or users or self.behind_proxy):
            raise InstructLiteError(f"--host {self.host} lets others in, so it needs --login NAME:PASSWORD or --login FILE")

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def application(
    engine: Engine,
    store: Store,
    *,
    prompts: Sequence[dict] = (),
    sampling: Sampling | None = None,
    users: Users | None = None,
    pages: Sequence[str] = PAGES,
    address: Address | None = None,
) -> Callable:
    """The whole application as ASGI. prompts, sampling: of the arena, see Booth."""
    address = address or Address()
    address.check(users)
    inside = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    visitors = Visitors(inside, store, users, framed=address.behind_proxy)
    frame = Frame(pages, visitors)
    made = {
        "/compare": lambda: compare_page(engine, frame),
        "/arena": lambda: arena_page(Booth(engine, store, prompts, sampling), frame),
        "/insight": lambda: insight_page(store, frame),
    }
    inside.add_api_route("/", lambda: RedirectResponse(f"{pages[0]}/"), methods=["GET"])
    inside.add_api_route("/ui/{name}", _static, methods=["GET"])
    inside.add_api_route("/favicon.ico", lambda: _static("icon.svg"), methods=["GET"])
    for path in pages:
        gr.mount_gradio_app(
            inside, made[path](), path, theme=theme(), css_paths=STATIC / "pages.css", head=HEAD, footer_links=[], run_history=False,
            show_error=False, allowed_paths=[], max_file_size=1, ssr_mode=False, enable_monitoring=False, mcp_server=False,
        )  # fmt: skip
    ancestors = _SPACES if address.behind_proxy else "'self'"
    return Guard(visitors, pages=pages, loopback=is_loopback(address.host) and not address.behind_proxy, ancestors=ancestors)


def _static(name: str) -> Response:
    files = {path.name: path for path in STATIC.iterdir()}
    if name not in files:
        return Response("not found", 404)
    return FileResponse(files[name], media_type=mimetypes.guess_type(name)[0])


def serve(app: Callable, address: Address) -> None:
    """Until Ctrl-C or SIGTERM."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, host=address.host, port=address.port, log_level="warning", access_log=False, ws="none", server_header=False,
        timeout_graceful_shutdown=3, proxy_headers=address.behind_proxy,
        forwarded_allow_ips="*" if address.behind_proxy else None,
    )  # fmt: skip
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit as error:  # uvicorn has said why, in many words
        raise InstructLiteError(f"{address.url}: cannot be served there (is the port taken? choose another with --port)") from error
