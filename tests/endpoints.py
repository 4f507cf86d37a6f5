"""Stand-ins for whoever answers: an OpenAI-compatible endpoint on loopback, and a completer in memory.

What they answer, how late and how badly is the test's to say.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from instructlite.data.generating.completer import Answer


@dataclass
class Reply:
    """What the server sends. A text becomes the content of a chat completion; bytes are sent as they are."""

    content: str | bytes | None
    status: int = 200
    finish_reason: str = "stop"
    usage: dict | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15})

    def body(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        return json.dumps(reply | ({"usage": self.usage} if self.usage else {})).encode()


@dataclass
class StandIn:
    url: str
    asked: list[dict] = field(default_factory=list)
    """The bodies of all requests, in the order in which they came."""
    headers: list[dict] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


@contextmanager
def stand_in(answer: Callable[[str, int], Reply | str]) -> Iterator[StandIn]:
    """Serve chat completions: `answer(the last message, how often it was asked before)`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                before = server.prompts.count(prompt)
                server.asked.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
            given = answer(prompt, before)
            reply = Reply(given) if isinstance(given, str) else given
            sent = reply.body()
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                if reply.status != 200:
                    self.send_header("retry-after-ms", "5")  # the openai client waits as long as this says
                self.end_headers()
                self.wfile.write(sent)
            except OSError:
                pass  # who asked has hung up

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = StandIn(f"http://127.0.0.1:{http.server_port}/v1")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


class FakeCompleter:
    """Answers by a function of the last message; notes what it was asked."""

    def __init__(self, answer=lambda text: f"to {text}", parallel=1, batch_size=1):
        self.model = self.identity = "fake"
        self.answer, self.parallel, self.batch_size, self.asked = answer, parallel, batch_size, []

    def complete(self, requests):
        assert len(requests) <= self.batch_size
        texts = [request.messages[-1]["content"] for request in requests]
        self.asked += texts
        given = [self.answer(text) for text in texts]
        return [said if isinstance(said, Answer) else Answer(said, prompt_tokens=10, completion_tokens=5) for said in given]
