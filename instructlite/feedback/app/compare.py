"""The page that shows adapters side by side: one prompt, every pane's own conversation, all of them written in lock-step."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from anyio import to_thread

from ...errors import InstructLiteError
from ...models.engine import Engine, Pane
from ...models.sampling import Sampling
from ...models.streaming import Snapshot
from . import limits, markup
from .frame import Frame, examples
from .markup import Card

Messages = list[dict[str, str]]
NOTHING = {"status": gr.skip()}
ENDED = {"stop": "ended by itself", "length": "cut at the length", "cancelled": "stopped"}


@dataclass(frozen=True)
class Talk:
    """A conversation with several panes: what was asked, and what each of them answered."""

    panes: tuple[str, ...] = ()
    system: str = ""
    asked: tuple[str, ...] = ()
    answered: tuple[tuple[str, ...], ...] = ()
    """One tuple for each question, in the order of `panes`."""
    notes: tuple[tuple[tuple[str, ...], ...], ...] = ()
    """What stood at the foot of the answers."""

    def messages(self, pane: int, prompt: str) -> Messages:
        """This pane's conversation with a new question."""
        turns = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for asked, answers in zip(self.asked, self.answered, strict=True):
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answers[pane]}]
        return [*turns, {"role": "user", "content": prompt}]

    def with_answers(self, prompt: str, texts: Sequence[str], notes: Sequence[Sequence[str]]) -> "Talk":
        more = {"answered": (*self.answered, tuple(texts)), "notes": (*self.notes, tuple(map(tuple, notes)))}
        return replace(self, asked=(*self.asked, prompt), **more)


def identity(pane: Pane) -> list[str]:
    """What a pane is. The adapter's files were compared with the hashes in its manifest when it was loaded."""
    base = f"{markup.model_name(pane.base)}{f'@{pane.revision[:12]}' if pane.revision else ''}, {pane.precision}"
    if pane.adapter is None:
        return [base, f"no adapter · weights {pane.fingerprint[:12]}"]
    return [base, f"adapter {pane.adapter.name} · sha256 {pane.sha256[:12]} · verified"]


def compare_page(engine: Engine, frame: Frame) -> gr.Blocks:
    names = [pane.name for pane in engine.panes]
    with frame.page("/compare", "Compare", "One prompt, every adapter of the base side by side.") as page:
        talk = gr.State(Talk(tuple(names)))
        shown = {name: gr.HTML(elem_id=name) for name in ("past", "now", "status")}
        fields = {"prompt": gr.Textbox(label="Your prompt (Shift+Enter sends it)", lines=3, max_lines=12, elem_id="prompt")}
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", interactive=False, elem_id="stop")
            new = gr.Button("New conversation", elem_id="new")
        example = examples()
        fields |= _settings(engine)
        chosen = fields["panes"]
        outputs = shown | {"prompt": fields["prompt"], "talk": talk, "send": send, "stop": stop}

        async def answer(given: dict, request: gr.Request) -> AsyncIterator[dict]:
            values = {name: given[field] for name, field in fields.items()}
            try:
                async for changes in frame.while_newest(request.session_hash, _answer(engine, frame, given[talk], values, request)):
                    yield {outputs[name]: value for name, value in (changes or NOTHING).items()}
            except InstructLiteError as error:
                told = markup.status(str(error), "bad")
                yield {shown["status"]: told, send: gr.update(interactive=True), stop: gr.update(interactive=False)}

        def begin(picked: list[str], request: gr.Request) -> dict:
            frame.begin_anew(request.session_hash)
            fresh = Talk(tuple(name for name in names if name in picked))
            return dict.fromkeys(shown.values(), "") | {talk: fresh, send: gr.update(interactive=True), stop: gr.update(interactive=False)}

        asked = frame.on([send.click, fields["prompt"].submit], answer, {*fields.values(), talk}, list(outputs.values()))
        frame.on(stop.click, frame.stop, [], [])
        # What is still being written belongs to the old conversation. It is ended first: until then nothing new could be sent.
        frame.on([new.click, chosen.change], None, None, None, cancels=asked)
        frame.on([new.click, chosen.change], begin, [chosen], [*shown.values(), talk, send, stop], trigger_mode="always_last")
        frame.on(example.change, lambda text: text or gr.skip(), [example], [fields["prompt"]])
    return page


def _settings(engine: Engine) -> dict[str, gr.components.Component]:
    names, longest = [pane.name for pane in engine.panes], engine.limits.new_tokens
    with gr.Accordion("Panes, system prompt, sampling", open=False, elem_id="settings"):
        fields: dict[str, gr.components.Component] = {
            "panes": gr.CheckboxGroup(names, value=names, label="Panes (another choice starts a new conversation)", elem_id="panes"),
            "system": gr.Textbox(label="System prompt", lines=2, elem_id="system"),
        }
        with gr.Row():
            fields["temperature"] = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature (0 is greedy)", elem_id="temperature")
            fields["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", elem_id="top-p")
            fields["top_k"] = gr.Slider(0, 200, 0, step=1, label="Top-k (0 is all)", elem_id="top-k")
        with gr.Row():
            fields["length"] = gr.Slider(1, longest, min(256, longest), step=1, label="Longest answer, in tokens", elem_id="length")
            fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    return fields


