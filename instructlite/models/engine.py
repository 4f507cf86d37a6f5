"""Several adapters of one base answer several people at once: requests wait in a queue, share one batch, and stream.

One base is in memory, and one thread computes; the rows of all requests advance in lock-step (lockstep.py), new requests join
between two steps. What goes wrong in that thread is raised where the answers are awaited, and the next request is answered.
Texts of users are checked here, whatever a page or client has checked before.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..config import BaseOptions
from ..data.records import characters
from ..data.schema import Fault, check_characters
from ..data.schema import messages as checked
from ..errors import InstructLiteError
from .base import Messages, base_of
from .lockstep import Lockstep, Row
from .manifest import NAME, Adapter, adapters_in, different_names, member_names
from .roles import RoleModel
from .sampling import Sampling, score
from .streaming import Stream

BASE = "base"
SCORED_AT_ONCE = 8
STOPPING = "the server is stopping"
log = logging.getLogger(__name__)


class Full(InstructLiteError):
    """So many requests are waiting that no more are taken: come back in a moment."""


@dataclass(frozen=True)
class Limits:
    """What one engine takes. Requests beyond `waiting` get Full; rows are answers in the batch (a request has one a pane)."""

    waiting: int = 32
    rows: int = 24
    characters: int = 20_000
    prompt_tokens: int = 2048
    new_tokens: int = 512


@dataclass(frozen=True)
class Pane:
    """What answers: the base alone (adapter None), or with one adapter, whose files were verified against its manifest."""

    name: str
    adapter: Adapter | None
    base: str
    revision: str | None
    fingerprint: str
    precision: str
    role: str | None = field(repr=False, default=None)

    @property
    def sha256(self) -> str | None:
        """Of the adapter's weights."""
        return self.adapter.sha256 if self.adapter else None

    @property
    def facts(self) -> dict[str, str]:
        """What to show of it, once it may be known."""
        facts = {"base": self.base, "revision": self.revision or "", "base weights": self.fingerprint[:12], "precision": self.precision}
        if self.adapter:
            facts |= {"adapter": self.adapter.name, "adapter sha256": self.adapter.sha256[:12]}
            facts |= {f"from {role}": sha256[:12] for role, sha256 in self.adapter.manifest.parents.items()}
        return {what: value for what, value in facts.items() if value}


