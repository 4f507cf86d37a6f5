"""The pages on the tiny model, served in a thread, and a Chromium that looks at them."""

import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from test_compare import make_adapter

from instructlite.config import BaseOptions
from instructlite.feedback.app.server import Address, application
from instructlite.feedback.store import Store
from instructlite.models.base import load_base
from instructlite.models.engine import Engine, Limits

NAMES = ("zebra", "quokka")  # of adapters: words that stand nowhere by chance


def make_run(directory: Path, tiny_path: Path) -> Path:
    """Two adapters that answer and a reward model, of one base."""
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    zebra = make_adapter(base, directory / "zebra", 1)
    make_adapter(base, directory / "quokka", 2, parents={"zebra": zebra.sha256})
    make_adapter(base, directory / "reward", 3, reward=True, parents={"zebra": zebra.sha256})
    return directory


class Recorder:
    """ASGI around the application: every byte that it sends, while asked to."""

    def __init__(self, app):
        self.app, self.sent, self.on = app, bytearray(), False

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if self.on:
                self.sent += message.get("body", b"") + repr(message.get("headers", "")).encode()
            await send(message)

        await self.app(scope, receive, sending)


class Served:
    def __init__(self, engine, store, **options):
        self.engine, self.store = engine, store
        self.recorder = Recorder(application(engine, store, address=Address(), **options))
        self._server = uvicorn.Server(uvicorn.Config(self.recorder, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)


@contextmanager
def served(run: Path, limits: Limits | None = None, **options):
    store = Store(run)
    with Engine.load(run, BaseOptions(dtype="float32"), limits=limits) as engine, Served(engine, store, **options) as server:
        yield server
    store.close()


CHOOSING = """before => document.querySelector('#asked').innerText !== before && document.querySelector('#vote-1:enabled')
  && [...document.querySelectorAll('#answers .card h3')].map((title) => title.innerText).join() === 'Answer A,Answer B'"""


class Visit:
    """A browser of one visitor; what his page asks of others, and what runs there that should not, is kept."""

    def __init__(self, browser, server, **options):
        self.server = server
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.context.set_default_timeout(900_000)  # a busy machine, or one on which this was halted for a while
        self.page = self.context.new_page()
        self.outside, self.alarms = [], []
        self.page.on("request", lambda request: self.outside.append(request.url) if not self._own(request.url) else None)
        self.page.on("dialog", lambda dialog: (self.alarms.append(dialog.message), dialog.dismiss()))
        self.page.on("popup", lambda popup: self.alarms.append(popup.url))

    def _own(self, url: str) -> bool:
        return url.startswith((self.server.url + "/", "data:", "blob:" + self.server.url))

    def open(self, page: str):
        """The page, once what its load event says is there. That of Compare says nothing: it answers as soon as it is to be seen."""
        self.page.goto(f"{self.server.url}/{page}/")
        if page == "compare":
            self.page.wait_for_selector("#send")
        else:
            self.page.wait_for_function("document.querySelector('#status, #insight')?.innerText.trim()")
        return self.page

    def said(self, pattern: str) -> str:
        """Waits until the status line matches."""
        self.page.wait_for_function("pattern => new RegExp(pattern).test(document.querySelector('#status')?.innerText ?? '')", arg=pattern)
        return self.page.locator("#status").inner_text()

    def choosing(self, before: str = "") -> list[str]:
        """Waits for answers to another prompt than before that can be voted on, their names not told; gives them."""
        self.page.wait_for_function(CHOOSING, arg=before)
        return self.texts("#answers")

    def unfold(self, button: str, shows: str):
        """Click a button that shows fields, of which `shows` selects one."""
        self.page.get_by_role("button", name=button).click()
        self.page.wait_for_selector(shows)
        # Until a frame after they have appeared, which no hand is quick enough for, Gradio sets fields to what they were.
        self.page.evaluate("() => new Promise((seen) => requestAnimationFrame(() => requestAnimationFrame(seen)))")

    def settings(self, **values):
        """Fields of the compare page by their ids."""
        self.unfold("Panes, system prompt, sampling", "#length input[type=number]")
        for name, value in values.items():
            field = self.page.locator(f"#{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
            assert field.input_value() == str(value)

    def ask(self, prompt: str):
        self.page.locator("#prompt textarea").fill(prompt)
        self.page.click("#send")

    def texts(self, inside: str = "#now") -> list[str]:
        return [re.sub("\r\n?", "\n", text) for text in self.page.locator(f"{inside} .card .text").all_text_contents()]

    def close(self):
        self.context.close()
