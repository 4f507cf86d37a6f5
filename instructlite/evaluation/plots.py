"""The plots of a report, drawn by matplotlib as SVG that stands inside a page: its text is text, its colours are the page's.

Narrow on purpose, so that they can be read on a telephone without scrolling. matplotlib is optional: see `missing`.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .curves import SHOWN
from .formatting import Row, between, ends, find, number, plain, printable
from .tables import decoding_name, distances, gain_over_reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK, DIM, LINE = "#010101", "#010102", "#010103"
SERIES = ("#010111", "#010112", "#010113", "#010114")
COLOURS = {INK: "var(--ink)", DIM: "var(--dim)", LINE: "var(--line)"} | {hexa: f"var(--c{i})" for i, hexa in enumerate(SERIES)}
"""What is drawn in these is shown in the page's own colours, light or dark."""
MARKERS = ("o", "s", "D", "^")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "instructlite", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
    "text.color": INK, "axes.labelcolor": DIM, "xtick.color": DIM, "ytick.color": DIM, "axes.edgecolor": LINE, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": LINE, "grid.linewidth": 0.5, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "figure.constrained_layout.use": True,
}  # fmt: skip
WIDTH = 4.2  # inches


@dataclass(frozen=True)
class Plot:
    title: str
    description: str
    """The numbers in words, for who cannot see it."""
    svg: str


def missing() -> str | None:
    """What to do where matplotlib is not installed; None where it is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "There are no plots, for matplotlib is not installed: pip install 'instructlite[eval]', then instructlite evaluate again."
    return None


def plots_of(report: Report) -> dict[str, list[Plot]]:
    """By the name of the section that they stand in."""
    plots = {"wins": list(_forests(report)), "strengths": list(_strengths(report)), "distance": list(_over_optimisation(report))}
    plots |= {f"training-{position}": list(_courses(position, row)) for position, row in enumerate(report.training, 1)}
    return {name: found for name, found in plots.items() if found}


# --- intervals --------------------------------------------------------------------------------------------------------

Lines = list[tuple[str, list[tuple[str, Row, str]]]]
"""(group, its lines: (series, row with the interval, the interval in text))."""


def _forests(report: Report) -> Iterator[Plot]:
    """Everybody against the candidate that the headline's is compared with: one plot for each way of decoding."""
    if report.headline is None:
        return
    other = report.headline[1]
    names = [row["name"] for row in report.candidates if row["name"] != other]
    for decoding in dict.fromkeys((row["decoding"], row.get("b_decoding") or row["decoding"]) for row in report.win_rates):
        rows = [row for row in report.win_rates if (row["decoding"], row.get("b_decoding") or row["decoding"]) == decoding]
        groups = [(name, _against(report, rows, name, other)) for name in names]
        groups = [(name, lines) for name, lines in groups if lines]
        if groups:
            ours, theirs = (decoding_name(report, name) for name in decoding)
            title = f"Win rate against {other}, {ours}" if ours == theirs else f"Win rate at {ours} against {other}, {theirs}"
            yield _intervals(f"forest-{'-'.join(decoding)}", title, groups, "rate", 0.5, (0, 1), "0.5: a draw")


def _against(report: Report, rows: list[Row], name: str, other: str) -> list[tuple[str, Row, str]]:
    found = []
    for judge in report.judges:
        row = find(rows, a=name, b=other, judge=judge["name"])
        if row is None and (mirrored := find(rows, a=other, b=name, judge=judge["name"])):
            row = _mirrored(mirrored)
        if row is not None and row.get("rate") is not None:
            found.append((judge["name"], row, between(row, "rate", 2)))
    return found


def _mirrored(row: Row) -> Row:
    low, high = (None if row.get(end) is None else 1 - row[end] for end in ("high", "low"))
    return {"rate": None if row.get("rate") is None else 1 - row["rate"], "low": low, "high": high}


def _strengths(report: Report) -> Iterator[Plot]:
    for judge, decoding in dict.fromkeys((row["judge"], row.get("decoding")) for row in report.strengths or ()):
        rows = [row for row in report.strengths if (row["judge"], row.get("decoding")) == (judge, decoding)]
        lines: Lines = [(row["candidate"], [(judge, row, between(row, "strength", 2, "+"))]) for row in rows]
        ways = f"by {judge}, {decoding_name(report, decoding)}" if decoding else f"by {judge}"
        yield _intervals(f"strength-{len(lines)}-{judge}-{decoding}", f"Strength {ways}", lines, "strength", 0, None, "0: the average")


