"""`instructlite votes`: what people said, as training data and as tables."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InstructLiteError

app = typer.Typer(no_args_is_help=True, help="What people said: export it as training data, import it, look at it.")

RunOrFile = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run directory, or the file of its votes (votes.sqlite).")]


@app.command("export")
def votes_export(
    where: RunOrFile,
    to: Annotated[str, typer.Option(help="comparisons, rankings, demonstrations (edited answers) or likert (rankings by scores).")],
    votes: Annotated[str, typer.Option(help="consensus: one row for each pair or set; all: one for each vote.")] = "consensus",
    output: Annotated[Path | None, typer.Option(help="The JSONL file.", show_default="votes_KIND.jsonl beside the votes")] = None,
    identified: Annotated[bool, typer.Option("--identified", help="With names, groups, comments and times of day.")] = False,
) -> None:
    """Write votes as training data; what goes into no row is counted with the reason."""
    from ..data.records import write_records
    from ..feedback.exchange import export
    from ..feedback.store import Store

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


@app.command("import")
def votes_import(
    file: Annotated[Path, typer.Argument(metavar="JSONL", help="Comparisons or rankings, as export writes them.")],
    where: RunOrFile,
) -> None:
    """Take in votes that were cast elsewhere: all of a file, or none. The same file again changes nothing."""
    from ..feedback.exchange import import_votes
    from ..feedback.store import Store

    store = Store(where)
    print(f"{import_votes(store, file)} into {store.path}")


@app.command("report")
def votes_report(
    where: RunOrFile,
    as_json: Annotated[bool, typer.Option("--json", help="Every number, as JSON.")] = False,
) -> None:
    """Show who wins, how sure that is, how far people agree, and whether reward models agree with them."""
    from ..feedback.insight import insight
    from ..feedback.store import Store

    found = insight(Store(where, create=False).votes())
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else found)
