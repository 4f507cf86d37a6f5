"""A report, or a part of one, as Markdown that shows other people's text and does nothing else with it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .formatting import printable
from .sections import Part, Sample, how, provenance, samples, sections
from .tables import Table

if TYPE_CHECKING:
    from .report import Report


def to_markdown(report: Report) -> str:
    """The whole report: verdict, tables, sample answers, how each number was computed, what was run."""
    shown = list(samples(report))
    parts = [
        f"# {escape(report.title)}",
        *map(escape, report.verdict().split("\n\n")),
        *(text for section in sections(report) for text in [f"## {escape(section.title)}", *parts_in(section.parts)]),
        *(["## Sample answers"] if shown else []),
        *map(_sample, shown),
        "## How each number was computed",
        "\n".join(f"- **{escape(term)}**: {escape(text)}" for term, text in how(report)),
        "## What was run",
        *parts_in(provenance(report)),
    ]
    return "\n\n".join(parts) + "\n"


def parts_in(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Table):
            yield f"{escape(part.caption)}:"
            yield markdown_table(part.header, part.rows)
        elif isinstance(part, list):
            yield "\n".join(f"- {escape(line)}" for line in part)
        else:
            yield escape(part)


def _sample(sample: Sample) -> str:
    prompt = "<br>".join(f"*{escape(role)}:* {escape(text)}" for role, text in sample.turns)
    header = [f"{answer.candidate} ({answer.score})" if answer.score else answer.candidate for answer in sample.answers]
    texts = [answer.text for answer in sample.answers]
    return f"**{escape(sample.title)}**, {escape(sample.why)}\n\n{prompt}\n\n{markdown_table(header, [texts])}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *rest = ("| " + " | ".join(map(escape, line)) + " |" for line in (header, *rows))
    return "\n".join([first, "|" + " --- |" * len(header), *rest])


def escape(text: str) -> str:
    """Text as Markdown that shows it and does nothing else: no HTML, no markup, no line of its own."""
    text = html.escape(printable(text), quote=False)
    # Intervals are left alone, so that the tables can be read as they are.
    text = re.sub(r"(\[[-+.,\d]+, [-+.,\d]+\](?![(\[:]))|([\\`*_{}\[\]#|~$])", lambda found: found[1] or "\\" + found[2], text)
    return text.strip().replace("\n", "<br>")
