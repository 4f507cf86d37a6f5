"""The pages, and a hundred visitors at once, each from an address of his own."""

import html
import json
import multiprocessing
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import pytest
from browsing import make_run, served

from instructlite.config import BaseOptions
from instructlite.feedback.app.markup import escape
from instructlite.models.engine import Engine, Limits
from instructlite.models.sampling import Sampling

pytestmark = [
    pytest.mark.slow,  # minutes beside other tests
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers at all of 127.0.0.0/8, and has /proc"),
]
VISITORS, TOKENS = 100, 12
CARD = re.compile(r'aria-label="([^"]*), answer 1".*?<div class="text" dir="auto">(.*?)</div>', re.DOTALL)
BUSY = re.compile(r"busy: \d+ requests are waiting already; try again in a moment")


def serve(run: Path, sender: Connection) -> None:
    with served(run, limits=Limits(waiting=4)) as server:
        sender.send(server.url)
        sender.recv()


@contextmanager
def process_of(run: Path):
    """The pages in a process of their own, whose memory is nobody else's; yields it and where it serves."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(run, there))
    process.start()
    try:
        yield process, here.recv()
    finally:
        here.send("enough")
        process.join()


class Visitor:
    """What a page sends and reads, without the page."""

    def __init__(self, url: str, number: int):
        transport = httpx.HTTPTransport(local_address=f"127.0.1.{number + 1}")  # by it requests are counted
        self.http = httpx.Client(base_url=f"{url}/compare", transport=transport, timeout=900)
        self.number, self.asked, self.refused = number, 0, 0
        config = self.http.get("/config").json()
        parts = {part["id"]: part["props"] for part in config["components"]}
        self.button = next(number for number, props in parts.items() if props.get("elem_id") == "send")
        self.event = next(one for one in config["dependencies"] if [self.button, "click"] in one["targets"])
        self.inputs = {parts[number].get("elem_id"): parts[number].get("value") for number in self.event["inputs"]}
        self.outputs = [parts[number].get("elem_id") for number in self.event["outputs"]]

    def answers(self, prompt: str) -> dict[str, str]:
        """By pane; asks again when the server says that it is busy."""
        while True:
            done = self._asked(prompt)
            if cards := CARD.findall(done["now"] if isinstance(done["now"], str) else ""):
                return {name: html.unescape(text) for name, text in cards}
            assert BUSY.search(str(done["status"])), done
            self.refused += 1
            time.sleep(2)

    def _asked(self, prompt: str) -> dict[str, object]:
        self.asked += 1
        session = f"visitor{self.number}x{self.asked}"
        given = self.inputs | {"prompt": prompt, "temperature": 0, "length": TOKENS}
        body = {"data": list(given.values()), "fn_index": self.event["id"], "session_hash": session, "trigger_id": self.button}
        joined = self.http.post("/gradio_api/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        events = self.http.get("/gradio_api/queue/data", params={"session_hash": session}).text
        said = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
        done = next(one for one in said if one["msg"] == "process_completed")
        assert done["success"], done
        return dict(zip(self.outputs, done["output"]["data"], strict=True))


def resident(process: BaseProcess) -> int:
    """MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) // 1024


def test_a_hundred_visitors_at_once_get_their_own_answers(tiny_path, tmp_path):
    run = make_run(tmp_path / "run", tiny_path)
    prompts = [f"Say {number}" + " again" * (number % 7) for number in range(VISITORS)]
    with Engine.load(run, BaseOptions(dtype="float32")) as engine:
        names = [pane.name for pane in engine.panes]
        expected = []
        for prompt in prompts:
            asked = engine.submit([{"role": "user", "content": prompt}], names, Sampling(TOKENS, temperature=0))
            expected.append({name: html.unescape(escape(text)) for name, text in zip(names, asked.result().texts, strict=True)})
    with process_of(run) as (process, url), ThreadPoolExecutor(VISITORS) as pool:
        visitors = [Visitor(url, number) for number in range(VISITORS)]
        memory = []
        for _ in range(3):
            found = list(pool.map(Visitor.answers, visitors, prompts))
            memory.append(resident(process))
            assert found == expected
    assert sum(visitor.refused for visitor in visitors) > 0, "nobody had to wait"
    # Gradio keeps the state of each page that was opened, some 0.1 MB, and here every try opens one; nothing else grows.
    assert memory[2] - memory[1] <= 64, f"{memory} MB: it grows with every hundred"