def _intervals(key: str, title: str, groups: Lines, name: str, middle: float, limits: tuple[float, float] | None, middle_name: str) -> Plot:
    """A dot and its interval on a line of its own; the series differ in colour and shape."""
    series = list(dict.fromkeys(line[0] for _, lines in groups for line in lines))
    height = 0.75 + sum(0.26 + 0.2 * len(lines) for _, lines in groups) + 0.18 * len(series) * (len(series) > 1)
    with _figure(height) as (figure, axes):
        y = 0.0
        for group, lines in groups:
            axes.text(0, y, _short(group), transform=axes.get_yaxis_transform(), va="center", weight="bold")
            y += 1.1
            for label, row, _ in lines:
                _dot(axes, row, name, y, series.index(label))
                axes.text(1.02, y, _numbers(row, name), transform=axes.get_yaxis_transform(), va="center", size=7.5)
                y += 1
            y += 0.3
        axes.axvline(middle, color=DIM, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
        axes.set(ylim=(y - 0.2, -0.8), yticks=[], xlabel=middle_name, **({"xlim": limits} if limits else {}))
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x")
        if len(series) > 1:
            for i, label in enumerate(series):
                axes.plot([], [], marker=MARKERS[i % 4], color=SERIES[i % 4], linewidth=1.6, markersize=5, label=_short(label))
            figure.legend(loc="outside upper left")
        words = "; ".join(f"{group}: {', '.join(f'by {label} {text}' for label, _, text in lines)}" for group, lines in groups)
        return _plot(figure, key, title, words)


def _dot(axes: Axes, row: Row, name: str, y: float, i: int) -> None:
    colour, found = SERIES[i % 4], ends(row, name)
    if found:
        axes.plot(found, [y, y], color=colour, linewidth=1.8, solid_capstyle="round")
    axes.plot([row[name]], [y], marker=MARKERS[i % 4], color=colour, markersize=6)


def _numbers(row: Row, name: str) -> str:
    found = ends(row, name)
    return number(row[name], 2) + (f" [{number(found[0], 2)}, {number(found[1], 2)}]" if found else "")


# --- reward against KL ------------------------------------------------------------------------------------------------


PATHS = {"objective/score": "score that PPO maximises", "watch/score": "held-out reward model"}


def _over_optimisation(report: Report) -> Iterator[Plot]:
    """Above: rollouts of training. Below: held-out prompts, each judge, and best-of-n at its analytic KL."""
    courses = [row for row in report.training if len(_path(row, "objective/score")) > 1]
    points = _points(report)
    lines = sum(bool(_path(row, metric)) for row in courses for metric in PATHS)
    heights = [1.9 + 0.17 * lines] * bool(courses) + [2.6] * bool(points)
    if not heights:
        return
    with _figure(sum(heights), rows=len(heights), sharex=True, height_ratios=heights) as (figure, axes):
        panels = list(axes) if len(heights) > 1 else [axes]
        words = []
        if courses:
            words += list(_training_panel(panels[0], courses))
        if points:
            words += list(_heldout_panel(panels[-1], report, points))
        panels[-1].set_xlabel(f"KL to {report.reference}, nats an answer" if report.reference else "KL, nats an answer")
        yield _plot(
            figure, "over-optimisation", "Does the reward still rise where the KL does, and does anybody else see it?", "; ".join(words)
        )


def _path(row: Row, name: str) -> list[tuple[float, float]]:
    """(KL, score) by rollout; empty where the two were not logged together."""
    kl, scores = row["curves"].get("objective/kl", []), row["curves"].get(name, [])
    return list(zip(kl, scores, strict=True)) if len(kl) == len(scores) else []


def _training_panel(axes: Axes, courses: list[Row]) -> Iterator[str]:
    i = 0
    for row in courses:
        for metric, what in PATHS.items():
            path = _path(row, metric)
            if not path:
                continue
            kl, scores = zip(*path, strict=True)
            label = f"{row['candidate']}: {what}" if len(courses) > 1 else what
            style = {"color": SERIES[i % 4], "marker": MARKERS[i % 4], "linestyle": "-" if metric == "objective/score" else "--"}
            axes.plot(kl, scores, **style, markersize=3, linewidth=0.8, label=_short(label, 44))
            axes.plot(kl[-1:], scores[-1:], color=SERIES[i % 4], marker=MARKERS[i % 4], markersize=7)
            yield f"in training {label} goes from {plain(scores[0])} at {plain(kl[0])} nats to {plain(scores[-1])} at {plain(kl[-1])} nats"
            i += 1
    axes.set(title="In training: each point a rollout, the large one the last", ylabel="mean score")
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.04))


