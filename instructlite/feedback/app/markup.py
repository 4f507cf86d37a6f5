"""Texts as HTML that shows them as they are: no markup of a prompt or an answer is ever interpreted."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

# Gradio's HTML component is a template: `${...}`, `{{...}}` and `@children` in it would be filled in.
_TEMPLATE = {ord(sign): f"&#{ord(sign)};" for sign in "${}`@"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
LETTERS = "ABCDEFGHI"


@dataclass(frozen=True)
class Card:
    """One answer as it is shown. `facts` stand below its title, `notes` at its foot."""

    title: str
    text: str
    label: str = ""
    """Of the landmark, where the title alone would not tell it from others on the page."""
    facts: Sequence[str] = ()
    notes: Sequence[str] = ()
    writing: bool = False
    mark: str = ""
    """best, or empty."""


def escape(text: str) -> str:
    """For element content and quoted attributes. Control characters, which HTML cannot hold, are shown as U+FFFD."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))).translate(_TEMPLATE)


def model_name(base: str) -> str:
    """A base as visitors may know it: of a directory here its last part only."""
    return PurePath(base).name if PurePath(base).is_absolute() else base


def cards(answers: Sequence[Card]) -> str:
    return f'<div class="cards" data-count="{len(answers)}">{"".join(map(_card, answers))}</div>'


def _card(card: Card) -> str:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in card.facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in card.notes)
    text = escape(card.text) or ("" if card.writing else '<span class="nothing">(an empty answer)</span>')
    return (
        f'<section class="card {"writing" if card.writing else ""} {card.mark}" aria-label="{escape(card.label or card.title)}" '
        f'aria-busy="{"true" if card.writing else "false"}">'
        f'<h3>{escape(card.title)}</h3>{f"""<ul class="facts">{facts}</ul>""" if facts else ""}'
        f'<div class="text" dir="auto">{text}</div>{f"""<ul class="notes">{notes}</ul>""" if notes else ""}</section>'
    )


def turns(messages: Iterable[dict]) -> str:
    """A conversation, each turn with who said it."""
    who = {"user": "Prompt", "assistant": "Earlier answer", "system": "System prompt"}
    return "".join(
        f'<div class="turn {role}"><h3>{who[role]}</h3><div class="text" dir="auto">{escape(turn["content"])}</div></div>'
        for turn in messages
        for role in [turn["role"] if turn["role"] in who else "user"]
    )


def status(said: str, kind: str = "") -> str:
    """kind: "", "good" or "bad"."""
    return f'<p class="said {kind}">{escape(said)}</p>' if said else ""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first of a row is its heading."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    # Wide tables scroll on their own, by keyboard too; the page never does.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(value: float, low: float | None, high: float | None) -> str:
    """A rate between 0 and 1 with its interval, and a line at one half."""
    left, right = (value if end is None else end for end in (low, high))
    return (
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="half" x1="50" y1="0" x2="50" y2="12"/>'
        f'<line class="range" x1="{100 * left:.1f}" y1="6" x2="{100 * right:.1f}" y2="6"/>'
        f'<rect class="point" x="{100 * value - 1:.1f}" y="2" width="2" height="8"/></svg>'
    )
