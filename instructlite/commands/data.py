"""`instructlite data`: check, prepare, generate, report."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InstructLiteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Look at data files, and generate data.")

# Options of `data prepare` that have the names of PrepareOptions' fields.
PREPARE_OPTIONS = (
    *("kind", "near_duplicates", "pii", "pii_backend", "toxicity", "max_toxicity", "contradictions", "mix", "mix_distance"),
    *("heldout", "judge", "ppo", "group_by", "tokenizer", "chat_template", "max_length", "seed"),
)
LISTED_PEOPLE = 30


@app.command("check")
def data_check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="JSONL, JSON, CSV or Parquet; a directory of these; a data set on the Hub, owner/name:split."),
    ],
    kind: Annotated[
        str | None, typer.Option(help="demonstrations, comparisons, rankings, prompts or texts.", show_default="told from the keys")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="Which keys rows have: messages, alpaca, sharegpt, hh-rlhf, likert, ...", show_default="told from the keys"
        ),
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the clean rows here, and the others with their reasons into rejected.jsonl.")
    ] = None,
    heldout: Annotated[str | None, typer.Option(metavar="FILE", help="A file whose prompts must not be in the others.")] = None,
    scale: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="What Likert scores may be, such as 1:7.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help="Count tokens with this model's tokenizer.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Name rows of more tokens; needs --tokenizer.")] = None,
    keep_repeats: Annotated[
        bool, typer.Option("--keep-repeats", help="Rows that repeat or contradict another stay in the clean copy.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are problems too.")] = False,
) -> None:
    """Name every broken row of data files by file and line; exit code 2 if there is one. The files stay as they are."""
    from ..data.check import Options, check_files

    options = Options(kind, format_, heldout, _scale(scale), tokenizer, max_length, strict, keep_repeats)
    with _counting() as progress:
        reports = check_files(files, options, fix, progress)
    for report in reports:
        print(report)
    if fix:
        kept, rejected = (sum(getattr(report, name) for report in reports) for name in ("rows", "rejected"))
        print(f"{kept + rejected:,} rows in = {kept:,} kept + {rejected:,} rejected; written to {fix}")
    if any(report.problems for report in reports):
        if not fix and any(report.rows and report.rejected for report in reports):
            print("--fix DIR writes the rows that can be kept, and the others with their reasons.")
        raise typer.Exit(2)


@app.command("generate")
def data_generate(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="self-instruct, evol-instruct, constitutional, ai-preferences or rejection-sampling.")
    ],
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="JSONL files: seed tasks, prompts, or answers to compare.")],
    model: Annotated[str, typer.Option(help="Who writes: a base, an adapter's directory, or the model's name at --base-url.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the rows go; the same command again goes on where it was stopped.")],
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible endpoint, http://127.0.0.1:8000/v1; 'openai' is OpenAI's own.")
    ] = None,
    key_env: Annotated[str | None, typer.Option(metavar="VARIABLE", help="The environment variable that holds the endpoint's key.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, such as count=500, rounds=3, revisions=2 or n=8."),
    ] = None,
    reward: Annotated[Path | None, typer.Option(help="The reward adapter of rejection-sampling.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A YAML file in place of the method's own prompts.")] = None,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of what is written; judgements are asked at 0.", min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Of one answer.", min=1)] = 512,
    parallel: Annotated[int, typer.Option(help="Requests at once; of a model in memory, rows of a batch.", min=1)] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="The endpoint's limit.", min=0.01)] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="The same in tokens.", min=1)] = None,
    max_requests: Annotated[int | None, typer.Option(help="Stop there; all runs into this directory count.", min=0)] = None,
    max_total_tokens: Annotated[int | None, typer.Option(help="The same in tokens.", min=0)] = None,
    max_cost: Annotated[float | None, typer.Option(help="The same in money; needs prices.", min=0)] = None,
    input_price: Annotated[float, typer.Option(help="For a million tokens of prompts.", min=0)] = 0.0,
    output_price: Annotated[float, typer.Option(help="For a million tokens of answers.", min=0)] = 0.0,
) -> None:
    """Have a model write data: new tasks, harder tasks, revised answers, preferences, or the best of several answers."""
    from ..config import parse_override
    from ..data.generating.completer import Budget, Endpoint
    from ..data.generating.synthetic import generate

    given = {key: value for option in options or [] for key, value in parse_override(option).items()}
    budget = Budget(
        max_requests=max_requests, max_tokens=max_total_tokens, max_cost=max_cost, input_price=input_price, output_price=output_price
    )
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    if base_url is not None:
        completer = Endpoint(model, None if base_url == "openai" else base_url, key_env=key_env, parallel=parallel, **limits)
    if base_url is None or reward is not None:
        from ..models.completer import LocalCompleter, load_scorer
        from ..training.recipe import quiet_libraries

        quiet_libraries()
        completer = LocalCompleter.load(model, reward=reward, batch_size=parallel) if base_url is None else completer
        given |= {"score": load_scorer(reward, completer)} if reward else {}
    try:
        result = generate(
            method, files, completer, out, prompts=prompts, budget=budget, seed=seed, temperature=temperature,
            max_tokens=max_tokens, **given,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninstructlite: stopped; what was answered is kept in {out}, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    print(f"{result}\n\nWritten: {out}")


@app.command("prepare")
def data_prepare(
    files: Annotated[
        list[str], typer.Argument(metavar="IN", help="Files, directories or data sets on the Hub, in any format that check reads.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the clean files and the report go.")],
    kind: Annotated[
        str | None, typer.Option(help="demonstrations, comparisons, rankings, prompts or texts.", show_default="told from the keys")
    ] = None,
    near_duplicates: Annotated[
        float, typer.Option(help="Common share of words from which rows are near-duplicates; 1: leave them.")
    ] = 0.75,
    min_answer: Annotated[int | None, typer.Option(metavar="CHARACTERS", help="Shortest good answer.")] = None,
    max_prompt: Annotated[int | None, typer.Option(metavar="CHARACTERS", help="Longest prompt.")] = None,
    max_answer: Annotated[int | None, typer.Option(metavar="CHARACTERS", help="Longest answer.")] = None,
    language: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Keep this language, such as en; may be repeated.")] = None,
    quality: Annotated[
        list[str] | None, typer.Option(metavar="RULE=ACTION", help="Such as 'refusal=drop'; actions: drop, count, off. May be repeated.")
    ] = None,
    pii: Annotated[str, typer.Option(help="Personal data: count, mask, drop or off.")] = "count",
    pii_backend: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Your finder of personal data: text to (start, end, kind).")
    ] = None,
    phone_region: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="A country whose telephone numbers are known without +.", show_default="US")
    ] = None,
    toxicity: Annotated[str | None, typer.Option(metavar="SCORER", help="'profanity', or your module:function (texts to scores).")] = None,
    max_toxicity: Annotated[float, typer.Option(help="Rows whose good answer scores this much or more go.")] = 0.9,
    evaluation: Annotated[list[str] | None, typer.Option(metavar="FILE", help="A file that must not leak; may be repeated.")] = None,
    contradictions: Annotated[str, typer.Option(help="Pairs preferred both ways: drop the minority, or count.")] = "drop",
    mix: Annotated[str | None, typer.Option(metavar="MIX", help="Sample towards a mix of use cases: instructgpt, or a YAML file.")] = None,
    mix_distance: Annotated[float, typer.Option(help="How far from the mix the sample may be; more keeps more rows.")] = 0.1,
    heldout: Annotated[float, typer.Option(help="Share of the rows to hold out.")] = 0.1,
    judge: Annotated[float, typer.Option(help="Share of the preferences for the judge.")] = 0.1,
    ppo: Annotated[float, typer.Option(help="Share of the preferences whose prompts go to PPO.")] = 0.2,
    group_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Report rows and agreement by this column too.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help="Count tokens with this model's tokenizer.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="chatml, plain or a file, for a tokenizer that has none.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens that training will keep, for the report; with --tokenizer.")] = 1024,
    seed: Annotated[int, typer.Option(help="Decides which prompts are held out.")] = 0,
) -> None:
    """Clean, de-duplicate and split data files, and write a report of what was done: demonstrations, comparisons, rankings, prompts."""
    from ..data.preparing.prepare import prepare

    same = {name: value for name, value in locals().items() if name in PREPARE_OPTIONS}
    rules = [rule.rpartition("=") for rule in quality or []]
    with _counting() as progress:
        report = prepare(
            files,
            out,
            progress=progress,
            **same,
            min_answer_characters=min_answer,
            max_prompt_characters=max_prompt,
            max_answer_characters=max_answer,
            language=tuple(language or ()),
            quality={name: action for name, _, action in rules},
            phone_regions=tuple(phone_region or ("US",)),
            evaluation=tuple(evaluation or ()),
        )
    print(report)
    print(f"\nWritten to {out}; read {out / 'data_report.html'}")


@app.command("report")
def data_report(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="As for check.")],
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column that tells groups, such as country; may be repeated.", show_default="the usual ones"),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="As for check.", show_default="told from the keys")] = None,
) -> None:
    """Show who judged how much, and how far people agree, by annotator and by group."""
    from rich.console import Console

    from ..data.labellers import report_on

    report = report_on(files, by or (), kind)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items()) or "no rows"
    console.print(f"{kinds}; {len(report.annotators):,} annotators, {report.unnamed:,} rows without one")
    if report.shared:
        console.print(
            f"{report.shared:,} pairs judged by several: Krippendorff's alpha {_number(report.alpha)} (1 full agreement, 0 chance)"
        )
    if report.scored:
        console.print(f"{report.scored:,} answers scored by several: alpha of the scores {_number(report.score_alpha)}")
    for title, people in {"annotator": report.annotators, **report.groups}.items():
        if people:
            console.print()
            console.print(_people_table(title, people))
    for note in report.notes:
        console.print(f"note: {note}")


def _people_table(title: str, people: list[dict]) -> "Table":
    from rich.table import Table

    last = "alpha inside" if "alpha" in people[0] else "first to last"
    table = Table(
        title, *(["rows", "votes others cast too", "agreement with them", last]), *(["flags"] if "flags" in people[0] else []), box=None
    )
    for row in people[:LISTED_PEOPLE]:
        dates = [] if row.get("first") is None else [row["first"][:10], row["last"][:10]]
        cells = [row["name"], f"{row['rows']:,}", f"{row['shared']:,}", _number(row["agreement"])]
        cells.append(_number(row["alpha"]) if "alpha" in row else " to ".join(dict.fromkeys(dates)) or "-")
        flags = [", ".join(f"{name} {count:,}" for name, count in row["flags"].items())] if "flags" in row else []
        table.add_row(*cells, *flags)
    if len(people) > LISTED_PEOPLE:
        table.add_row(f"+{len(people) - LISTED_PEOPLE:,} more")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no -0.00


def _scale(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise InstructLiteError(f"--scale {text}: expected the least and the highest score, such as 1:7") from None
    return low, high


@contextmanager
def _counting() -> "Iterator[Callable[[str, int], None]]":
    """Rows read so far, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("reading") as status:
        yield lambda file, count: status.update(f"{file}: {count:,} rows")
