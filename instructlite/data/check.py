"""`instructlite data check`: what is wrong with data files, by file and line, in one pass and bounded memory; and a clean copy.

Two grades. A *problem* is a row that training refuses: it stops everything, exit code 2. A *warning* is a row that training takes and a
person should look at: it repeats or contradicts an earlier one, its prompt stands in the held-out file too, it holds a control token.
`fix` writes the good rows in their normal form and every other row, with its reason, into `rejected.jsonl`:
rows in = rows kept + rows rejected, always. Near-duplicates, quality rules and masking personal data are prepare's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from ..errors import BadRecords, InstructLiteError
from .clean import CleanCopy
from .containers import files_in
from .formats import Row, rows
from .layouts import CONTROL_TOKEN
from .lengths import LengthLimit
from .preparing.pii import patterns
from .repeats import Repeats, Table, prompt_key
from .schema import KINDS, Fault

KEPT = 1000  # problems of a file that are kept by name, and warnings of each cause; the rest are counted
NORMAL_KEYS = {
    "demonstrations": {"prompt", "completion"},
    "comparisons": {"prompt", "chosen", "rejected"},
    "rankings": {"prompt", "responses", "ranks"},
    "prompts": {"prompt"},
    "texts": {"text"},
}
WARNINGS_LISTED = 5
CAUSES = {
    "repeats": "repeat an earlier row (--fix leaves them out)",
    "contradicts": "contradict an earlier row of the same annotator (--fix leaves them out; which one is right?)",
    "held-out": "have a prompt that is held out (leave them out, or the evaluation measures memory)",
    "case": "prefer one of two answers that differ in nothing but case (meant so?)",
    "control token": "hold what looks like a control token (it will be read as text; residue of a template?)",
    "control character": "held control characters such as NUL (they are taken out)",
    "personal data": "hold what looks like personal data or keys (instructlite data prepare masks them)",
    "length": "are too long for training, which leaves them out (shorten them, or raise max_length)",
}


@dataclass
class Options:
    """How strictly, and against what."""

    kind: str | None = None
    format: str | None = None
    held_out: str | None = None
    """A file whose prompts must not be in the others."""
    scale: tuple[float, float] | None = None
    """The least and the highest score that a Likert score may be."""
    tokenizer: str | None = None
    """A model's directory or name on the Hub; with `max_length`, rows of more tokens are named."""
    max_length: int | None = None
    strict: bool = False
    """Warnings are problems."""
    keep_repeats: bool = False
    """Rows that repeat or contradict an earlier one stay in the clean copy."""


@dataclass
class FileReport:
    """What was found in one file; printed, it is what `instructlite data check` shows."""

    path: str
    kind: str | None = None
    """None: no row's keys fit any kind."""
    format: str | None = None
    rows_in: int = 0
    rows: int = 0
    """Rows kept."""
    rejected: int = 0
    records: int = 0
    """What the kept rows make: fewer where rows are joined, more where trees are parted."""
    found: int = 0
    """Problems in all."""
    problems: list[str] = field(default_factory=list)
    """`file:line: what`, one for each bad row, or `file: what`; the first KEPT."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """By cause (CAUSES), `file:line: what`; the first KEPT of each."""
    warned: Counter = field(default_factory=Counter)
    """Rows warned of, by cause."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing but stops nothing: extra keys, ties."""

    def add_problem(self, problem: str) -> None:
        self.found += 1
        if len(self.problems) < KEPT:
            self.problems.append(problem)

    def add_warning(self, cause: str, warning: str) -> None:
        self.warned[cause] += 1
        if self.warned[cause] <= KEPT:
            self.warnings.setdefault(cause, []).append(warning)

    def __str__(self) -> str:
        what = (self.kind if self.format in (None, self.kind) else f"{self.kind} ({self.format})") or "rows of no known kind"
        made = f" ({self.records:,} records)" if self.records != self.rows else ""
        found = f"{self.found:,} problem{'s' * (self.found > 1)}" if self.found else "no problems"
        lines = [f"{self.path}: {self.rows_in:,} rows in = {self.rows:,} kept{made} + {self.rejected:,} rejected: {what}, {found}"]
        lines += _alike(self.problems, self.found)
        for cause, count in self.warned.items():
            shown = self.warnings[cause][:WARNINGS_LISTED]
            lines += [f"warning: rows that {CAUSES[cause]}: {count:,}", *(f"  {line}" for line in shown)]
            lines += [f"  +{count - len(shown):,} more"] if count > len(shown) else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _alike(problems: list[str], found: int) -> list[str]:
    """The problems with those that say the same together, and as many as BadRecords lists."""
    lines_of: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        file, line, reason = re.fullmatch(r"(.*?):(?:(\d+):)? (.*)", problem, re.DOTALL).groups()
        lines_of.setdefault((file, reason), []).append(line or "")
    shown, told = [], 0
    for (file, reason), lines in list(lines_of.items())[: BadRecords.LISTED]:
        more = f", +{len(lines) - 11:,} more" if len(lines) > 11 else ""
        shown.append(f"{file}:{lines[0]}: {reason}" if lines[0] else f"{file}: {reason}")
        shown += [f"  the same in line {', '.join(lines[1:11])}{more}"] if len(lines) > 1 else []
        told += len(lines)
    return shown + ([f"+{found - told:,} more"] if found > told else [])


