"""What `prepare` did, as data_report.md, data_report.html and data_report.json.

The page is one file without scripts: bars are styled boxes. All text of rows stands there as text, with personal data masked.
"""

import html
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .mixture import classifier_accuracy, distance
from .splits import PARTS
from .steps import Sample, StepCount
from .tokens import TokenLengths, quantiles

TEMPLATE = Path(__file__).parent / "data_report.html.jinja"
PART_NAMES = {
    "train": "train: SFT, and prompts for PPO",
    "reward": "reward model",
    "judge": "judge (another reward model)",
    "ppo": "PPO: their prompts; the answers are set aside",
    "heldout": "held out",
}


@dataclass
class Lengths:
    """Characters of the rows of one kind."""

    prompt: array = field(default_factory=lambda: array("L"))
    best: array = field(default_factory=lambda: array("L"))
    compared: int = 0
    longer: int = 0
    """Comparisons whose chosen answer is the longer one; far from half, a reward model learns length."""

    def add(self, sample: Sample) -> None:
        self.prompt.append(len(sample.prompt))
        if sample.best is not None:
            self.best.append(len(sample.best))
        if sample.kind == "comparisons":
            chosen, rejected = map(len, sample.answers)
            self.compared += chosen != rejected
            self.longer += chosen > rejected

    def to_dict(self) -> dict:
        parts = {"prompt": self.prompt, "answer": self.best}
        found = {name: quantiles(np.array(values)) | {"histogram": _histogram(values)} for name, values in parts.items() if values}
        return found | ({"chosen_is_longer": self.longer / self.compared} if self.compared else {})


