"""What an evaluation found: first in plain words, computed from the numbers and saying no more than their intervals, then in tables.

As an HTML page, Markdown, JSON and terminal text. Text of prompts and models is shown as text: nothing in it becomes markup.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable

from ..data.records import write_records
from ..errors import InstructLiteError
from .formatting import Row, find, printable
from .markdown import to_markdown
from .page import to_html
from .tables import Table, candidate_table, side_effect_tables, strength_tables, win_tables
from .verdict import prompts_words, verdict

FORMAT = 2


@dataclass
class Report:
    """The result of `evaluate`. `print` it for the tables, `save` it for report.html, report.md and report.json.

    Rows are plain dictionaries; an interval of `x` is `x`, `x_low`, `x_high`, and None is "not known", as is a key that a row lacks.
    Sampled answers come before greedy ones, the first judge before the others.
    """

    base: Row
    """id, revision, fingerprint, quantization, dtype."""
    settings: Row
    reference: str | None
    """The candidate that KL is measured from."""
    headline: list[str] | None
    """[a, b]: the pair that the first words are about."""
    candidates: list[Row]
    """name, base, adapter (sha256; None: none), kind ("base", "few-shot", "context", "adapter", "best-of-n", "merged"), n and analytic_kl
    (of best-of-n), stage ("sft", "dpo", "ppo"), mean_reward…, kl, kl_standard_error, perplexity, and the sampled `texts`."""
    judges: list[Row]
    """name, kind ("reward", "ensemble", "language model", "people"), adapter, accuracy… on held-out pairs and that of preferring the
    longer answer (`longer_wins`), names of the candidates it `trained`, and of those that another reward model did (`not_trained`).
    Of language models also position_bias…, same_in_both_orders, missing, warnings."""
    win_rates: list[Row]
    """a, b, judge, decoding (b_decoding, where b's is another), rate, low, high, prompts, gain… (mean reward of a less that of b),
    length_controlled…, p_of_a_draw, prompts_needed, warnings."""
    rewards: list[Row]
    """candidate, judge, decoding, mean_reward…"""
    texts: list[Row]
    """candidate, decoding, length, ended, distinct_2, repeated_trigrams."""
    sharpening: Row | None
    """share… of a's gain over b at the sampling temperature that b reaches by greedy decoding alone."""
    samples: list[Row]
    """prompt and sample (numbers), why ("loss" or "first"): the answers that the pages show."""
    seconds: dict[str, float]
    """By phase."""
    training: list[Row]
    """Of candidates that PPO trained: candidate, cycles, curves by metric, and the health checks' warnings."""
    answers: list[Row]
    """Each prompt with all answers and their scores: answers.jsonl."""
    strengths: list[Row] | None = None
    """judge, decoding, candidate, strength, low, high: Bradley-Terry log-odds, strongest first; None where not all are connected."""
    agreement: Row | None = None
    """judges (names), alpha…: Krippendorff's."""
    ratings: list[Row] = field(default_factory=list)
    """candidate, judge, scale ("pointwise", "likert", "…_reference"), decoding, rating…, missing."""
    side_effects: list[Row] = field(default_factory=list)
    """candidate, decoding, set (of prompts), category (a use case, None: all), measure, unit, better ("higher", "lower", None),
    value…, n."""
    benchmarks: list[Row] = field(default_factory=list)
    """candidate, task, metric, value, standard_error, n, how."""
    costs: list[Row] = field(default_factory=list)
    """candidate, stage, seconds, peak_rss_mb, tokens."""

    def to_dict(self) -> Row:
        """What report.json holds: everything but the answers; numbers that are not finite are None."""
        return {"format": FORMAT} | {f.name: _finite(getattr(self, f.name)) for f in fields(self) if f.name != "answers"}

    def save(self, directory: str | Path) -> None:
        """Write report.html, report.md, report.json and answers.jsonl (all answers with their scores, a prompt a line)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / "answers.jsonl", self.answers)
        (directory / "report.html").write_text(self.to_html(), encoding="utf-8")
        (directory / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (directory / "report.json").write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read report.json, or the directory it is in; without the answers, which it has not. Of format 1, too, which had fewer parts."""
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InstructLiteError(f"{path}: not a report ({error}); instructlite evaluate writes one") from error
        names = {f.name for f in fields(cls)} - {"answers"}
        optional = {f.name for f in fields(cls) if not (f.default is MISSING and f.default_factory is MISSING)}
        known = isinstance(content, dict) and content.pop("format", None) in (1, FORMAT) and names - optional <= set(content) <= names
        if not known:
            raise InstructLiteError(f"{path}: not a report of this version; write it anew with instructlite evaluate")
        return cls(**content, answers=[])

    # --- what it says -----------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return f"{', '.join(row['name'] for row in self.candidates)} on held-out prompts"

    def verdict(self, advised: bool = True) -> str:
        """Paragraphs of plain text; the first says what improved, by how much, how sure that is, what it cost and what to do next.

        advised: False leaves out what to do next, for readers to whom that is not said, as those of a model card.
        """
        return verdict(self, advised)

    def headline_row(self, decoding: str, judge: str | None = None) -> Row | None:
        """The win rate of the pair that the first words are about, both decoded the same way; judge: None is the first one."""
        if self.headline is None or not self.judges:
            return None
        a, b = self.headline
        rows = (row for row in self.win_rates if row.get("b_decoding") in (None, row["decoding"]))
        return find(rows, a=a, b=b, decoding=decoding, judge=judge or self.judges[0]["name"])

    def cross_row(self) -> Row | None:
        """a's sampled answers against b's greedy ones, by the first judge."""
        if self.headline is None or not self.judges:
            return None
        a, b = self.headline
        row = find(self.win_rates, a=a, b=b, decoding="sampled", b_decoding="greedy", judge=self.judges[0]["name"])
        return row if row is not None and row.get("rate") is not None else None

    # --- as pages, and in the terminal ------------------------------------------------------------------------------

    def to_markdown(self) -> str:
        return to_markdown(self)

    def to_html(self) -> str:
        """One file without scripts or requests; with matplotlib, plots are drawn into it."""
        return to_html(self)

    def __str__(self) -> str:
        judged = f", judged by {self.judges[0]['name']}" if self.judges else ""
        heading = f"{prompts_words(self)}{judged}; in brackets 95 % intervals"
        shown = [*win_tables(self)[:1], candidate_table(self), *strength_tables(self), *side_effect_tables(self)[:1]]
        words = [textwrap.fill(printable(paragraph), 110, break_long_words=False) for paragraph in self.verdict().split("\n\n")]
        return "\n\n".join([printable(heading), *(_terminal(table) for table in shown if table is not None), *words])


def _terminal(shown: Table) -> str:
    table = TerminalTable(*map(printable, shown.header), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in shown.rows:
        table.add_row(*map(printable, row))
    text = io.StringIO()
    Console(file=text, width=240, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
