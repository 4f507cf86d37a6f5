"""The OpenAI-compatible endpoint: what its own client sees, who is let in, and what is refused."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import uvicorn
from test_compare import make_adapter

from instructlite import cli
from instructlite.config import BaseOptions
from instructlite.models.base import load_base
from instructlite.models.engine import Engine, Limits
from instructlite.models.sampling import Sampling
from instructlite.sharing.endpoint import endpoint

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sft = make_adapter(base, directory / "sft", 1)
    make_adapter(base, directory / "ppo", 2, parents={"sft": sft.sha256})
    return directory


class Served:
    """The endpoint in a thread, on a port of its own."""

    def __init__(self, engine: Engine, key: str | None = None):
        self.engine = engine
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(endpoint(engine, key), log_level="error", timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def served(run):
    limits = Limits(waiting=4, rows=8, characters=500, new_tokens=64)
    with Engine.load(run, BaseOptions(dtype="float32"), limits=limits) as engine, Served(engine) as served:
        yield served


@pytest.fixture(scope="module")
def answers(served):
    """Greedy answers by the engine itself."""
    names = [pane.name for pane in served.engine.panes]
    texts = served.engine.submit(ASK, names, Sampling(max_new_tokens=12, temperature=0)).result().texts
    assert len(set(texts)) == len(names) == 3, "else a wrong adapter would not be seen"
    return dict(zip(names, texts, strict=True))


def test_the_models_name_picks_the_adapter(served, answers):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", "sft", "ppo"]
    for name, text in answers.items():
        reply = client.chat.completions.create(model=name, messages=ASK, **GREEDY)
        assert reply.choices[0].message.content == text
        assert reply.model == name
        assert reply.choices[0].finish_reason in ("stop", "length")
        assert reply.usage.prompt_tokens > 0
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    parts = [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}]
    reply = client.chat.completions.create(model="ppo", messages=[{"role": "user", "content": parts}], **GREEDY)
    assert reply.choices[0].message.content == answers["ppo"]


def test_a_streamed_answer_comes_in_pieces_and_is_the_whole_one(served, answers):
    stream = served.client().chat.completions.create(
        model="ppo", messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == answers["ppo"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0
    raw = httpx2.post(f"{served.url}/v1/chat/completions", json={"model": "ppo", "messages": ASK, "stream": True, **GREEDY})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_requests_for_different_adapters_are_answered_in_one_batch(served, answers, monkeypatch):
    together, lockstep = [], served.engine._lockstep
    step = lockstep.step

    def watched() -> None:
        together.append({row.role for row in lockstep.rows})
        time.sleep(0.02)
        step()

    monkeypatch.setattr(lockstep, "step", watched)
    client = served.client()

    def ask(name: str) -> str:
        return client.chat.completions.create(model=name, messages=ASK, **GREEDY).choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, answers)) == list(answers.values())
    assert max(map(len, together)) == 3


def test_n_answers_differ_and_a_seed_repeats_them(served):
    client = served.client()

    def ask(**options) -> list[str]:
        reply = client.chat.completions.create(model="sft", messages=ASK, max_tokens=12, n=3, **options)
        return [choice.message.content for choice in reply.choices]

    first = ask(seed=4)
    assert len(set(first)) == 3
    assert ask(seed=4) == first != ask()


@pytest.mark.parametrize(
    ("changes", "status", "match"),
    [
        ({"model": "gpt-4"}, 404, "there are base, sft, ppo"),
        ({"messages": []}, 400, "conversation"),
        ({"messages": [{"role": "user", "content": "x" * 501}]}, 400, "501 characters"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "only text"),
        ({"max_tokens": 65}, 400, "at most 64"),
        ({"max_tokens": "many"}, 400, "max_new_tokens"),
        ({"max_tokens": 0}, 400, "max_new_tokens"),
        ({"n": 0}, 400, "n from 1"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 9}, 400, "n from 1 to 8"),
        ({"seed": "x"}, 400, "seed"),
        ({"stop": ["."]}, 400, "'stop' is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, 413, "bytes"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_words(served, changes, status, match):
    body = {"model": "ppo", "messages": ASK, **changes}
    reply = httpx2.post(f"{served.url}/v1/chat/completions", json=body)
    assert reply.status_code == status
    assert match in reply.json()["error"]["message"]
    assert not served.engine._waiting and not served.engine._running


def test_options_that_ask_for_nothing_are_taken(served, answers):
    reply = served.client().chat.completions.create(
        model="ppo", messages=ASK, frequency_penalty=0, presence_penalty=0.0, user="me", tools=[], stop=None, top_p=1, **GREEDY
    )
    assert reply.choices[0].message.content == answers["ppo"]


def test_no_json_and_pages_of_other_sites_are_refused(served):
    url = f"{served.url}/v1/chat/completions"
    assert httpx2.post(url, content="{", headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx2.post(url, content="[" * 4000, headers={"Content-Type": "application/json"}).status_code == 400
    assert (
        httpx2.post(url, content=json.dumps({"model": "ppo", "messages": ASK}), headers={"Content-Type": "text/plain"}).status_code == 415
    )
    assert httpx2.get(f"{served.url}/v1/models", headers={"Host": "rebound.example"}).status_code == 400


def test_who_leaves_ends_the_answer(served, monkeypatch):
    engine, gate, streams = served.engine, threading.Event(), []
    step, submit = engine._lockstep.step, engine.submit
    monkeypatch.setattr(engine._lockstep, "step", lambda: (gate.wait(60), step()))
    monkeypatch.setattr(engine, "submit", lambda *given, **options: (streams.append(submit(*given, **options)), streams[-1])[1])
    body = {"model": "base", "messages": ASK, "max_tokens": 64, "n": 2, "temperature": 3.0}
    url = f"{served.url}/v1/chat/completions"
    for _ in range(2):
        with httpx2.stream("POST", url, json=body | {"stream": True}, timeout=60) as reply:
            assert next(reply.iter_lines()).startswith("data: ")
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(url, json=body, timeout=httpx2.Timeout(60, read=0.3))
    deadline = time.monotonic() + 30
    while not (len(streams) == 3 and all(stream.cancelled for stream in streams)) and time.monotonic() < deadline:
        time.sleep(0.02)
    cancelled = [stream.cancelled for stream in streams]
    gate.set()
    assert cancelled == [True] * 3
    assert all(stream.result().finish for stream in streams)


def test_too_many_are_turned_away_with_when_to_come_back(served, monkeypatch):
    lockstep, step, gate = served.engine._lockstep, served.engine._lockstep.step, threading.Event()
    monkeypatch.setattr(lockstep, "step", lambda: (gate.wait(60), step()))
    streams = [served.engine.submit(ASK, ["base"] * 8, Sampling(64, temperature=3.0))]
    while not served.engine._running:
        time.sleep(0.01)
    streams += [served.engine.submit(ASK, ["base"], Sampling(4)) for _ in range(4)]
    reply = httpx2.post(f"{served.url}/v1/chat/completions", json={"model": "base", "messages": ASK}, timeout=60)
    for stream in streams:
        stream.cancel()
    gate.set()
    assert [None in stream.result().finish for stream in streams] == [False] * 5
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "1"


def test_with_a_key_only_who_has_it_is_answered(run):
    with Engine.load(run / "sft", BaseOptions(dtype="float32")) as engine, Served(engine, key="sesame") as served:
        assert served.client("sesame").chat.completions.create(model="sft", messages=ASK, **GREEDY).choices
        with pytest.raises(openai.AuthenticationError):
            served.client("Sesame").models.list()
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").chat.completions.create(model="sft", messages=ASK)
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401
        assert httpx2.get(f"{served.url}/health", headers={"Host": "any.example"}).json() == {"status": "ok"}


def test_the_command_refuses_other_addresses_without_a_key(run, capsys, monkeypatch):
    monkeypatch.delenv("INSTRUCTLITE_API_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", str(run), "--host", "0.0.0.0"])
    assert end.value.code == 2
    assert "set INSTRUCTLITE_API_KEY" in capsys.readouterr().err


def test_the_command_serves_a_run_until_it_is_stopped(run):
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    command = [sys.executable, "-m", "instructlite", "serve", str(run), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/v1 answers as base, sft, ppo. Ctrl-C ends it.\n"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=8)
        assert client.chat.completions.create(model="ppo", messages=ASK, max_tokens=3).choices
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and not errors, errors