@dataclass
class DataReport:
    """The counts of one run of `prepare`. `print` it for a summary; `save` writes the pages."""

    inputs: dict[str, Counter] = field(default_factory=dict)
    """Records by file and kind."""
    files: dict[str, int] = field(default_factory=dict)
    """Rows by file written."""
    steps: list[StepCount] = field(default_factory=list)
    parts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    """Rows by part and kind."""
    clusters: int = 0
    contested: int = 0
    """Pairs that were preferred both ways."""
    near: list[list[dict]] = field(default_factory=list)
    """A few near-duplicates: [earlier, later], each {place, text}."""
    mixes: list[dict] = field(default_factory=list)
    classified: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    tokens: dict[str, TokenLengths] = field(default_factory=dict)
    annotators: list[dict] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)
    alpha: float | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add_mix(self, kind: str, before: Mapping[str, int], after: Mapping[str, int], target: Mapping[str, float] | None) -> None:
        """target: what was sampled towards; None: nothing was, and InstructGPT's mix is shown beside."""
        from .mixture import INSTRUCTGPT

        compared = target or INSTRUCTGPT
        total, left = sum(before.values()), sum(after.values())
        rows = [
            {
                "use_case": name,
                "rows": before.get(name, 0),
                "share": before.get(name, 0) / total,
                "target": compared.get(name, 0.0),
                "kept": after.get(name, 0),
                "kept_share": after.get(name, 0) / left if left else 0.0,
            }
            for name in sorted({*before, *compared}, key=lambda name: (-compared.get(name, 0), -before.get(name, 0)))
            if before.get(name) or compared.get(name)
        ]
        entry = {"kind": kind, "rows": rows, "sampled": target is not None, "distance": distance(before, compared)}
        self.mixes.append(entry | {"distance_after": distance(after, compared)})

    def finish(self, steps: Mapping[str, StepCount], seconds: float) -> None:
        """Take over the counts, and say in words what needs a person's eye."""
        self.steps, self.seconds = list(steps.values()), seconds
        self.notes += list(_remarks(self))

    @property
    def rows_in(self) -> int:
        return self.steps[0].rows_in

    @property
    def records(self) -> int:
        """What the rows became: K scored answers are one ranking, a tree is several demonstrations."""
        return self.steps[1].rows_in

    @property
    def kept(self) -> int:
        return self.steps[-1].kept

    def to_dict(self) -> dict:
        return {
            "rows_in": self.rows_in,
            "records": self.records,
            "kept": self.kept,
            "inputs": {name: dict(kinds) for name, kinds in self.inputs.items()},
            "files": self.files,
            "steps": [step.to_dict() for step in self.steps],
            "parts": {part: dict(self.parts[part]) for part in PARTS if self.parts.get(part)},
            "clusters": self.clusters,
            "contested": self.contested,
            "near_duplicates": self.near,
            "use_cases": self.mixes,
            "classified": self.classified,
            "classifier": classifier_accuracy(),
            "characters": {kind: lengths.to_dict() for kind, lengths in self.lengths.items()},
            "tokens": {kind: lengths.to_dict() for kind, lengths in self.tokens.items()},
            "annotators": self.annotators,
            "groups": self.groups,
            "alpha": self.alpha,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }

    def save(self, directory: Path) -> list[Path]:
        """Write data_report.md, .html and .json."""
        from jinja2 import Environment

        data = self.to_dict()
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"percent": percent, "number": "{:,}".format}
        page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        texts = {
            "md": self.markdown(),
            "html": page.render(**data, part_names=PART_NAMES, steps_shown=self._shown_steps()),
            "json": json.dumps(data, indent=2, ensure_ascii=False) + "\n",
        }
        paths = [directory / f"data_report.{ending}" for ending in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    def _shown_steps(self) -> list[dict]:
        """With the sum of what each rejected, and what it changed or noticed as one text."""
        shown = []
        for step in self.steps:
            said = [f"{name} {rows:,}" for name, rows in step.rejected.most_common()]
            said += [f"kept, changed: {name} {rows:,}" for name, rows in step.changed.most_common()]
            said += [f"kept, only counted: {name} {rows:,}" for name, rows in step.noticed.most_common()]
            shown.append(step.to_dict() | {"gone": sum(step.rejected.values()), "said": said})
        return shown

    def markdown(self) -> str:
        lines = ["# Data report", "", f"{self.summary()}", ""]
        lines += [f"- {_plain(note)}" for note in self.notes] + [""] * bool(self.notes)
        steps = [[step["name"], step["rows_in"], step["kept"], step["gone"], "; ".join(step["said"])] for step in self._shown_steps()]
        lines += ["## Steps", "", *_table(["step", "rows in", "kept", "rejected", "what"], steps), ""]
        lines += ["## Written", "", *_table(["file", "rows"], [[name, rows] for name, rows in sorted(self.files.items())]), ""]
        kinds = sorted({kind for part in self.parts.values() for kind in part})
        parts = [[PART_NAMES[part], *(self.parts[part].get(kind, 0) for kind in kinds)] for part in PARTS if self.parts.get(part)]
        lines += ["## Split", "", f"{self.clusters:,} prompt clusters; none is in two parts.", "", *_table(["part", *kinds], parts), ""]
        for mix in self.mixes:
            rows = [[row["use_case"], row["rows"], percent(row["share"]), percent(row["target"]), row["kept"]] for row in mix["rows"]]
            lines += [f"## Use cases of {mix['kind']}", "", *_table(["use case", "rows", "share", "target", "kept"], rows), ""]
        lengths = {"characters": self.lengths, "tokens": self.tokens}
        for unit, found in lengths.items():
            rows = [
                [kind, part, *(values[name] for name in ("median", "p95", "p99", "max"))]
                for kind, item in found.items()
                for part, values in item.to_dict().items()
                if isinstance(values, dict) and values
            ]
            lines += [f"## Length in {unit}", "", *_table(["kind", "of", "median", "95 %", "99 %", "most"], rows), ""] if rows else []
        for title, people in (("annotator", self.annotators), ("group", self.groups)):
            rows = [[row["name"] or "(none)", row["rows"], row["shared"], percent(row["agreement"])] for row in people[:50]]
            lines += [f"## By {title}", "", *_table([title, "rows", "on pairs of others too", "agree"], rows), ""] if rows else []
        return "\n".join(lines).rstrip() + "\n"

    def summary(self) -> str:
        became = "" if self.records == self.steps[0].kept else f" ({self.records:,} records)"
        return f"{self.rows_in:,} rows in{became}, {self.kept:,} kept, {self.rejected:,} rejected, in {self.seconds:.0f} s."

    @property
    def rejected(self) -> int:
        return sum(sum(step.rejected.values()) for step in self.steps)

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        lines = [self.summary(), ""]
        for step in self._shown_steps():
            counts = f"  {step['name']:{width}}  {step['rows_in']:>9,} in  {step['kept']:>9,} kept"
            lines.append(f"{counts}   {'; '.join(step['said'])}".rstrip())
        lines += ["", *(f"  {name}: {rows:,}" for name, rows in sorted(self.files.items()))]
        return "\n".join([*lines, *(["", *(f"note: {note}" for note in self.notes)] if self.notes else [])])


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _remarks(report: DataReport) -> Iterable[str]:
    """What a person should know before training on this."""
    found = {step.name: step for step in report.steps}
    lost = report.rejected - sum(found["use-case mix"].rejected.values())  # what the mix leaves out is as asked for
    if report.rows_in and lost / report.rows_in > 0.2:
        yield f"{percent(lost / report.rows_in)} of the rows were rejected: look into rejected.jsonl before training."
    personal = found.get("personal data")
    if personal and personal.noticed:
        kinds = ", ".join(f"{name} {rows:,}" for name, rows in personal.noticed.most_common())
        yield f"Personal data was found and left in ({kinds} rows): pii=mask or pii=drop takes it out."
    comparisons = report.lengths.get("comparisons")
    if comparisons and comparisons.compared >= 100 and abs(share := comparisons.longer / comparisons.compared) > 0.6:
        yield f"The chosen answer is the longer one in {percent(share)} of the comparisons: a reward model may learn length."
    for mix in report.mixes:
        missing = [row["use_case"] for row in mix["rows"] if row["target"] >= 0.03 and not row["kept"]]
        if mix["sampled"] and missing:
            yield f"{mix['kind'].capitalize()} of these use cases are wanted and there are none: {', '.join(missing)}."
    for kind, lengths in report.tokens.items():
        tokens = lengths.to_dict()
        if tokens["cut"]:
            yield (
                f"{tokens['cut']:,} of {tokens['rows']:,} {kind} ({percent(tokens['cut'] / tokens['rows'])}) are longer than "
                f"{tokens['max_length']:,} tokens and will be cut or left out, {tokens['no_room_for_an_answer']:,} by the prompt alone."
            )
        if tokens["same_when_cut"]:
            yield f"{tokens['same_when_cut']:,} {kind} have answers that differ only behind {tokens['max_length']:,} tokens."
    if report.files and "prompts.jsonl" not in report.files:
        yield "There are no prompts for PPO: give a file of prompts or demonstrations, or a share of the comparisons (ppo=0.2)."


def _histogram(values: array, bins: int = 24) -> list[dict]:
    """Rows by length, in bins of equal width up to the 99th percentile; the last has all that are longer."""
    lengths = np.array(values)
    top = max(int(np.quantile(lengths, 0.99)), bins)
    counts, edges = np.histogram(np.minimum(lengths, top), bins=bins, range=(0, top))
    return [{"up_to": int(edge), "rows": int(rows)} for edge, rows in zip(edges[1:], counts, strict=True)]


def _table(head: list[str], rows: list[list]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int) else _plain(str(cell)) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def _plain(text: str) -> str:
    """Names of files, columns and labellers are anybody's text: nothing in them becomes markup or another cell."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("![", "!\\[")
