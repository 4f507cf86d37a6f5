"""What the pages share: the frame around them, and how their events are wired."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from .examples import EXAMPLES
from .guard import address
from .streams import Streams
from .visitors import Visitors

TITLES = {"/compare": "Compare", "/arena": "Vote", "/insight": "Insight"}


class Frame:
    """pages: those that are served, in the order of the navigation."""

    def __init__(self, pages: Sequence[str], visitors: Visitors):
        self.pages, self.visitors, self.streams = tuple(pages), visitors, Streams()

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
    def on(events: Callable | Sequence[Callable], does: Callable, inputs: Any, outputs: Any, **more: Any) -> list:
        """Wire events, all alike: not in the API's description, no progress bars over what is being read."""
        alike = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None} | more
        return [event(does, inputs, outputs, **alike) for event in (events if isinstance(events, Sequence) else [events])]

    def who(self, request: gr.Request) -> str:
        """Whose requests are counted together."""
        return self.visitors.name(request.request) or address(request.request)

    def stop(self, request: gr.Request) -> None:
        """End what this page is waiting for."""
        self.streams.stop(request.session_hash)


def examples() -> gr.Dropdown:
    choices = [(f"{use_case}: {text}", text) for use_case, text in EXAMPLES]
    return gr.Dropdown(choices, value=None, label="Example prompts by use case", elem_id="example")
