"""The verbs of the command line. What is heavy is imported inside a command, so that `--help` answers at once.

A user's mistake is one line on stderr and exit code 2; `--debug` shows the traceback. A run that SIGTERM or Ctrl-C stopped has
saved, says the command that goes on, and exits with 143 or 130.
"""

import json
import os
import shlex
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .errors import BadRecords, InstructLiteError
from .training.interrupt import Interruption
from .training.work import is_main_process, launched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from .config import Loop
    from .pipeline import StageRun
    from .planning import Plan

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data files, and generate data.")
app.add_typer(data_app, name="data")
votes_app = typer.Typer(no_args_is_help=True, help="What people said: export it as training data, import it, look at it.")
app.add_typer(votes_app, name="votes")

# Options of `data prepare` that have the names of PrepareOptions' fields.
PREPARE_OPTIONS = (
    *("kind", "near_duplicates", "pii", "pii_backend", "toxicity", "max_toxicity", "contradictions", "mix", "mix_distance"),
    *("heldout", "judge", "ppo", "group_by", "tokenizer", "chat_template", "max_length", "seed"),
)
LISTED_PEOPLE = 30
RESUME = "Let a stage that was interrupted go on from its last checkpoint."


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, turn a user's mistake into one line. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        with Interruption(_again(given)) if given[:1] in (["run"], ["demo"], ["evaluate"]) else nullcontext():
            app(args=given, prog_name="instructlite")
    except InstructLiteError as error:
        if "--debug" in arguments:
            raise
        opening = "the data has faults, nothing was trained:\n" if isinstance(error, BadRecords) else ""
        process = "" if is_main_process() else f" (process {os.environ['RANK']})"
        print(f"instructlite{process}: {opening}{error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _again(given: list[str]) -> str:
    """The command that goes on with what this one began."""
    command = shlex.join(["instructlite", *given, *([] if given[0] == "evaluate" or "--resume" in given else ["--resume"])])
    return f"accelerate launch ... -m {command}" if launched() else command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"instructlite {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """SFT, reward model and PPO as adapters of one base model, and a report on what came of it."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run the whole loop on the embedded 135M model and the starter data. A CPU is enough."""
    from .config import load_loop

    _run(load_loop("smollm2-135m"), output, resume=resume)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe, such as ppo.kl_coef=0.1.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/RECIPE")] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="One stage alone: data, sft, reward, judge, ppo or report.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run a recipe: data, SFT, reward model, judge, PPO, report. What is done already is kept."""
    from .config import load_loop

    _run(load_loop(recipe, overrides or []), output or Path("runs") / Path(recipe).stem, only, resume)


@app.command("recipes")
def show_recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, to copy it: instructlite recipes NAME > mine.yaml")
    ] = None,
) -> None:
    """List the recipes, or print one."""
    from .config import recipe_path, recipes

    if name:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    known = recipes()
    width = max(map(len, known))
    for recipe, path in known.items():
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").partition(". ")[0]
        print(f"{recipe:{width}}  {title}")


@data_app.command("check")
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
    from .data.check import Options, check_files

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


@data_app.command("generate")
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
    from .config import parse_override
    from .data.generating.completer import Budget, Endpoint
    from .data.generating.synthetic import generate

    given = {key: value for option in options or [] for key, value in parse_override(option).items()}
    budget = Budget(
        max_requests=max_requests, max_tokens=max_total_tokens, max_cost=max_cost, input_price=input_price, output_price=output_price
    )
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    if base_url is not None:
        completer = Endpoint(model, None if base_url == "openai" else base_url, key_env=key_env, parallel=parallel, **limits)
    if base_url is None or reward is not None:
        from .models.completer import LocalCompleter, load_scorer
        from .training.recipe import quiet_libraries

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


@data_app.command("prepare")
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
    from .data.preparing.prepare import prepare

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


@data_app.command("report")
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

    from .data.labellers import report_on

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


RunOrFile = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run directory, or the file of its votes (votes.sqlite).")]


@votes_app.command("export")
def votes_export(
    where: RunOrFile,
    to: Annotated[str, typer.Option(help="comparisons, rankings, demonstrations (edited answers) or likert (rankings by scores).")],
    votes: Annotated[str, typer.Option(help="consensus: one row for each pair or set; all: one for each vote.")] = "consensus",
    output: Annotated[Path | None, typer.Option(help="The JSONL file.", show_default="votes_KIND.jsonl beside the votes")] = None,
    identified: Annotated[bool, typer.Option("--identified", help="With names, groups, comments and times of day.")] = False,
) -> None:
    """Write votes as training data; what goes into no row is counted with the reason."""
    from .data.records import write_records
    from .feedback.exchange import export
    from .feedback.store import Store

    store = Store(where, create=False)
    result = export(store.votes(), to, counting=votes, identified=identified)
    print(result)
    if not result.records:
        raise InstructLiteError(f"{store.path}: no {to} in these votes; nothing was written")
    target = output or store.path.with_name(f"votes_{to}.jsonl")
    draft = target.with_name(f"{target.name}.tmp")
    write_records(draft, result.records)
    os.replace(draft, target)
    print(f"Written: {target}")


@votes_app.command("import")
def votes_import(
    file: Annotated[Path, typer.Argument(metavar="JSONL", help="Comparisons or rankings, as export writes them.")],
    where: RunOrFile,
) -> None:
    """Take in votes that were cast elsewhere: all of a file, or none. The same file again changes nothing."""
    from .feedback.exchange import import_votes
    from .feedback.store import Store

    store = Store(where)
    print(f"{import_votes(store, file)} into {store.path}")


@votes_app.command("report")
def votes_report(
    where: RunOrFile,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, as JSON.")] = False,
) -> None:
    """Show who wins, how sure that is, how far people agree, and whether reward models agree with them."""
    from .feedback.insight import insight
    from .feedback.store import Store

    found = insight(Store(where, create=False).votes())
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else found)


@app.command()
def evaluate(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER", help="A run, or adapters and Hub repositories to compare; 'base' is the base."),
    ],
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts (JSONL).", show_default="the run's")] = None,
    judge: Annotated[str | None, typer.Option(help="A reward adapter that PPO did not see.", show_default="the run's")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt from each candidate.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Where report.md and report.json go.", show_default="RUN/report")] = None,
) -> None:
    """Write the report of a run anew, or compare adapters of one base."""
    from .config import load_loop

    run_directory = Path(candidates[0])
    is_run = len(candidates) == 1 and (run_directory / "recipe.yaml").is_file()
    if is_run and prompts is judge is output is None:
        given = [] if samples is None else [f"evaluation.samples={samples}"]
        _run(load_loop(run_directory / "recipe.yaml", given), run_directory, "report")
        return
    if is_run:
        candidates = ["base", str(run_directory / "sft"), str(run_directory / "ppo")]
        prompts, judge = prompts or run_directory / "data" / "heldout_prompts.jsonl", judge or str(run_directory / "judge")
    if prompts is None or judge is None or output is None:
        raise InstructLiteError("to compare adapters, give --prompts FILE, --judge ADAPTER and --output DIRECTORY for the report")
    from .training.recipe import quiet_libraries

    quiet_libraries()
    from .evaluation.compare import evaluate as compare

    options = {} if samples is None else {"samples": samples}
    print(compare(candidates, data=prompts, judge=judge, output_dir=output, **options))
    print(f"\nWritten: {output / 'report.md'} and {output / 'report.json'}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the card, such as 24GB.", show_default="this machine")] = None,
    gpus: Annotated[int, typer.Option(help="So many of them.", min=1)] = 1,
    bases: Annotated[bool, typer.Option("--bases", help="Also: which bases would fit which cards with these settings.")] = False,
) -> None:
    """Say before anything is loaded or downloaded what memory and disk a recipe needs, and what to change if it does not fit."""
    from rich.console import Console

    from .config import load_loop
    from .planning import bases_that_fit, card, this_device
    from .planning import plan as plan_of

    loop = load_loop(recipe, overrides or [], complete=False)
    planned = plan_of(loop, card(gpu, gpus) if gpu else this_device(gpus))
    _print_plan(recipe, planned)
    if bases:
        print("\nThe same settings on other bases: the most precise weights that fit a card of so many GB")
        Console(soft_wrap=True, highlight=False, width=120).print(_bases_table(bases_that_fit(loop)))
    if not planned.fits:
        raise typer.Exit(1)


def _print_plan(recipe: str, planned: "Plan") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    loop, gigabyte = planned.loop, 1e9
    weights = "" if loop.quantization == "none" else f", {loop.quantization}"
    print(f"{recipe}: {loop.model}{weights} on {planned.device}")
    parts = list(planned.stages[0].parts)
    table = Table("GB", *parts, "at the peak", "peak", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in planned.stages:
        fixed = [f"{stage.parts[part] / gigabyte:.2f}" for part in parts]
        phase = stage.largest_phase
        verdict = "fits" if stage.fits else "does not fit"
        table.add_row(stage.stage, *fixed, f"{stage.phases[phase] / gigabyte:.2f} to {phase}", f"{stage.peak / gigabyte:.2f}", verdict)
    Console(soft_wrap=True, highlight=False, width=120).print(table)
    print(planned.lengths)
    print(f"Disk for checkpoints and adapters: {planned.disk / gigabyte:.2f} GB, and the base's weights where they are not here yet.")
    for stage, changes in planned.changes.items():
        print(f"{stage} would fit with: {' '.join(changes)}" if changes else f"{stage}: nothing here makes it fit; take a smaller base")


def _bases_table(rows: list) -> "Table":
    from rich import box
    from rich.table import Table

    cards = list(rows[0][2])
    table = Table("base", "parameters", *map(str, cards), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, parameters, fits in rows:
        table.add_row(name, f"{parameters / 1e9:.2f} B", *(fits[size] or "-" for size in cards))
    return table


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run directory with all of its adapters, or one adapter.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else the repository is private.")] = False,
    report: Annotated[Path | None, typer.Option(help="The report's directory.", show_default="RUN/report")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Where others find the base, if it is a directory here.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the adapters, as the Hub writes it, such as apache-2.0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before more than 1 GB is sent.")] = False,
) -> None:
    """Push a run or an adapter to the Hugging Face Hub, with a card. The token is that of HF_TOKEN or `hf auth login`."""
    import huggingface_hub

    from .sharing.hub import push_to_hub

    huggingface_hub.logging.set_verbosity_error()  # what happened is said below
    options = {"private": not public, "report": report, "base_model": base_model, "license": license}
    planned = push_to_hub(source, repo, **options, dry_run=True)
    print(planned)
    if dry_run:
        print(f"\nNothing was sent. The card:\n\n{planned.card}")
        return
    if planned.total > 1e9 and not yes and not typer.confirm("That is more than 1 GB. Go on?"):
        raise typer.Exit(1)
    done = push_to_hub(source, repo, **options)
    print(f"\n{'Pushed' if done.changed else 'Nothing had changed'}: {done.url} (commit {done.commit})")


def _run(loop: "Loop", output: Path, only: str | None = None, resume: bool = False) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.perf_counter()

    def say(line: str) -> None:
        if is_main_process():
            console.print(f"[{_clock(time.perf_counter() - start)}] {line}")

    if only is None and is_main_process():
        from .planning import doubts

        for line in doubts(loop):
            say(f"memory: {line}")
    say(f"{loop.model} into {output}: loading the libraries")
    from .training.recipe import quiet_libraries

    quiet_libraries()
    from .pipeline import run_loop

    result = run_loop(loop, output, only=only, isolate=True, resume=resume, say=say)
    if not is_main_process():
        return
    if result.report is not None:
        print(f"\n{result.report}")
    console.print()
    console.print(_stage_table(result.stages))
    console.print(f"\nAll of it is in {output}, its recipe in {output / 'recipe.yaml'}.")
    if any(stage.stage == "report" for stage in result.stages):
        console.print(f"Read {output / 'report' / 'report.md'}. Then, with your own data:")
        console.print(f"  instructlite run {output / 'recipe.yaml'} data.comparisons=mine.jsonl --output runs/mine")
    else:
        console.print(f"Next: instructlite run {output / 'recipe.yaml'} --output {output}")


def _stage_table(stages: "list[StageRun]") -> "Table":
    from rich.table import Table

    gpu = any(stage.peak_gpu_mb for stage in stages)
    table = Table("stage", "took", "peak memory", *(["on the GPU"] if gpu else []), "written to", box=None)
    for stage in stages:
        took = f"{_clock(stage.seconds)}{' (before)' if stage.skipped else ''}"
        memory = [f"{peak:,.0f} MB" if peak else "-" for peak in (stage.peak_rss_mb, stage.peak_gpu_mb)]
        table.add_row(stage.stage, took, *memory[: 2 if gpu else 1], str(stage.path))
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