def check_file(path: str | Path, kind: str | None = None) -> FileReport:
    """Read a file once, in bounded memory, and report its kind, rows, problems, warnings and notes."""
    return check_files([path], Options(kind=kind))[0]


def check_files(
    files: Sequence[str | Path],
    options: Options | None = None,
    fix: str | Path | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[FileReport]:
    """A report for each file, those of directories too; repeated rows are found across all of them.

    fix: a directory for the clean copy, which gets one JSONL file for each of `files` and rejected.jsonl.
    progress: called now and then with the file and the rows of it that were read.
    """
    options = options or Options()
    if options.kind not in (None, *KINDS):
        raise InstructLiteError(f"'{options.kind}' is no kind of record: {', '.join(KINDS)}")
    checker = _Checker(options)
    files = [part for file in files for part in files_in(file) or [file]]
    with CleanCopy(Path(fix), files) if fix else nullcontext() as copy:
        reports = [checker.check(str(file), copy, progress or (lambda file, count: None)) for file in files]
    return [*checker.held_out_reports, *reports]


class _Checker:
    """What is remembered from one file to the next."""

    def __init__(self, options: Options):
        self.options = options
        self.repeats = Repeats()
        self.personal_data = patterns(exact_phones=False)
        self.held_out = Table()
        self.held_out_reports: list[FileReport] = []
        self.tokens = LengthLimit(options.tokenizer, options.max_length) if options.tokenizer else None
        if options.held_out:
            self._read_held_out(options.held_out)

    def _read_held_out(self, file: str) -> None:
        report = FileReport(file)
        for row in rows(file):
            if isinstance(row, Fault):
                report.add_problem(f"held out: {row.problem}")
            else:
                self.held_out.add(_folded_prompt(row), row.line)
        self.held_out_reports = [report] if report.problems else []

    def check(self, file: str, copy: CleanCopy | None, progress: Callable[[str, int], None]) -> FileReport:
        report = FileReport(file, self.options.kind)
        summary = _Summary()
        before = _state(file)
        for number, row in enumerate(rows(file, self.options.kind, self.options.format)):
            report.rows_in += row.rows
            reason = self._rejection(row, report, fixing=copy is not None)
            if reason is None:
                report.rows += row.rows
                report.records += 1
                report.kind, report.format = row.kind, row.format
                summary.add(row)
                if copy:
                    copy.keep(file, row.record)
            else:
                report.rejected += row.rows
                if copy:
                    copy.reject(row, reason)
            if number % 1000 == 0:
                progress(file, report.rows_in)
        if _state(file) != before:
            report.add_problem(f"{file}: changed while it was read (check it again when nothing writes to it)")
        if self.tokens and report.records and report.warned["length"] >= report.records:
            report.add_problem(f"{file}: all rows are longer than max_length={self.options.max_length} tokens")
        if report.rows_in != report.rows + report.rejected:
            raise AssertionError(f"{file}: {report.rows_in} rows in, {report.rows} kept and {report.rejected} rejected")
        report.notes = summary.notes()
        if not report.rows and report.problems and "broken JSON at column 1:" in report.problems[0]:
            report.notes.append("expected are JSONL (one object a line), a JSON array, CSV with the names of its columns first, or Parquet")
        if self.repeats.full:
            report.notes.append("repeated rows were looked for among the first 10,000,000")
        return report

    def _rejection(self, row: Row | Fault, report: FileReport, fixing: bool) -> str | None:
        """Why the row is not kept, or None; problems and warnings go into the report."""
        if isinstance(row, Fault):
            report.add_problem(row.problem)
            return str(row)
        if fault := self._out_of_scale(row):
            report.add_problem(f"{row.file}:{row.line}: {fault}")
            return fault
        reason = None
        for cause, warning in self._warnings(row):
            if self.options.strict:
                report.add_problem(f"{row.file}:{row.line}: {warning}")
                reason = reason or warning
                continue
            report.add_warning(cause, f"{row.file}:{row.line}: {warning}")
            if fixing and cause in ("repeats", "contradicts") and not self.options.keep_repeats:
                reason = reason or warning
        return reason

    def _out_of_scale(self, row: Row) -> str | None:
        if not self.options.scale or "scores" not in row.record:
            return None
        least, most = self.options.scale
        return next(
            (
                f"score {score} is not on the scale from {least:g} to {most:g}"
                for score in row.record["scores"]
                if not least <= score <= most
            ),
            None,
        )

    def _warnings(self, row: Row) -> Iterator[tuple[str, str]]:
        record = row.record
        if repeated := self.repeats.seen(record, row.kind, row.file, row.line):
            yield repeated[0], " ".join(repeated)
        if self.options.held_out and (line := self.held_out.get(_folded_prompt(row))):
            yield "held-out", f"its prompt is that of {self.options.held_out}:{line}"
        if row.kind == "comparisons" and _but_for_case(record["chosen"], record["rejected"]):
            yield "case", "'chosen' and 'rejected' differ in nothing but case"
        texts = _texts(row)
        joined = "\n".join(texts)
        if ("<" in joined or "[" in joined) and (token := CONTROL_TOKEN.search(joined)):
            yield "control token", f"holds {token[0]}"
        if row.cleaned:
            yield "control character", "held control characters"
        # Most rows have neither a digit nor an @, and so none of these; that is told a hundred times as fast.
        told = texts if any(mark in joined for mark in "@0123456789") else ()
        if kinds := sorted({span.kind for text in told for span in self.personal_data(text)}):
            yield "personal data", f"holds {', '.join(kinds)}"  # never the data themselves
        if self.tokens and (reason := self.tokens.too_long(record, row.kind)):
            yield "length", reason


class _Summary:
    """What is said of a file as a whole."""

    def __init__(self) -> None:
        self.extra: dict[str, None] = {}
        self.pairs = self.tied = 0

    def add(self, row: Row) -> None:
        if len(self.extra) < 20:
            self.extra.update(dict.fromkeys(map(str, row.record.keys() - NORMAL_KEYS[row.kind])))
        if row.kind == "rankings":
            pairs = list(combinations(row.record["ranks"], 2))
            self.pairs += len(pairs)
            self.tied += sum(first == second for first, second in pairs)

    def notes(self) -> list[str]:
        notes = [f"extra keys kept: {', '.join(sorted(self.extra))}"] if self.extra else []
        return notes + ([f"tied pairs, from which nothing is learnt: {self.tied:,} of {self.pairs:,}"] if self.tied else [])


def _texts(row: Row) -> list[str]:
    record = row.record
    answers = [record[key] for key in ("completion", "chosen", "rejected") if key in NORMAL_KEYS[row.kind]]
    prompt = [record["text"]] if row.kind == "texts" else [turn["content"] for turn in record["prompt"]]
    return [*prompt, *answers, *(record["responses"] if row.kind == "rankings" else ())]


def _but_for_case(first: str, second: str) -> bool:
    # Most pairs differ in their first character, and folding whole answers takes long.
    return first.lstrip()[:1].casefold() == second.lstrip()[:1].casefold() and first.casefold().split() == second.casefold().split()


def _folded_prompt(row: Row) -> int:
    """Case and white space aside."""
    return hash(tuple(" ".join(part.casefold().split()) for part in prompt_key(row.record, row.kind)))


def _state(file: str) -> tuple[int, int] | None:
    path = Path(file)
    if not path.is_file():
        return None
    about = path.stat()
    return about.st_size, about.st_mtime_ns
