"""Whoever answers the prompts of generated data and of judging: asked once, remembered, within a budget.

A Completer only answers: an OpenAI-compatible endpoint here, a model in memory in models/completer.py. `Completions` is what the
methods talk to: it keeps every answer on disk under a hash of model, prompt and parameters, so that whoever was killed goes on
without asking twice, and it counts. An answer that is malformed or does not come is missing; none is ever made up.
"""

import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from ...errors import InstructLiteError, require
from ...progress import progress

Messages = list[dict[str, str]]

OPENAI_KEY = "OPENAI_API_KEY"
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)  # what reasoning models say before they answer


@dataclass(frozen=True)
class Request:
    """One question. `seed` tells several draws of one prompt apart; an endpoint that knows seeds draws by it."""

    messages: Messages
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0

    def key(self, identity: str) -> str:
        """What its answer is kept under. identity: the model's, see Completer."""
        content = json.dumps([identity, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back. text None: nothing usable did, and `fault` says why. truncated: cut off at max_tokens."""

    text: str | None
    fault: str = ""
    truncated: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    broken: bool = False
    """The fault is that of who answers, not of this request: enough of these in a row and asking stops."""
    requests: int = 1
    """Sent for it, repeated ones included."""
    created: str = ""
    """When it came: ISO 8601, UTC."""


def usable(text: str, *, truncated: bool, **counts: Any) -> Answer:
    """The answer without the model's thoughts; missing if nothing else is left."""
    said = _THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    if said.lstrip().startswith("<think>"):
        return Answer(None, "cut off while thinking", truncated, **counts)
    return Answer(said.strip(), "", truncated, **counts) if said.strip() else Answer(None, "empty answer", truncated, **counts)


class Completer(Protocol):
    """Anything that answers. `complete` may be called by `parallel` threads at once, with up to `batch_size` requests each."""

    model: str
    """Its name, as rows and reports show it."""
    identity: str
    """What decides whether a kept answer is still its own: for a model in memory, its weights."""
    batch_size: int
    parallel: int

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, missing ones with their fault."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent, answers from earlier runs with the same cache included; None: no limit.

    Requests are counted before they are sent; repetitions, tokens and cost are known afterwards, so what is under way may exceed them.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    """Prompts and answers together."""
    max_cost: float | None = None
    input_price: float = 0.0
    """For a million tokens of prompts, in the currency of max_cost."""
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise InstructLiteError("max_cost: what is spent cannot be told without input_price and output_price (for a million tokens)")


@dataclass
class Usage:
    """What was asked and what it took. Answers that were kept from before count in `kept` and in what was spent, not in `asked`."""

    model: str
    asked: int = 0
    kept: int = 0
    unasked: int = 0
    """What the budget did not allow; missing, too."""
    missing: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """Why answers are missing -> how many."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    """Answers whose tokens the endpoint did not count; a token is then taken for 4 characters."""
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        faults = "".join(f"; {count} missing: {fault}" for fault, count in sorted(self.faults.items(), key=lambda item: -item[1])[:3])
        cost = f", cost {self.cost:.4f}" if self.cost else ""
        return f"{self.model}: {self.asked} asked, {self.kept} kept from before, {self.tokens:,} tokens{cost}{faults}"


UNASKED = Answer(None, "not asked: the budget is spent", requests=0)


class AnswerCache:
    """Answers on disk, committed one by one: what was answered survives kill -9. Several processes may share it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lock = path, threading.Lock()
        try:
            self.database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, identity TEXT, request TEXT, text TEXT, truncated INTEGER,"
                " prompt_tokens INTEGER, completion_tokens INTEGER, requests INTEGER, created TEXT)"
            )
        except sqlite3.Error as error:
            raise InstructLiteError(f"{path}: no answers can be kept there ({error}); remove it or choose another place") from error

    def get(self, key: str) -> Answer | None:
        columns = ("text", "truncated", "prompt_tokens", "completion_tokens", "requests", "created")
        with self.lock:
            row = self.database.execute(f"SELECT {', '.join(columns)} FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        said = dict(zip(columns, row, strict=True))
        return Answer(**said | {"truncated": bool(said["truncated"])})

    def put(self, key: str, identity: str, request: Request, answer: Answer) -> None:
        said = (answer.text, answer.truncated, answer.prompt_tokens, answer.completion_tokens, answer.requests, answer.created)
        row = (key, identity, json.dumps(asdict(request), ensure_ascii=False), *said)
        with self.lock:
            self.database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def spent(self, identity: str) -> tuple[int, int, int]:
        """(requests, prompt tokens, completion tokens) of all the answers of a model that are kept here."""
        query = "SELECT SUM(requests), SUM(prompt_tokens), SUM(completion_tokens) FROM answers WHERE identity = ?"
        with self.lock:
            row = self.database.execute(query, (identity,)).fetchone()
        return row[0] or 0, row[1] or 0, row[2] or 0


class Completions:
    """Asks a completer, keeps and counts what it says.

    cache: the file of kept answers; None keeps them in memory only. give_up_after: so many broken answers in a row mean
    that whoever answers is down, or wrongly addressed.
    """

    def __init__(self, completer: Completer, cache: str | Path | None = None, budget: Budget | None = None, *, give_up_after: int = 20):
        self.completer, self.budget, self.give_up_after = completer, budget or Budget(), give_up_after
        self.cache = AnswerCache(Path(":memory:") if cache is None else Path(cache))
        self.usage = Usage(completer.model)
        self._lock, self._under_way, self._broken_in_a_row = threading.Lock(), 0, 0
        self._spend(*self.cache.spent(completer.identity))

    @property
    def model(self) -> str:
        return self.completer.model

    def ask(self, requests: Sequence[Request], label: str = "asking") -> list[Answer]:
        """One answer for each request; equal requests are asked once. Once the budget is spent, the rest is missing (UNASKED).

        Raises InstructLiteError where the completer refuses or nothing comes any more: what was answered by then is kept, and
        asking again goes on from there.
        """
        keys = [request.key(self.completer.identity) for request in requests]
        different = dict(zip(keys, requests, strict=True))
        answers = {key: answer for key in different if (answer := self.cache.get(key))}
        self.usage.kept += len(answers)
        open_keys = [key for key in different if key not in answers]
        if open_keys:
            with progress(label, len(different), len(answers)) as advance:
                self._ask_all({key: different[key] for key in open_keys}, answers, advance)
        unasked = len(different) - len(answers)
        self.usage.unasked += unasked
        self.usage.missing += unasked
        return [answers.get(key, UNASKED) for key in keys]

    def _ask_all(self, requests: dict[str, Request], answers: dict[str, Answer], advance: Callable[[int], None]) -> None:
        keys, size = list(requests), self.completer.batch_size
        batches = deque(keys[start : start + size] for start in range(0, len(keys), size))

        def work() -> None:
            while batch := self._next(batches):
                try:
                    for key, answer in zip(batch, self.completer.complete([requests[key] for key in batch]), strict=True):
                        answers[key] = self._take(key, requests[key], answer)
                finally:
                    with self._lock:
                        self._under_way -= len(batch)
                advance(len(batch))

        if self.completer.parallel == 1:
            return work()
        with ThreadPoolExecutor(self.completer.parallel) as pool:
            try:
                for worker in as_completed([pool.submit(work) for _ in range(min(self.completer.parallel, len(batches)))]):
                    worker.result()
            finally:
                batches.clear()  # after an error or Ctrl-C: what is under way is finished and kept, nothing new is asked

    def _next(self, batches: deque[list[str]]) -> list[str] | None:
        with self._lock:
            if not batches or not self._affordable(len(batches[0])):
                return None
            self._under_way += len(batches[0])
            return batches.popleft()

    def _affordable(self, requests: int) -> bool:
        budget, usage = self.budget, self.usage
        limits = (
            (budget.max_requests, usage.requests + self._under_way + requests - 1),
            (budget.max_tokens, usage.tokens),
            (budget.max_cost, usage.cost),
        )
        return all(limit is None or spent < limit for limit, spent in limits)

    def _take(self, key: str, request: Request, answer: Answer) -> Answer:
        answer = replace(answer, created=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        with self._lock:
            self.usage.asked += 1
            if answer.text is None:
                self._miss(answer)
            else:
                self._broken_in_a_row = 0
                if not answer.prompt_tokens + answer.completion_tokens:
                    self.usage.estimated += 1
                    asked = sum(len(message["content"]) for message in request.messages)
                    answer = replace(answer, prompt_tokens=asked // 4 + 1, completion_tokens=len(answer.text) // 4 + 1)
            self._spend(answer.requests, answer.prompt_tokens, answer.completion_tokens)
        if answer.text is not None:  # what is missing may come next time
            self.cache.put(key, self.completer.identity, request, answer)
        return answer

    def _miss(self, answer: Answer) -> None:
        self.usage.missing += 1
        self.usage.faults[answer.fault] = self.usage.faults.get(answer.fault, 0) + 1
        self._broken_in_a_row += answer.broken
        if self._broken_in_a_row >= self.give_up_after:
            raise InstructLiteError(
                f"{self.model}: {self._broken_in_a_row} requests in a row brought no answer (the last: {answer.fault}); "
                "what was answered is kept: mend this and run the same again"
            )

    def _spend(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.usage.requests += requests
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self.usage.cost += (prompt_tokens * self.budget.input_price + completion_tokens * self.budget.output_price) / 1e6


class Pace:
    """Spaces requests evenly: `wait` before each, `used` with the tokens after each."""

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self.request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.lock, self.free_at = threading.Lock(), 0.0

    def wait(self) -> None:
        with self.lock:
            now = time.monotonic()
            at = max(now, self.free_at)
            self.free_at = at + self.request
        time.sleep(at - now)

    def used(self, tokens: int) -> None:
        with self.lock:
            self.free_at += tokens * self.token


class Endpoint:
    """Chat completions of an OpenAI-compatible endpoint (OpenAI, vLLM, Ollama, `transformers serve`, a router).

    base_url None: OpenAI's, or OPENAI_BASE_URL. The key comes from the environment and goes nowhere else: OPENAI_API_KEY to
    OpenAI; to a base_url only what the variable named by `key_env` holds, so that no key reaches a stranger by mistake.
    Timeouts, 408, 409, 429 and 5xx are repeated by the client (exponential back-off, Retry-After obeyed), malformed bodies here.
    """

    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        parallel: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ):
        self.model = self.identity = model
        self.parallel, self.retries, self.pace = parallel, retries, Pace(requests_per_minute, tokens_per_minute)
        self.openai: ModuleType = require("openai", "judge")
        self._key = _key(base_url, key_env)
        self._limit = "max_completion_tokens" if base_url is None else "max_tokens"  # OpenAI's newer models refuse the older name
        self.client = self.openai.OpenAI(base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=retries)

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Answer:
        repeated = 0
        while True:
            self.pace.wait()
            try:
                reply = self.client.with_options(max_retries=self.retries - repeated).chat.completions.with_raw_response.create(
                    model=self.model, messages=request.messages, temperature=request.temperature, seed=request.seed,
                    **{self._limit: request.max_tokens},
                )  # fmt: skip
            except self.openai.APIStatusError as error:
                return self._refusal(error, repeated)
            except self.openai.APIConnectionError as error:  # timeouts are a kind of it
                return Answer(None, self._without_key(str(error)), broken=True, requests=self.retries + 1)
            repeated += reply.retries_taken
            answer = replace(_parsed(reply.text), requests=repeated + 1)
            self.pace.used(answer.prompt_tokens + answer.completion_tokens)
            if answer.text is not None or repeated >= self.retries:
                return answer
            time.sleep(min(0.5 * 2**repeated, 8.0))
            repeated += 1

    def _refusal(self, error: Any, repeated: int) -> Answer:
        code = error.status_code
        said = self._without_key(" ".join(str(error).split())[:200])
        if code in (401, 403, 404):
            raise InstructLiteError(f"{self.model}: the endpoint refuses ({said}); check model, base_url and the key's variable")
        broken = code in (408, 409, 429) or code >= 500
        return Answer(None, f"HTTP {code}" if broken else said, broken=broken, requests=(self.retries if broken else repeated) + 1)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key(base_url: str | None, key_env: str | None) -> str | None:
    if base_url is not None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InstructLiteError(f"base_url {base_url!r}: expected an address such as http://127.0.0.1:8000/v1")
        if address.password or address.username:
            raise InstructLiteError("base_url: holds a user name or password; put the key into a variable and name that (key_env)")
    name = key_env or (OPENAI_KEY if base_url is None else None)
    if name and not os.environ.get(name):
        raise InstructLiteError(f"{name}: not set; the endpoint's key is read from this environment variable only")
    return os.environ[name] if name else None


def _parsed(body: str) -> Answer:
    """The first choice of a chat completion; whatever has another shape is missing."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Answer(None, "malformed answer", broken=True)
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    counts = {name: count if isinstance(count := usage.get(name), int) else 0 for name in ("prompt_tokens", "completion_tokens")}
    if reason == "content_filter":
        return Answer(None, "withheld by a content filter", **counts)
    if content is not None and not isinstance(content, str):
        return Answer(None, "malformed answer", broken=True, **counts)
    return usable(content or "", truncated=reason == "length", **counts)
