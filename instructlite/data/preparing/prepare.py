"""From messy files to demonstrations, comparisons, rankings and prompts that can be trained on, and a page that says what was done.

Two passes in bounded memory. The first reads every row and takes it through the steps that look at one row (normalise, personal data,
copies, length, language, quality, toxicity, leaks); what is left goes to a file beside the output, its fingerprint into memory. Then all
rows are known: near-duplicates, contradictions, the use-case mix and the split by prompt cluster are decided on the fingerprints, and the
second pass writes. Nothing is dropped without being counted: rejected.jsonl has each row that went, with step, reason, file and line.
"""

import json
import os
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import InstructLiteError
from .. import formats
from ..agreement import agreement, alpha
from ..schema import KINDS, Fault
from .data_report import DataReport, Lengths
from .duplicates import Fingerprints, contradictions, exact_duplicates, near_duplicates, prompt_clusters
from .filters import Scorer, language, length, normalise, toxicity
from .leaks import EvaluationSet, evaluation_texts, leaks
from .mixture import Categories, choose, read_mix, towards
from .pii import Backend, mask, patterns, personal_data
from .quality import quality
from .splits import PARTS, assign_parts, mixed
from .steps import Judge, Sample, Tally, batches, each, excerpt, named_function
from .tokens import TokenStatistics

