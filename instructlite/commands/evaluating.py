"""`instructlite evaluate`."""

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InstructLiteError
from ..training.work import is_main_process

if TYPE_CHECKING:
    from ..evaluation.judges import LanguageModelJudge
    from ..evaluation.side_effects import SideEffects


def evaluate(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER", help="A run, or adapters and Hub repositories to compare; 'base' is the base."),
    ],
    named: Annotated[
        str | None,
        typer.Option(
            "--candidates",
            metavar="NAME,…",
            help="Of a run: its stages, base, few-shot:4, context, best-of-4 (of SFT), best-of-4:NAME, or paths; the last one leads.",
            show_default="base and all policies",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Of a run: every candidate, few-shot:4 and best-of-4 among them.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts (JSONL).", show_default="the run's")] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH|llm:MODEL@URL",
            help="A reward adapter that PPO did not see, or a language model at an endpoint (llm:MODEL: in memory). May be repeated.",
            show_default="the run's judge and reward",
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="SCALE", help="Language models rate each answer, too: pointwise (1-10) or likert (1-7)."),
    ] = None,
    votes: Annotated[bool, typer.Option("--votes", help="Of a run: count people's blind votes (votes.sqlite) as a judge.")] = False,
    side_effects: Annotated[
        bool, typer.Option("--side-effects", help="Measure toxicity, truth, repetition … on prompts of their own (--full does).")
    ] = False,
    toxicity: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Scores texts for that.", show_default="alt-profanity-check")
    ] = None,
    key_env: Annotated[str | None, typer.Option(metavar="VARIABLE", help="Where an endpoint's key is.")] = None,
    demonstrations: Annotated[Path | None, typer.Option(help="What few-shot shows (JSONL).", show_default="the run's")] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="What best-of-n chooses by; never the judge.", show_default="the run's reward")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Ask each language model no more often, earlier answers included; the rest is missing.", min=1)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt from each candidate.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Where report.html, report.md and report.json go.", show_default="RUN/report")] = None,
) -> None:
    """Write the report of a run anew, or compare adapters of one base. What was answered and judged before is kept."""
    from ..commands.running import run_stages
    from ..config import load_loop

    run = Path(candidates[0])
    is_run = len(candidates) == 1 and (run / "recipe.yaml").is_file()
    given = [] if samples is None else [f"evaluation.samples={samples}"]
    special = (named, full, prompts, judge, rate, votes, side_effects, toxicity, demonstrations, reward, output)
    if is_run and not any(special):
        run_stages(load_loop(run / "recipe.yaml", given), run, "report")
        return
    if not is_run:
        _check_adapters(run, bool(named or full or votes), prompts is not None and judge and output)
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    sources = {"data": prompts, "demonstrations": demonstrations, "reward": reward}
    options: dict[str, Any] = {"ratings": rate or [], **{name: source for name, source in sources.items() if source is not None}}
    options["output_dir"] = output = output or run / "report"
    judges = judge and [_judge(one, output, key_env, max_requests) for one in judge]
    if is_run:
        from ..evaluation.runs import evaluate_run

        options = asdict(load_loop(run / "recipe.yaml", given).evaluation) | _named(run, named, full) | options
        options["side_effects"] = _side_effects(side_effects or full or options["side_effects"], toxicity)
        report = evaluate_run(run, judges=judges, votes=_votes(run) if votes else [], **options)
    else:
        from ..evaluation.compare import evaluate as compare

        options |= {} if samples is None else {"samples": samples}
        report = compare(candidates, judge=judges, side_effects=_side_effects(side_effects, toxicity), **options)
    if not is_main_process():
        return
    print(report)
    print(f"\nWritten: {output / 'report.html'}, with report.md and report.json beside it")


def _check_adapters(run: Path, of_run: bool, complete: object) -> None:
    if of_run:
        raise InstructLiteError(f"--candidates, --full and --votes are about a run, and {run} is none (it has no recipe.yaml)")
    if not complete:
        raise InstructLiteError("to compare adapters, give --prompts FILE, --judge ADAPTER and --output DIRECTORY for the report")


def _named(run: Path, named: str | None, full: bool) -> dict[str, list[str]]:
    """The candidates, where the command says whom."""
    from ..evaluation.runs import all_candidates

    if full:
        return {"candidates": all_candidates(run)}
    return {"candidates": [name.strip() for name in named.split(",")]} if named else {}


def _side_effects(wanted: bool, toxicity: str | None) -> "SideEffects | bool":
    from ..evaluation.side_effects import SideEffects

    return wanted if toxicity is None else SideEffects(toxicity=toxicity)


def _judge(name: str, output: Path, key_env: str | None, max_requests: int | None) -> "str | LanguageModelJudge":
    from ..data.generating.completer import Budget
    from ..evaluation.judges import LANGUAGE_MODEL, VERDICTS, language_model

    if not name.startswith(LANGUAGE_MODEL):
        return name
    return language_model(name, output / VERDICTS, budget=Budget(max_requests=max_requests), key_env=key_env)


def _votes(run: Path) -> list[dict[str, Any]]:
    """Blind votes on two answers of the run, as `evaluate` takes them."""
    from ..feedback.ballots import outcome
    from ..feedback.exchange import screen
    from ..feedback.store import Store

    kept, _ = screen(Store(run, create=False).votes())
    rows = []
    for vote in kept:
        for a, b in combinations(vote.answers, 2):
            if (won := outcome(a, b)) is not None:
                greedy = a.decoding.get("temperature") == b.decoding.get("temperature") == 0
                rows.append({
                    "prompt": vote.prompt, "a": a.candidate.adapter, "b": b.candidate.adapter, "a_text": a.text, "b_text": b.text,
                    "outcome": won, "decoding": "greedy" if greedy else "sampled",
                })  # fmt: skip
    return rows