async def _answer(engine: Engine, frame: Frame, talk: Talk, given: dict[str, Any], request: gr.Request) -> AsyncIterator[dict[str, Any]]:
    """What changes on the page, from the question to the scores."""
    prompt, talk = _question(talk, given)
    frame.streams.admit(frame.who(request))
    sampling = Sampling(
        limits.whole(given["length"], "the longest answer", 1, engine.limits.new_tokens),
        limits.number(given["temperature"], "the temperature", 0, 2),
        limits.whole(given["top_k"], "top-k", 0, 1000),
        limits.number(given["top_p"], "top-p", 0.01, 1),
    )
    seed = limits.whole(given["seed"], "the seed", 0, 2**31)
    messages = [talk.messages(number, prompt) for number in range(len(talk.panes))]
    stream = await to_thread.run_sync(lambda: engine.submit(messages, talk.panes, sampling, seed=seed))
    known = {pane.name: pane for pane in engine.panes}
    panes = [known[name] for name in talk.panes]
    count = f"{len(panes)} answers" if len(panes) > 1 else "1 answer"
    yield {
        "past": _past(talk, panes), "now": _asked(prompt), "status": markup.status(f"Writing {count} …"), "prompt": "",
        "send": gr.update(interactive=False), "stop": gr.update(interactive=True),
    }  # fmt: skip
    async with frame.streams.snapshots(request.session_hash, stream) as snapshots:
        async for snapshot in snapshots:
            if snapshot.waiting:
                yield {"status": markup.status(f"Waiting: {snapshot.position} requests are before yours.")}
            else:
                yield {"now": _asked(prompt) + _cards(panes, snapshot, len(talk.asked))}
    notes = [_notes(snapshot, number) for number in range(len(panes))]
    ready = "Stopped." if "cancelled" in snapshot.finish else f"{count} ready."
    talked = {"talk": talk.with_answers(prompt, snapshot.texts, notes)}
    yield {"status": markup.status(ready), "stop": gr.update(interactive=False), **talked}
    if engine.rewards:
        for number, text in enumerate(snapshot.texts):
            scores = await to_thread.run_sync(engine.score, messages[number], [text])
            notes[number] += [f"{judge} {given[0]:+.2f}" for judge, given in scores.items()]
        cards = _cards(panes, snapshot, len(talk.asked), notes)
        talked = {"now": _asked(prompt) + cards, "talk": talk.with_answers(prompt, snapshot.texts, notes)}
    # Only now: Gradio begins no answer while it waits for anything of the last one, and says nothing of it.
    yield {"send": gr.update(interactive=True), **talked}


def _question(talk: Talk, given: dict[str, Any]) -> tuple[str, Talk]:
    prompt = limits.text(given["prompt"], "the prompt", limits.MAX_PROMPT)
    system = limits.text(given["system"], "the system prompt", limits.MAX_SYSTEM, empty=True)
    if not talk.panes:
        raise InstructLiteError("no pane is chosen (see the settings below)")
    if len(talk.asked) >= limits.MAX_TURNS:
        raise InstructLiteError(f"this conversation has {limits.MAX_TURNS} prompts (start a new one)")
    return prompt, replace(talk, system=system)


def _asked(prompt: str) -> str:
    return markup.turns([{"role": "user", "content": prompt}])


def _past(talk: Talk, panes: Sequence[Pane]) -> str:
    return "".join(
        _asked(prompt)
        + markup.cards([
            Card(pane.name, text, f"{pane.name}, answer {turn + 1}", identity(pane), notes)
            for pane, text, notes in zip(panes, texts, all_notes, strict=True)
        ])
        for turn, (prompt, texts, all_notes) in enumerate(zip(talk.asked, talk.answered, talk.notes, strict=True))
    )  # fmt: skip


def _cards(panes: Sequence[Pane], snapshot: Snapshot, turn: int, notes: Sequence[Sequence[str]] | None = None) -> str:
    return markup.cards([
        Card(
            pane.name, snapshot.texts[number], f"{pane.name}, answer {turn + 1}", identity(pane),
            notes[number] if notes else _notes(snapshot, number), not snapshot.done[number],
        )
        for number, pane in enumerate(panes)
    ])  # fmt: skip


def _notes(snapshot: Snapshot, number: int) -> list[str]:
    if not snapshot.tokens[number]:
        return []
    notes = [f"{snapshot.tokens[number]} tokens", f"{snapshot.tokens_per_second[number]:.1f} tokens/s"]
    return [*notes, ENDED[snapshot.finish[number]]] if snapshot.finish[number] else notes