def _points(report: Report) -> list[tuple[Row, float]]:
    others = [(row, kl) for row, kl in distances(report) if row["name"] != report.reference]
    judges = [judge["name"] for judge in report.judges]
    return sorted(
        ((row, kl) for row, kl in others if any(gain_over_reference(report, row["name"], judge) for judge in judges)),
        key=lambda found: found[1],
    )


def _heldout_panel(axes: Axes, report: Report, points: list[tuple[Row, float]]) -> Iterator[str]:
    axes.axhline(0, color=DIM, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
    step = 0.012 * max(kl for _, kl in points)  # judges side by side
    for i, judge in enumerate(report.judges):
        gains = [(row["name"], kl, gain_over_reference(report, row["name"], judge["name"])) for row, kl in points]
        known = [(name, kl, row) for name, kl, row in gains if row is not None]
        colour, x = SERIES[i % 4], [kl + i * step for _, kl, _ in known]
        for at, (_, _, row) in zip(x, known, strict=True):
            if found := ends(row, "gain"):
                axes.plot([at, at], found, color=colour, linewidth=1.6)
        axes.plot(
            x,
            [row["gain"] for _, _, row in known],
            color=colour,
            marker=MARKERS[i % 4],
            markersize=5.5,
            linestyle="",
            label=_short(judge["name"]),
        )
        yield from (
            f"{name}, {plain(kl)} nats from {report.reference}: by {judge['name']} {between(row, 'gain', 2, '+')}"
            for name, kl, row in known
        )
    for level, (row, kl) in enumerate(points):
        bound = ", analytic" if row.get("kl") is None else ""
        axes.annotate(_short(row["name"] + bound, 24), (kl, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, -1 - 10 * (level % 3)),
                      textcoords="offset points", ha="right" if kl > 0.7 * points[-1][1] else "left", va="top", size=7.5)  # fmt: skip
    low, high = axes.get_ylim()
    axes.set(
        title="On held-out prompts, with 95 % intervals",
        ylabel=f"reward over {_short(report.reference or '', 16)}",
        ylim=(low, high + 0.45 * (high - low)),
    )
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)


# --- the course of training -------------------------------------------------------------------------------------------


def _courses(position: int, row: Row) -> Iterator[Plot]:
    """Small multiples: one plot a metric."""
    for metric, values in row["curves"].items():
        rollouts = [1 + i * (row["cycles"] - 1) / max(len(values) - 1, 1) for i in range(len(values))]
        with _figure(1.45, width=2.5) as (figure, axes):
            axes.plot(rollouts, values, color=SERIES[0], linewidth=1.4, marker="o", markersize=2.5 if len(values) <= 20 else 0)
            axes.grid(axis="y")
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", nbins=5, integer=True)
            axes.set_xlabel("rollout")
            ends_of, extremes = f"from {plain(values[0])} to {plain(values[-1])}", f"{plain(min(values))} to {plain(max(values))}"
            words = f"{ends_of} over {row['cycles']} rollouts, in all within {extremes}"
            yield _plot(figure, f"course-{position}-{metric}", SHOWN[metric], words)


# --- SVG --------------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(height: float, rows: int = 1, width: float = WIDTH, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of its own, without pyplot and without the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts than those that measure the text here
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots(rows, 1, **options)


def _plot(figure: Figure, key: str, title: str, description: str) -> Plot:
    title, description = printable(title), printable(description)
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(content.getvalue())
    _strip(root)
    name = re.sub(r"[^a-z0-9-]+", "-", f"plot-{key}".lower())
    _rename(root, name)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    for element in root.iter():  # HTML knows SVG's elements by their plain names
        element.tag = element.tag.rpartition("}")[2]
    return Plot(title, description, ElementTree.tostring(root, encoding="unicode"))


def _strip(root: ElementTree.Element) -> None:
    """Without a size, metadata and a style sheet, which would be the whole page's; in the page's colours."""
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
        if style := parent.get("style"):
            parent.set("style", re.sub(r"#0101\d\d", lambda found: COLOURS[found[0]], style))


def _rename(root: ElementTree.Element, name: str) -> None:
    """Ids that are referred to are made the page's only ones, the others go."""
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{own}")
        if (target := element.attrib.pop(f"{{{XLINK}}}href", None)) is not None:
            element.set("href", f"#{name}-{target[1:]}")
        for key in ("clip-path", "style"):
            if key in element.attrib:
                element.set(key, re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", element.get(key)))


def _references(root: ElementTree.Element) -> Iterable[str]:
    for element in root.iter():
        yield element.get(f"{{{XLINK}}}href", "")
        yield from re.findall(r"url\(#[\w-]+\)", element.get("clip-path", "") + element.get("style", ""))


def _short(text: str, length: int = 36) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"
