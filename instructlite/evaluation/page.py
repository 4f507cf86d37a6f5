"""A report as one HTML file: no scripts and no requests, light and dark, wide and narrow; other people's text stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots
from .formatting import bracket, find, number, printable
from .sections import Section, how, provenance, samples, sections
from .tables import Table

if TYPE_CHECKING:
    from .report import Report

TEMPLATE = Path(__file__).parent / "report.html.jinja"


def to_html(report: Report) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_shown)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.filters["interval"] = _interval
    no_plots = plots.missing()
    drawn = {} if no_plots else plots.plots_of(report)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=report.title,
        verdict=report.verdict().split("\n\n"),
        figures=_figures(report),
        sections=[
            _folded(section) if section.name.startswith("training") and section.name in drawn else section for section in sections(report)
        ],
        plots=drawn,
        no_plots=no_plots,
        samples=list(samples(report)),
        how=how(report),
        provenance=provenance(report),
    )


def _folded(section: Section) -> Section:
    """What the plots show already is there when asked for."""
    return replace(section, parts=[replace(part, folded=True) if isinstance(part, Table) else part for part in section.parts])


def _interval(cell: str) -> tuple[str, str]:
    """A cell's number, and its interval or error, which may stand below it."""
    found = re.fullmatch(r"(\S+) (\[.*\]|± .*)", cell)
    return (found[1], found[2]) if found else (cell, "")


def _shown(value: object) -> object:
    """Whatever is put into the page: without control characters. Plots are marked as safe by the template, and checked before."""
    return printable(value) if type(value) is str else value


def _figures(report: Report) -> list[tuple[str, str]]:
    """The few numbers at the top: (number, what it is)."""
    row = report.headline_row("sampled")
    if row is None:
        return []
    a, b = report.headline
    found = [(bracket(row, "rate", 2), f"of the comparisons {a} wins against {b}")]
    judge, candidate = report.judges[0], find(report.candidates, name=a)
    if judge.get("accuracy") is not None:
        found.append((bracket(judge, "accuracy", 2), f"{judge['name']}'s agreement with people"))
    if candidate.get("kl") is not None and a != report.reference:
        found.append((number(candidate["kl"], 1), f"nats of KL to {report.reference}"))
    if candidate.get("perplexity") is not None:
        found.append((number(candidate["perplexity"], 2), f"perplexity of people's answers under {a}"))
    return found
