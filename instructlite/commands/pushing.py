"""`instructlite push`."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run directory with all of its adapters, or one adapter.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else the repository is private.")] = False,
    report: Annotated[Path | None, typer.Option(help="The report's directory.", show_default="RUN/report")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Where others find the base, if it is a directory here.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the adapters, as the Hub writes it, such as apache-2.0.")] = None,
    collection: Annotated[str | None, typer.Option(metavar="TITLE", help="Put it into this collection of yours, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before more than 1 GB is sent.")] = False,
) -> None:
    """Push a run or an adapter to the Hugging Face Hub, with a card. The token is that of HF_TOKEN or `hf auth login`."""
    import huggingface_hub

    from ..sharing.hub import push_to_hub

    huggingface_hub.logging.set_verbosity_error()  # what happened is said below
    options = {"private": not public, "report": report, "base_model": base_model, "license": license}
    planned = push_to_hub(source, repo, **options, dry_run=True)
    print(planned)
    if dry_run:
        print(f"\nNothing was sent. The card:\n\n{planned.card}")
        return
    if planned.total > 1e9 and not yes and not typer.confirm("That is more than 1 GB. Go on?"):
        raise typer.Exit(1)
    done = push_to_hub(source, repo, collection=collection, **options)
    print(f"\n{'Pushed' if done.changed else 'Nothing had changed'}: {done.url} (commit {done.commit})")
    if done.collection:
        print(f"In the collection {done.collection}")