REJECTED = "rejected.jsonl"
REPORTS = tuple(f"data_report.{ending}" for ending in ("md", "html", "json"))
_PREFIX = {"train": "", "reward": "", "heldout": "heldout_", "judge": "judge_", "ppo": "ppo_"}
Progress = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What `prepare` does to the rows. The defaults drop copies, contradictions and broken rows, and count everything else."""

    kind: str | None = None
    """demonstrations, comparisons, rankings, prompts or texts; None: told from each file's keys."""
    near_duplicates: float = 0.75
    """Least common share of words and word pairs of a near-duplicate; 1 leaves near-duplicates alone (and needs no rensa)."""
    min_answer_characters: int | None = None
    """Shortest good answer."""
    max_prompt_characters: int | None = None
    """Longest prompt, all turns together."""
    max_answer_characters: int | None = None
    """Longest answer."""
    language: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages to keep, such as ("en",); empty: all."""
    quality: dict[str, str] = field(default_factory=dict)
    """Action ("drop", "count", "off") by rule: "template residue", "answer repeats the prompt", "refusal", "answer breaks off"."""
    pii: str = "count"
    """What happens to personal data: "count", "mask", "drop" (the row) or "off"."""
    pii_backend: str | Backend | None = None
    """A function text -> spans (start, end, kind), or "module:function"; None: the built-in patterns."""
    phone_regions: tuple[str, ...] = ("US",)
    """Countries whose telephone numbers are known without a leading +."""
    toxicity: str | Scorer | None = None
    """"profanity" (alt-profanity-check), "module:function" or a function texts -> probabilities; None: not looked at."""
    max_toxicity: float = 0.9
    """Rows whose good answer scores this much or more are dropped."""
    evaluation: tuple[str, ...] = ()
    """Files that must not leak into the output."""
    contradictions: str = "drop"
    """Pairs preferred both ways: "drop" what is not the majority of the annotators, or "count"."""
    mix: str | dict[str, float] | None = None
    """Use-case mix to sample towards: "instructgpt", {use case: share}, or a YAML or JSON file of that."""
    mix_distance: float = 0.1
    """Share of rows that may be of another use case than the mix wants: the larger, the more rows stay."""
    heldout: float = 0.1
    """Share of the rows for the held-out files."""
    judge: float = 0.1
    """Share of comparisons and rankings for the judge."""
    ppo: float = 0.2
    """Share of comparisons and rankings whose prompts go to PPO; their answers are set aside in ppo_*.jsonl."""
    group_by: str | None = None
    """A column, such as a labeller's country: rows and agreement are reported by it too."""
    tokenizer: str | None = None
    """A model, whose tokenizer and template count tokens; None: only characters are counted."""
    chat_template: str | None = None
    """chatml, plain or a file, for a tokenizer that has no template; used with `tokenizer`."""
    max_length: int = 1024
    """Tokens of prompt and answer that training will keep, for the report; used with `tokenizer`."""
    seed: int = 0
    """Decides which prompts are held out and which rows the mix drops."""

    def __post_init__(self) -> None:
        choices = {"kind": (None, *KINDS), "pii": ("count", "mask", "drop", "off"), "contradictions": ("drop", "count")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InstructLiteError(f"{name}={getattr(self, name)}: choose {', '.join(filter(None, known))}")
        for name in ("heldout", "judge", "ppo", "mix_distance", "max_toxicity"):
            if not 0 <= getattr(self, name) <= 1:
                raise InstructLiteError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if self.heldout + self.judge + self.ppo >= 1:
            raise InstructLiteError("heldout, judge and ppo together take all rows: nothing would be left for the reward model")
        if not 0.5 <= self.near_duplicates <= 1:
            raise InstructLiteError(f"near_duplicates={self.near_duplicates}: expected 0.5 to 1 (1: leave them alone)")


def prepare(
    sources: str | os.PathLike | Iterable, output: str | os.PathLike, *, progress: Progress = lambda phase, rows: None, **options: object
) -> DataReport:
    """Prepare files, directories or Hub data sets (or rows in memory) into the directory `output`; returns the report.

    Written: demonstrations.jsonl, comparisons.jsonl, rankings.jsonl, texts.jsonl, prompts.jsonl, the same with heldout_, judge_ and ppo_
    (where there are such rows), rejected.jsonl and data_report.{md,html,json}. All files appear at the end, or none.
    options: the fields of PrepareOptions. progress: called with the phase and the rows done in it so far.
    Raises InstructLiteError if no row is left, or if `output` holds files that are not its own.
    """
    chosen = PrepareOptions(**options)  # type: ignore[arg-type]
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    output = Path(output)
    paths = [str(source) for source in given if isinstance(source, (str, os.PathLike))]
    _check_output(output, paths)
    for path in (*paths, *chosen.evaluation):  # a misspelt name is said now, not after the files before it
        first = next(formats.rows(path, chosen.kind if path in paths else None))
        if isinstance(first, Fault) and first.line == 0:
            raise InstructLiteError(first.problem)
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".prepare-", dir=output))
    try:
        report = Preparation(chosen, work, progress).run(given)
        for name in _own_files(output):
            (output / name).unlink(missing_ok=True)
        for path in [*work.glob("*.jsonl"), *report.save(work)]:
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