class Engine:
    """Panes of one base in memory, and the thread that computes. `close()` it, or use it in a `with`."""

    def __init__(self, model: RoleModel, panes: Sequence[Pane], rewards: dict[str, str], limits: Limits | None = None):
        """rewards: {name: role} of the adapters that score."""
        self.model, self.panes, self.rewards, self.limits = model, list(panes), rewards, limits or Limits()
        self._lockstep = Lockstep(model)
        # Not two at once: a tokenizer has switches that are set for one call, as that for control tokens in what users type.
        self._tokenizing = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: deque[Stream] = deque()
        self._running: list[Stream] = []
        self._joining: list[Stream] = []
        self._turning = self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @classmethod
    def load(
        cls,
        run_or_adapters: str | Path | Sequence[str | Path | Adapter],
        options: BaseOptions | None = None,
        *,
        limits: Limits | None = None,
    ) -> Engine:
        """All policy adapters of a run directory, or those given, beside their base; reward adapters, for `score`.

        Raises InstructLiteError for adapters that are damaged, of different bases, or cannot share a batch.
        """
        adapters = _adapters(run_or_adapters)
        policies = [adapter for adapter in adapters if adapter.role == "policy"]
        if not policies:
            raise InstructLiteError(f"{run_or_adapters}: no adapter that answers; train one first (instructlite run)")
        base = base_of(policies[0], options or BaseOptions())
        if base.model._is_stateful:  # transformers' mark of Mamba and the like
            raise InstructLiteError(f"{base.id}: its state is no list of keys and values, which batches of several requests need")
        precision = base.dtype if base.quantization == "none" else f"{base.quantization}, {base.dtype}"
        of_base = (base.id, base.revision, base.fingerprint, precision)
        # Roles have names of their own: PEFT takes no dots in them, torch no names of its own methods ("train", "eval").
        panes = [Pane(BASE, None, *of_base)]
        names = different_names([BASE, *policies])[1:]
        panes += [Pane(name, adapter, *of_base, f"pane{i}") for i, (name, adapter) in enumerate(zip(names, policies, strict=True))]
        judges = _judges([adapter for adapter in adapters if adapter.role == "reward"])
        rewards = {name: f"reward{i}" for i, name in enumerate(judges)}
        roles = {pane.role: pane.adapter for pane in panes if pane.role} | {rewards[name]: adapter for name, adapter in judges.items()}
        model = RoleModel.load(base, roles)
        if dora := next((pane for pane in panes if pane.role and getattr(model.peft_config[pane.role], "use_dora", False)), None):
            raise InstructLiteError(f"{dora.adapter}: a DoRA adapter; PEFT does not mix these with others in one batch")
        return cls(model, panes, rewards, limits)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is being answered and what waits, with an error that says so."""
        with self._lock:
            self._closed = True
        self._worker.shutdown()
        self._fail([*self._running, *self._waiting], InstructLiteError(STOPPING))

    # --- what is asked ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        conversations: Messages | Sequence[Messages],
        panes: Sequence[str],
        sampling: Sampling | None = None,
        *,
        seed: int | Sequence[int] = 0,
    ) -> Stream:
        """Ask panes (by name) to answer: one conversation, all of them; as many as panes, each its own. Returns at once.

        seed: the same one gives a pane the same answer, whatever is answered beside it; a sequence has one for each pane.
        Raises Full, and InstructLiteError for what is no conversation or more than the limits allow.
        """
        self._check_room()  # before the work of looking at what is asked
        sampling = sampling or Sampling()
        roles = {pane.name: pane.role for pane in self.panes}
        if unknown := [pane for pane in panes if pane not in roles]:
            raise InstructLiteError(f"no pane {str(unknown[0])[:40]!r}; there are {', '.join(roles)}")
        if not 1 <= len(panes) <= self.limits.rows:
            raise InstructLiteError(f"{len(panes)} answers asked for, expected 1 to {self.limits.rows}")
        prompts = self._prompts(conversations, len(panes), sampling)
        seeds = [seed] * len(panes) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(panes) or not all(isinstance(one, int) and 0 <= one < 2**63 for one in seeds):
            raise InstructLiteError("seed: expected a whole number from 0, or one for each pane")
        rows = [Row(prompt, roles[pane], sampling, one) for prompt, pane, one in zip(prompts, panes, seeds, strict=True)]
        stream = Stream(rows, self.model.base, self._tokenizing)
        self._enqueue(stream)
        return stream

    def _prompts(self, conversations: Messages | Sequence[Messages], count: int, sampling: Sampling) -> list[list[int]]:
        limits = self.limits
        if sampling.max_new_tokens > limits.new_tokens:
            raise InstructLiteError(f"max_new_tokens={sampling.max_new_tokens:,}: at most {limits.new_tokens:,} are taken")
        several = isinstance(conversations, (list, tuple)) and conversations and all(isinstance(one, list) for one in conversations)
        given = [self._checked(one) for one in (conversations if several else [conversations])]
        if len(given) not in (1, count):
            raise InstructLiteError(f"{len(given)} conversations for {count} panes; pass one, or one for each")
        longest = min(limits.prompt_tokens, self.model.base.context - sampling.max_new_tokens)
        encoded = [self._encode(one) for one in given]
        if (most := max(map(len, encoded))) > longest:
            raise InstructLiteError(f"the conversation has {most:,} tokens, at most {longest:,} are taken; shorten it or start a new one")
        return encoded * count if len(encoded) == 1 else encoded

    def _checked(self, conversation: object) -> Messages:
        """Before the tokenizer sees it: a text of many megabytes would keep it busy for long."""
        try:
            turns = checked(conversation, "the conversation", last="user")
            check_characters({"content": turns})
        except Fault as fault:
            raise InstructLiteError(str(fault)) from fault
        length = characters(turns)
        if length > self.limits.characters:
            raise InstructLiteError(f"the conversation has {length:,} characters, at most {self.limits.characters:,} are taken; shorten it")
        return turns

    def _encode(self, conversation: Messages) -> list[int]:
        with self._tokenizing:
            return self.model.base.encode_prompt(conversation)

    def score(self, conversation: Messages, answers: Sequence[str]) -> dict[str, list[float]]:
        """What each reward adapter gives each answer, between two steps of what is being answered; {} where there is none."""
        if not self.rewards:
            return {}
        if self._closed:
            raise InstructLiteError(STOPPING)
        prompt = self._prompts(conversation, 1, Sampling(max_new_tokens=1))[0]
        if too_long := next((text for text in answers if len(text) > self.limits.characters), None):
            raise InstructLiteError(f"the answer has {len(too_long):,} characters, at most {self.limits.characters:,} are taken")
        with self._tokenizing:
            sequences = [(prompt, self.model.base.encode_completion(text)) for text in answers]
        scores: list[list[float]] = [[] for _ in self.rewards]
        for start in range(0, len(sequences), SCORED_AT_ONCE):
            part = sequences[start : start + SCORED_AT_ONCE]
            given = self._worker.submit(score, self.model, list(self.rewards.values()), part)
            if error := given.exception():
                raise _told(error, "scoring")
            for of_judge, row in zip(scores, given.result().tolist(), strict=True):
                of_judge += row
        return dict(zip(self.rewards, scores, strict=True))

    # --- the queue, and the thread that computes ------------------------------------------------------------------------------

    def _check_room(self) -> None:
        if self._closed:
            raise InstructLiteError(STOPPING)
        if len(self._waiting) >= self.limits.waiting:
            raise Full(f"busy: {len(self._waiting)} requests are waiting already; try again in a moment")

    def _enqueue(self, stream: Stream) -> None:
        with self._lock:
            self._check_room()
            self._waiting.append(stream)
            stream.queued(len(self._waiting) - 1)
            idle, self._turning = not self._turning, True
        if idle:
            self._next_turn()

    def _next_turn(self) -> None:
        with suppress(RuntimeError):  # the interpreter is ending
            self._worker.submit(self._turn).add_done_callback(self._after)

    def _turn(self) -> None:
        """Some rows leave, some join, or every row gets a token."""
        self._leave()
        self._joining = self._admitted()
        if self._joining:
            joined = self._lockstep.prefill([row for stream in self._joining for row in stream.rows])
            self._running += self._joining
            self._joining = []
            self._lockstep.join(joined)
        elif self._running:
            self._lockstep.step()
        for stream in self._running:
            if any(row.finish == "broken" for row in stream.rows):
                stream.end(InstructLiteError("the answers broke off: the model's scores are no numbers"))
            else:
                stream.advance()

    def _leave(self) -> None:
        for stream in self._running:
            if stream.cancelled and not stream.over:
                stream.end()
        self._running = [stream for stream in self._running if not stream.over]
        self._lockstep.keep([row for stream in self._running for row in stream.rows if row.finish is None])

    def _admitted(self) -> list[Stream]:
        """The requests whose turn it is, first come, first served, as far as there is room for all of their rows."""
        admitted: list[Stream] = []
        with self._lock:
            for stream in [stream for stream in self._waiting if stream.cancelled]:
                self._waiting.remove(stream)
                stream.end()
            room = self.limits.rows - len(self._lockstep.rows)
            while self._waiting and len(self._waiting[0].rows) <= room:
                admitted.append(self._waiting.popleft())
                room -= len(admitted[-1].rows)
                admitted[-1].start()
            for position, stream in enumerate(self._waiting):
                stream.queued(position)
        return admitted

    def _after(self, turn: Future) -> None:
        """What was raised concerns the requests that were about to join; else all in the batch, whose cache cannot be trusted now."""
        if error := turn.exception():
            concerned, self._joining = self._joining or self._running, []
            self._fail(concerned, _told(error, "answering"))
        with self._lock:
            self._running = [stream for stream in self._running if not stream.over]
            again = self._turning = not self._closed and bool(self._running or self._waiting)
        if again:
            self._next_turn()
        elif not self._running:
            self._lockstep.keep([])

    def _fail(self, streams: list[Stream], error: InstructLiteError) -> None:
        for stream in streams:
            if not stream.over:
                stream.end(error)


def _told(error: BaseException, doing: str) -> InstructLiteError:
    """What users are told; what it says of this machine goes to the log."""
    log.error("%s failed", doing, exc_info=error)
    return InstructLiteError(f"{doing} broke off ({type(error).__name__}); try again")


def _adapters(given: str | Path | Sequence[str | Path | Adapter]) -> list[Adapter]:
    """Adapters given, or those of a run, here or on the Hub, each behind those it was trained from."""
    if isinstance(given, (str, Path)) and not (Path(given) / NAME).is_file():
        adapters = list(adapters_in(given).values())
        if not adapters and Path(given).is_dir():
            raise InstructLiteError(f"{given}: no adapters in this directory; pass a run directory or adapters")
        if adapters:
            return sorted(adapters, key=lambda adapter: len(_ancestors(adapter, adapters)))
    return [Adapter.load(one) for one in ([given] if isinstance(given, (str, Path, Adapter)) else given)]


def _ancestors(adapter: Adapter, among: list[Adapter]) -> set[str]:
    parents = {other.sha256: other for other in among if other.sha256 in adapter.manifest.parents.values()}
    return set(parents).union(*(_ancestors(parent, among) for parent in parents.values()))


def _judges(adapters: list[Adapter]) -> dict[str, Adapter]:
    """By name; of an ensemble all members."""
    judges: dict[str, Adapter] = {}
    for name, adapter in zip(different_names(adapters), adapters, strict=True):
        members = adapter.members
        judges |= zip(member_names(name, len(members)), members, strict=True)
    return judges
