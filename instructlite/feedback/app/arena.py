"""The page where people vote: answers without names, a vote by mouse, thumb or keyboard, names once it is saved."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr
from anyio import to_thread

from ...errors import InstructLiteError
from ..ballots import FLAGS, LIKERT, MAX_ANSWERS, MAX_COMMENT, Showing
from ..store import MAX_NAME
from . import limits, markup
from .booth import LIVE_ANSWERS, Booth, Reveal, ballot_of
from .frame import Frame, examples
from .markup import LETTERS, Card

LEAD = (
    "Read the answers, then say which is better. Who wrote them is told once your vote is saved. "
    '<span class="keys">Keys: 1 and 2, 3 for a tie, 0 if both are bad, N for the next one.</span>'
)
Changes = dict[str, Any]
NOTHING: Changes = {"status": gr.skip()}


@dataclass(frozen=True)
class Sitting:
    """What one page has before it; it stays on the server."""

    showing: Showing | None = None
    skipped: frozenset[str] = frozenset()


def arena_page(booth: Booth, frame: Frame) -> gr.Blocks:
    with frame.page("/arena", "Which answer is better?", LEAD) as page:
        sitting = gr.State(Sitting())
        parts: dict[str, gr.components.Component] = {name: gr.HTML(elem_id=name) for name in ("asked", "answers", "status")}
        parts |= _vote_buttons()
        details = _details()
        own = _own_prompt()
        parts |= details | own | {"sitting": sitting}

        def handler(does: Callable) -> Callable:
            """does(booth, sitting, voter, given, request) yields what changes, by the names of the parts."""

            async def handled(given: dict, request: gr.Request) -> AsyncIterator[dict]:
                values = {name: given[part] for name, part in parts.items() if part in given}
                try:
                    voter = await to_thread.run_sync(frame.visitors.key, request.request)
                    changing = frame.while_newest(request.session_hash, does(booth, frame, voter, values, request))
                    async for changes in changing:
                        yield {parts[name]: change for name, change in (changes or NOTHING).items()}
                except InstructLiteError as error:
                    told = {"status": markup.status(str(error), "bad"), "stop": gr.update(visible=False), "next": gr.update(visible=True)}
                    yield {parts[name]: change for name, change in told.items()}

            return handled

        outputs = list(parts.values())
        said = {sitting, *(part for part in details.values() if isinstance(part, gr.components.FormComponent))}
        frame.on(page.load, handler(_load), {sitting}, outputs)
        frame.on(parts["next"].click, handler(_next), {sitting}, outputs)
        frame.on(parts["ask"].click, handler(_ask), {sitting, own["question"], own["count"]}, outputs)
        frame.on(parts["stop"].click, frame.stop, [], [])
        choices: list[tuple[str, int | str]] = [(f"best{place}", place) for place in range(MAX_ANSWERS)]
        for name, choice in (*choices, ("tie", "tie"), ("bad", "bad"), ("rank", "ranks")):
            frame.on(parts[name].click, handler(partial(_vote, choice)), said, outputs)
        frame.on(own["example"].change, lambda text: text or gr.skip(), [own["example"]], [own["question"]])
    return page


# --- what is on the page ----------------------------------------------------------------------------------------------------


def _vote_buttons() -> dict[str, gr.Button]:
    buttons = {}
    with gr.Row(elem_classes="votes"):
        for place in range(MAX_ANSWERS):
            buttons[f"best{place}"] = _button(f"vote-{place + 1}", str(place + 1))
        buttons["tie"] = _button("vote-tie", "3", "t")
        buttons["bad"] = _button("vote-0", "0")
        buttons["rank"] = _button("vote-rank", "r", value="R · Save my ranking")
    with gr.Row():
        buttons["stop"] = gr.Button("Stop", visible=False, elem_id="stop")
        buttons["next"] = gr.Button("N · Next", variant="primary", elem_id="next", elem_classes=["key-n"])
    return buttons


def _button(name: str, *keys: str, value: str = "") -> gr.Button:
    return gr.Button(value, visible=False, elem_id=name, elem_classes=[f"key-{key}" for key in keys])


def _details() -> dict[str, gr.components.Component]:
    """What may be said of each answer besides; all of it goes with the vote."""
    low, high = LIKERT
    parts: dict[str, gr.components.Component] = {}
    with gr.Accordion("Say more (optional)", open=False, visible=False, elem_id="more") as parts["more"]:
        for place, letter in enumerate(LETTERS):
            with gr.Group(visible=False) as parts[f"about{place}"]:
                parts[f"ranks{place}"] = gr.Dropdown([], label=f"Rank of answer {letter} (1 is the best; equal ranks tie)", visible=False)
                parts[f"likert{place}"] = gr.Radio(list(range(low, high + 1)), label=f"Answer {letter}, {low} (worst) to {high} (best)")
                parts[f"flags{place}"] = gr.CheckboxGroup([(words, flag) for flag, words in FLAGS.items()], label=f"Answer {letter} …")
                parts[f"edits{place}"] = gr.Textbox(label=f"Answer {letter} as it should have been (change it here)", lines=3, max_lines=12)
        parts["comment"] = gr.Textbox(label="Why? (free text)", lines=2, elem_id="comment")
        parts["group"] = gr.Textbox(label="Your group, if you want to give one (such as a country or a profession)", elem_id="group")
    return parts


def _own_prompt() -> dict[str, gr.components.Component]:
    parts: dict[str, gr.components.Component] = {}
    with gr.Accordion("Ask something yourself", open=False, elem_id="own"):
        parts["question"] = gr.Textbox(label="Your prompt (it is kept with the answers)", lines=3, max_lines=12, elem_id="question")
        parts["example"] = examples()
        parts["count"] = gr.Radio(list(range(LIVE_ANSWERS[0], LIVE_ANSWERS[1] + 1)), value=2, label="Answers to compare", elem_id="count")
        parts["ask"] = gr.Button("Ask", elem_id="ask")
    return parts


# --- what happens -----------------------------------------------------------------------------------------------------------


async def _load(booth: Booth, frame: Frame, voter: str, given: Changes, request: gr.Request) -> AsyncIterator[Changes]:
    """The page again: what was open is open, what was saved is saved."""
    cast = await to_thread.run_sync(booth.store.cast, voter)
    saved = f"{cast:,} of your votes {'is' if cast == 1 else 'are'} saved. " if cast else ""
    if showing := await to_thread.run_sync(booth.open, voter):
        yield _open(given["sitting"], showing, f"{saved}You have not voted on this yet.")
    elif showing := await to_thread.run_sync(booth.next, voter):
        yield _open(given["sitting"], showing, f"{saved}Your turn.")
    else:
        yield {"status": markup.status(f"{saved}Press Next for a prompt, or ask something yourself.")}


async def _next(booth: Booth, frame: Frame, voter: str, given: Changes, request: gr.Request) -> AsyncIterator[Changes]:
    before: Sitting = given["sitting"]
    if before.showing and not before.showing.voted:
        before = Sitting(None, before.skipped | {before.showing.ticket})
    if showing := await to_thread.run_sync(booth.next, voter, before.skipped):
        yield _open(before, showing, "Your turn.")
    elif row := booth.prompt(voter):
        async for changes in _written(booth, frame, voter, before, request, row["prompt"], 2, row.get("category")):
            yield changes
    else:
        yield {"status": markup.status("Nothing waits for a vote just now. Ask something yourself, below.")}


async def _ask(booth: Booth, frame: Frame, voter: str, given: Changes, request: gr.Request) -> AsyncIterator[Changes]:
    question = limits.text(given["question"], "the prompt", limits.MAX_PROMPT)
    count = limits.whole(given["count"], "the number of answers", *LIVE_ANSWERS)
    prompt = [{"role": "user", "content": question}]
    async for changes in _written(booth, frame, voter, given["sitting"], request, prompt, count):
        yield changes
    yield {"question": ""}


async def _written(
    booth: Booth, frame: Frame, voter: str, before: Sitting, request: gr.Request, prompt: list, count: int, use_case: Any = None
) -> AsyncIterator[Changes]:
    """Answers written while the voter looks on, in lock-step: no pane is faster than another."""
    frame.streams.admit(frame.who(request))
    battle = await to_thread.run_sync(booth.ask, voter, prompt, count, use_case if isinstance(use_case, str) else None)
    yield _closed(count) | {
        "asked": markup.turns(prompt), "answers": "", "status": markup.status(f"Writing {count} answers …"),
        "sitting": replace(before, showing=None), "stop": gr.update(visible=True), "next": gr.update(visible=False),
    }  # fmt: skip
    async with frame.streams.snapshots(request.session_hash, battle.stream) as snapshots:
        async for snapshot in snapshots:
            if snapshot.waiting:
                yield {"status": markup.status(f"Waiting: {snapshot.position} requests are before yours.")}
            else:
                yield {"answers": _cards([snapshot.texts[n] for n in battle.order], writing=[not snapshot.done[n] for n in battle.order])}
    if "cancelled" in snapshot.finish:
        said = markup.status("Stopped: there is nothing to vote on. Press Next for another prompt.")
        yield {"status": said, "stop": gr.update(visible=False), "next": gr.update(visible=True)}
        return
    await to_thread.run_sync(booth.finish, battle, snapshot.texts)
    texts = tuple(snapshot.texts[number] for number in battle.order)
    yield _open(before, replace(battle.showing, answers=texts), f"{count} answers ready. Which is better?")


async def _vote(choice: int | str, booth: Booth, frame: Frame, voter: str, given: Changes, request: gr.Request) -> AsyncIterator[Changes]:
    sitting: Sitting = given["sitting"]
    showing = sitting.showing
    if showing is None:
        raise InstructLiteError("there is nothing to vote on (press Next)")
    said = {what: [given[f"{what}{place}"] for place in range(MAX_ANSWERS)] for what in ("ranks", "likert", "flags", "edits")}
    comment = limits.text(given["comment"], "the comment", MAX_COMMENT, empty=True)
    group = limits.text(given["group"], "the group", MAX_NAME, empty=True)
    ballot = ballot_of(choice, showing, said, comment)
    new = await to_thread.run_sync(booth.vote, voter, showing.ticket, ballot, group)
    # Only from here on the vote is on the disk, and names may be told.
    said_of_it = "Saved." if new else "Already saved."
    best = [place for place, one in enumerate(ballot.judgements(len(showing.answers))) if one["rank"] == 0] if new else []
    voted = replace(showing, voted=True)
    revealed = await to_thread.run_sync(booth.reveal, voter, showing.ticket)
    yield _closed(len(showing.answers)) | {
        "answers": _revealed(showing, revealed, best),
        "status": markup.status(f"{said_of_it} {_names(revealed)}", "good"),
        "sitting": Sitting(voted, sitting.skipped),
    }
    try:
        await to_thread.run_sync(booth.score, voter, voted)
    except InstructLiteError:
        return  # an answer or prompt too long to be scored: the vote is saved all the same
    revealed = await to_thread.run_sync(booth.reveal, voter, showing.ticket)
    yield {"answers": _revealed(showing, revealed, best)}


# --- how it looks -----------------------------------------------------------------------------------------------------------


def _open(before: Sitting, showing: Showing, said: str) -> Changes:
    """Answers that can be voted on."""
    count = len(showing.answers)
    changes: Changes = {
        "asked": markup.turns(showing.prompt),
        "answers": _cards(showing.answers),
        "status": markup.status(said),
        "sitting": Sitting(showing, before.skipped),
        "more": gr.update(visible=True),
        "comment": "",
        "stop": gr.update(visible=False),
        "next": gr.update(visible=True, variant="secondary"),
    }
    better = "better" if count == 2 else "best"
    for place, letter in enumerate(LETTERS):
        there = place < count
        changes[f"best{place}"] = gr.update(visible=there, interactive=True, value=f"{place + 1} · {letter} is {better}")
        changes[f"about{place}"] = gr.update(visible=there)
        if there:
            changes[f"ranks{place}"] = gr.update(choices=list(range(1, count + 1)), value=None, visible=count > 2)
            changes |= {f"likert{place}": None, f"flags{place}": [], f"edits{place}": showing.answers[place]}
    changes["tie"] = gr.update(visible=True, interactive=True, value="3 · Tie" if count == 2 else "T · Tie")
    changes["bad"] = gr.update(visible=True, interactive=True, value="0 · Both bad" if count == 2 else "0 · All bad")
    changes["rank"] = gr.update(visible=count > 2, interactive=True)
    return changes


def _closed(count: int) -> Changes:
    """No vote now."""
    names = [f"best{place}" for place in range(count)]
    return {name: gr.update(interactive=False) for name in (*names, "tie", "bad", "rank")} | {
        "more": gr.update(visible=False), "next": gr.update(visible=True, variant="primary"),
    }  # fmt: skip


def _cards(texts: Sequence[str | None], writing: Sequence[bool] = ()) -> str:
    return markup.cards([
        Card(f"Answer {LETTERS[place]}", text or "", writing=bool(writing) and writing[place]) for place, text in enumerate(texts)
    ])  # fmt: skip


def _revealed(showing: Showing, revealed: Sequence[Reveal], best: Sequence[int]) -> str:
    """best: the places of the best answers by the vote that was saved."""
    weights = [f"adapter sha256 {one.candidate.adapter[:12]}" if one.candidate.adapter else "no adapter" for one in revealed]
    return markup.cards([
        Card(
            f"Answer {LETTERS[place]} · {one.candidate.name}", text or "", f"Answer {LETTERS[place]}",
            [markup.model_name(one.candidate.base), weights[place]],
            [f"{judge} {score:+.2f}" for judge, score in one.scores.items()], mark="best" if best == [place] else "",
        )
        for place, (text, one) in enumerate(zip(showing.answers, revealed, strict=True))
    ])  # fmt: skip


def _names(revealed: Sequence[Reveal]) -> str:
    return ", ".join(f"{LETTERS[place]} is {one.candidate.name}" for place, one in enumerate(revealed)) + "."