class Preparation:
    """The state of one run: counts, fingerprints, the file between the passes."""

    def __init__(self, options: PrepareOptions, work: Path, progress: Progress) -> None:
        self.options, self.work, self.progress = options, work, progress
        find = _pii_backend(options)
        self.conceal = lambda text: mask(text, find)
        self.steps = _steps(options, find, self.conceal)
        self.prints = Fingerprints(near=options.near_duplicates < 1)
        self.categories = Categories()
        self.category, self.group, self.file, self.line, self.offset = (array(code) for code in "BLLQQ")
        self.files: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        self.report = DataReport()
        self.mix = read_mix(options.mix)
        self.tokens = TokenStatistics(options.tokenizer, options.max_length, options.chat_template) if options.tokenizer else None

    def run(self, sources: list) -> DataReport:
        started = time.perf_counter()
        with Tally(self.work / REJECTED, self.conceal) as tally:
            self._first_pass(sources, tally)
            decisions = self._decide(tally)
            self._second_pass(tally, decisions)
        (self.work / "rows.spool").unlink()
        if not any(self.report.files.values()):
            raise InstructLiteError(f"no row is left: {_what_happened(tally)}")
        self.report.finish(tally.steps, time.perf_counter() - started)
        return self.report

    # 1. Row by row

    def _first_pass(self, sources: list, tally: Tally) -> None:
        with (self.work / "rows.spool").open("wb") as spool:
            for batch in batches(self._read(sources, tally)):
                self.progress("read", tally.step("read").rows_in)
                for name, judge in self.steps:
                    batch = tally.run(name, judge, batch)
                self.prints.add(batch, KINDS)
                for sample in batch:
                    self._remember(sample, spool.tell())
                    spool.write(json.dumps([sample.kind, sample.file, sample.line, sample.record]).encode() + b"\n")

    def _read(self, sources: list, tally: Tally) -> Iterator[Sample]:
        """The rows of all sources; what cannot be read is rejected here."""
        count = tally.step("read")
        for item in _items(sources, self.options.kind):
            count.rows_in += item.rows
            if isinstance(item, Fault):
                if item.line == 0:  # the whole file
                    self.report.notes.append(item.problem)
                count.rejected["cannot be read"] += item.rows
                count.show("cannot be read", Sample({}, "", item.file, item.line), str(item))
                tally.write_rejected("read", f"cannot be read: {item}", item.file, item.line, item.raw)
                continue
            count.kept += item.rows
            self.report.inputs.setdefault(item.file, Counter())[item.kind] += 1
            yield Sample(item.record, item.kind, item.file, item.line)

    def _remember(self, sample: Sample, offset: int) -> None:
        self.category.append(self.categories.number(sample))
        self.file.append(self.files.setdefault(sample.file, len(self.files)))
        self.line.append(sample.line)
        self.offset.append(offset)
        group = str(sample.record.get(self.options.group_by, "")) if self.options.group_by else ""
        self.group.append(self.groups.setdefault(group, len(self.groups)))

    # 2. All rows together

    def _decide(self, tally: Tally) -> "Decisions":
        options, prints = self.options, self.prints
        self.progress("near-duplicates", 0)
        earlier = near_duplicates(prints, options.near_duplicates)
        clusters = prompt_clusters(prints, earlier)
        kept = earlier == np.arange(len(prints))
        kinds = np.array(prints.kinds)
        self._agreement(kept & (kinds == KINDS.index("comparisons")))
        lost, self.report.contested = contradictions(prints, kept)
        if options.contradictions == "drop":
            kept &= ~lost
        surplus = self._surplus(kinds, kept)
        kept &= ~surplus
        preference = np.isin(kinds, [KINDS.index(name) for name in ("comparisons", "rankings")])
        prompts = np.array(prints.prompts)
        shares = {name: getattr(options, name) for name in ("heldout", "judge", "ppo")}
        parts = assign_parts(clusters, prompts, preference, kept, shares, options.seed)
        self.report.clusters = len(np.unique(clusters[kept]))
        eligible = kept & (kinds != KINDS.index("texts"))
        for_ppo = _firsts(prompts, eligible & np.isin(parts, [PARTS.index("train"), PARTS.index("ppo")]))
        heldout = _firsts(prompts, eligible & (parts == PARTS.index("heldout")))
        return Decisions(earlier, lost, surplus, parts, for_ppo | heldout)

    def _agreement(self, asked: np.ndarray) -> None:
        """Rows and agreement by annotator and group, on the comparisons before contradictions go."""
        pairs, votes = np.array(self.prints.pairs)[asked], np.array(self.prints.directions)[asked]
        people = self.prints.annotators_named
        if not len(pairs) or (len(people) < 2 and len(self.groups) < 2):
            return
        raters = np.array(self.prints.annotators)[asked]
        self.report.annotators = agreement(pairs, votes, raters, list(people)) if len(people) > 1 else []
        self.report.alpha = alpha(pairs, votes)
        if len(self.groups) > 1:
            groups = np.array(self.group)[asked]
            self.report.groups = agreement(pairs, votes, groups, list(self.groups))
            for row in self.report.groups:
                inside = groups == self.groups[row["name"]]
                row["alpha"] = alpha(pairs[inside], votes[inside])

    def _surplus(self, kinds: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Rows that the mix has too many of, kind by kind; the mix before and after goes into the report."""
        names, numbers = self.categories.names, np.array(self.category)
        surplus = np.zeros(len(kinds), bool)
        order = mixed(np.array(self.prints.prompts), self.options.seed + 1)
        for number, kind in enumerate(KINDS):
            rows = kept & (kinds == number)
            if not rows.any() or kind == "texts":
                continue
            counts = dict(zip(names, np.bincount(numbers[rows], minlength=len(names)).tolist(), strict=True))
            after = counts
            if self.mix:
                after = towards(counts, self.mix, self.options.mix_distance)
                surplus |= choose(numbers, order, rows, {names.index(name): limit for name, limit in after.items()})
            self.report.add_mix(kind, counts, after, self.mix)
        self.report.classified = dict(self.categories.told)
        return surplus

    # 3. Write

    def _second_pass(self, tally: Tally, decisions: "Decisions") -> None:
        steps = [tally.step(name) for name in ("near-duplicates", "contradictions", "use-case mix")]
        drop_contested = self.options.contradictions == "drop"
        with ExitStack() as stack:
            outputs: dict[str, object] = {}

            def write(name: str, record: dict) -> None:
                if name not in outputs:
                    outputs[name] = stack.enter_context((self.work / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n"))
                outputs[name].write(json.dumps(record, ensure_ascii=False) + "\n")
                self.report.files[f"{name}.jsonl"] = self.report.files.get(f"{name}.jsonl", 0) + 1

            spool = stack.enter_context((self.work / "rows.spool").open("rb"))
            for number, line in enumerate(spool):
                kind, file, place, record = json.loads(line)
                sample = Sample(record, kind, file, place)
                first = int(decisions.earlier[number])
                reasons = (
                    f"near-duplicate: of {self._place(first)}" if first != number else None,
                    "contradicts another preference" if decisions.lost[number] and drop_contested else None,
                    "more of its use case than the mix takes" if decisions.surplus[number] else None,
                )
                if first != number and len(self.report.near) < 5:
                    self._show_near(sample, first)
                if decisions.lost[number] and not drop_contested and first == number:
                    steps[1].noticed["contradicts another preference"] += 1
                if all(tally.settle(count, sample, reason) for count, reason in zip(steps, reasons, strict=True)):
                    self._write_row(sample, PARTS[decisions.parts[number]], bool(decisions.prompt[number]), write)
                if number % 1000 == 0:
                    self.progress("write", number)
        self.progress("write", len(self.prints))

    def _write_row(self, sample: Sample, part: str, gives_prompt: bool, write: Callable[[str, dict], None]) -> None:
        self.report.lengths.setdefault(sample.kind, Lengths()).add(sample)
        if self.tokens:
            self.tokens.add(sample)
            self.report.tokens = self.tokens.lengths
        if sample.kind in ("demonstrations", "texts") and part != "heldout":
            part = "train"  # SFT may see a prompt of the judge's; that PPO does not is seen to by gives_prompt
        if sample.kind != "prompts":
            write(f"{_PREFIX[part]}{sample.kind}", sample.record)
        if gives_prompt:
            # A prompt of its own brings its other columns, which reward functions get; of other rows the prompt alone is one.
            record = sample.record if sample.kind == "prompts" else {"prompt": sample.turns}
            write("heldout_prompts" if part == "heldout" else "prompts", record)
        self.report.parts[part][sample.kind] += 1

    def _place(self, number: int) -> str:
        return f"{list(self.files)[self.file[number]]}:{self.line[number]}"

    def _show_near(self, sample: Sample, first: int) -> None:
        with (self.work / "rows.spool").open("rb") as spool:
            spool.seek(self.offset[first])
            kind, file, line, record = json.loads(spool.readline())
        other = Sample(record, kind, file, line)
        self.report.near.append([{"place": row.place, "text": self.conceal(excerpt(row, 300))} for row in (other, sample)])


@dataclass(frozen=True)
class Decisions:
    """What was decided when all rows were known, one entry a row."""

    earlier: np.ndarray
    lost: np.ndarray
    surplus: np.ndarray
    parts: np.ndarray
    prompt: np.ndarray
    """The row's prompt goes into prompts.jsonl or heldout_prompts.jsonl: it is the first row there with that prompt."""


def _steps(options: PrepareOptions, find: Backend, conceal: Callable[[str], str]) -> list[tuple[str, Judge]]:
    steps: list[tuple[str, Judge]] = [("normalise", each(normalise))]
    if options.pii != "off":  # before anything else is rejected, so that rejected.jsonl is masked too
        steps.append(("personal data", each(personal_data(find, options.pii))))
    steps.append(("exact duplicates", each(exact_duplicates())))
    limits = (options.min_answer_characters, options.max_prompt_characters, options.max_answer_characters)
    if any(limit is not None for limit in limits):
        steps.append(("length", each(length(*limits))))
    if options.language:
        steps.append(("language", each(language(options.language))))
    steps.append(("quality", each(quality(options.quality, conceal))))
    if options.toxicity is not None:
        steps.append(("toxicity", toxicity(options.toxicity, options.max_toxicity)))
    if options.evaluation:
        found = (_sample(item) for item in _items(list(options.evaluation), None))
        steps.append(("evaluation leaks", each(leaks(EvaluationSet(evaluation_texts(found))))))
    return steps


def _pii_backend(options: PrepareOptions) -> Backend:
    given = options.pii_backend
    if given is None:
        return patterns(options.phone_regions, exact_phones=options.pii != "off")  # off: only what the report shows is masked
    return named_function("pii_backend", given) if isinstance(given, str) else given


def _items(sources: list, kind: str | None) -> Iterator[formats.Row | Fault]:
    for number, source in enumerate(sources, 1):
        if isinstance(source, (str, os.PathLike)):
            yield from formats.rows(str(source), kind)
        else:
            yield from formats.rows_in_memory([source], kind, number)


def _sample(item: formats.Row | Fault) -> Sample:
    if isinstance(item, Fault):
        raise InstructLiteError(f"evaluation file: {item.problem}")
    return Sample(item.record, item.kind, item.file, item.line)


def _firsts(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of the rows, those that are the first with their key."""
    numbers = np.flatnonzero(rows)
    first = np.zeros(len(keys), bool)
    first[numbers[np.unique(keys[numbers], return_index=True)[1]]] = True
    return first


def _check_output(output: Path, sources: list[str]) -> None:
    if output.exists() and not output.is_dir():
        raise InstructLiteError(f"{output}: is a file; --out takes a directory")
    inside = [source for source in sources if Path(source).resolve().parent == output.resolve()]
    if inside:
        raise InstructLiteError(f"{output}: {inside[0]} lies in the output directory and could be overwritten (choose another)")
    foreign = sorted({path.name for path in output.glob("*.jsonl")} - _own_files(output))
    if foreign:
        raise InstructLiteError(f"{output}: {foreign[0]} there was not written by `data prepare` (choose another directory)")


def _own_files(output: Path) -> set[str]:
    """What an earlier run wrote there."""
    report = output / REPORTS[-1]
    if not report.is_file():
        return set()
    try:
        return {REJECTED, *REPORTS, *(Path(name).name for name in json.loads(report.read_text(encoding="utf-8"))["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InstructLiteError(f"{report}: is no report of `data prepare` (choose another directory)") from error


def _what_happened(tally: Tally) -> str:
    reasons = Counter({f"{count.name}: {reason}": rows for count in tally.steps.values() for reason, rows in count.rejected.items()})
    return ", ".join(f"{reason} {rows:,}" for reason, rows in reasons.most_common(5)) or "the files have none"
