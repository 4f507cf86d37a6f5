"""`instructlite benchmark`."""

from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    candidates: Annotated[list[str], typer.Argument(metavar="RUN|ADAPTER", help="A run, or adapters of one base; 'base' is the base.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names (mmlu,hellaswag) or local ones, with commas.")] = "truthfulqa_small_mc1",
    task_directory: Annotated[Path | None, typer.Option(help="YAML files of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many examples of each task.", min=1)] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples in the prompt.", show_default="the task's", min=0)] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put each prompt into the chat template.")] = False,
    run_code: Annotated[bool, typer.Option("--run-code", help="Let humaneval, mbpp run what the model writes, here, unprotected.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 16,
    report: Annotated[Path | None, typer.Option(help="A report that gets the numbers.", show_default="RUN/report")] = None,
) -> None:
    """Measure adapters with lm-eval; the numbers go into the run's report."""
    run = Path(candidates[0])
    if len(candidates) == 1 and (run / "recipe.yaml").is_file():
        from ..evaluation.runs import in_run, policies

        candidates, report = ["base", *(in_run(run, name) for name in policies(run))], report or run / "report"
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    from ..evaluation.benchmarks import add_to_report
    from ..evaluation.benchmarks import benchmark as measure

    has_report = report is not None and (report / "report.json").is_file()

    def show(rows: list[dict]) -> None:
        for row in rows:
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
            print(f"{row['candidate']}: {row['task']}, {row['metric']} {row['value']:.3f}{error} (n = {row['n']})")
        if has_report:
            add_to_report(report, rows)

    measure(
        candidates, [name.strip() for name in tasks.split(",") if name.strip()], task_directory=task_directory, limit=limit,
        few_shot=few_shot, chat_template=chat_template, run_code=run_code, batch_size=batch_size, done=show,
    )  # fmt: skip
    if has_report:
        print(f"\nWritten: {report / 'report.json'}")
