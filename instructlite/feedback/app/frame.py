"""What the pages share: the frame around them, and how their events are wired."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import gradio as gr

from ...errors import InstructLiteError
from .examples import EXAMPLES
from .guard import address
from .streams import Streams
from .visitors import Visitors

TITLES = {"/compare": "Compare", "/arena": "Vote", "/insight": "Insight"}


class Frame:
    """pages: those that are served, in the order of the navigation."""

    def __init__(self, pages: Sequence[str], visitors: Visitors):
        self.pages, self.visitors, self.streams = tuple(pages), visitors, Streams()
        self._newest: dict[str, object] = {}

    @contextmanager
    def page(self, path: str, title: str, lead: str) -> Iterator[gr.Blocks]:
        with gr.Blocks(title=f"{title} · InstructLite", analytics_enabled=False) as blocks:
            gr.HTML(self._top(path), elem_id="top")
            gr.HTML(f'<div class="lead"><h1>{title}</h1><p>{lead}</p></div>')
            yield blocks
        blocks.queue(max_size=256, api_open=False, default_concurrency_limit=None)

    def _top(self, path: str) -> str:
        current = {page: ' aria-current="page"' if page == path else "" for page in self.pages}
        links = "".join(f'<a href="{page}/"{current[page]}>{TITLES[page]}</a>' for page in self.pages)
        leave = '<form method="post" action="/logout"><button>Log out</button></form>' if self.visitors.users else ""
        return f'<header class="top"><strong>InstructLite</strong><nav aria-label="Pages">{links}</nav>{leave}</header>'

    @staticmethod
    def on(events: Any, does: Callable | None, inputs: Any, outputs: Any, **more: Any) -> Any:
        """Wire events, all alike: not in the API's description, no progress bars over what is being read.

        Several events are one to Gradio: while what one of them began goes on, the others begin nothing.
        """
        alike = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None} | more
        return gr.on(events, does, inputs, outputs, **alike)

    async def while_newest(self, page: str, changes: AsyncIterator[dict]) -> AsyncIterator[dict | None]:
        """What a request changes on its page, until something newer is asked there; None in place of the first change that is too late.

        Who votes and presses N at once would otherwise see the voted answers again, below the next prompt, when their scores come.
        """
        self._newest[page] = mine = object()
        try:
            async with aclosing(changes):
                async for change in changes:
                    if self._newest.get(page) is not mine:
                        yield None
                        return
                    yield change
        except InstructLiteError:
            if self._newest.get(page) is mine:
                raise
            yield None
        finally:
            if self._newest.get(page) is mine:
                del self._newest[page]

    def begin_anew(self, page: str) -> None:
        """Whatever was asked on the page before comes too late."""
        self._newest.pop(page, None)

    def who(self, request: gr.Request) -> str:
        """Whose requests are counted together."""
        return self.visitors.name(request.request) or address(request.request)

    def stop(self, request: gr.Request) -> None:
        """End what this page is waiting for."""
        self.streams.stop(request.session_hash)


def examples() -> gr.Dropdown:
    choices = [(f"{use_case}: {text}", text) for use_case, text in EXAMPLES]
    return gr.Dropdown(choices, value=None, label="Example prompts by use case", elem_id="example")
