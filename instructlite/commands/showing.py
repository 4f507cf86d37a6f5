"""`instructlite app`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InstructLiteError, require

if TYPE_CHECKING:
    from ..feedback.app.server import Address

PAGES = ("compare", "arena", "insight")


def app(
    adapters: Annotated[
        list[str], typer.Argument(metavar="RUN|ADAPTER|USER/REPO", help="A run, or adapters of one base, here or on the Hub.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; any other than this machine's own needs --login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    login: Annotated[list[str] | None, typer.Option(metavar="FILE|NAME:PASSWORD", help="Who may come in; may be repeated.")] = None,
    page: Annotated[list[str] | None, typer.Option(help=f"Serve only this page: {', '.join(PAGES)}; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to vote on (JSONL).", show_default="those of the run")] = None,
    votes: Annotated[Path | None, typer.Option(help="The file of the votes.", show_default="RUN/votes.sqlite, or votes.sqlite")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to vote on.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of the answers to vote on.", min=0)] = 0.7,
) -> None:
    """Serve pages that show adapters side by side, collect blind votes, and say what they come to."""
    require("gradio", "app")
    from ..feedback.app.server import Address

    address = Address(host, port)
    serve_adapters(adapters, address, login or (), page or PAGES, prompts, votes, max_new_tokens, temperature)


def serve_adapters(
    adapters: Sequence[str],
    address: "Address",
    logins: Sequence[str] = (),
    pages: Sequence[str] = PAGES,
    prompts: Path | None = None,
    votes: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
) -> None:
    """Until Ctrl-C. What is wrong with the options is said before anything is loaded."""
    from ..feedback.app.booth import read_prompts
    from ..feedback.app.server import application, serve
    from ..feedback.app.visitors import read_users
    from ..feedback.store import Store
    from ..models.engine import Engine, Limits
    from ..models.sampling import Sampling
    from ..training.recipe import quiet_libraries

    users = read_users(logins) if logins else None
    address.check(users)
    if unknown := [name for name in pages if name not in PAGES]:
        raise InstructLiteError(f"--page {unknown[0]}: choose {', '.join(PAGES)}")
    run = Path(adapters[0]) if len(adapters) == 1 and Path(adapters[0]).is_dir() else None
    asked = read_prompts(_prompts_of(run) if prompts is None else str(prompts))
    store = Store(votes or (run / "votes.sqlite" if run else Path("votes.sqlite")))
    if store.moved_aside:
        print(f"The votes were damaged. They lie in {store.moved_aside} now; new ones go into {store.path}.")
    quiet_libraries()
    print(f"Loading {', '.join(adapters)} …")
    with Engine.load(adapters[0] if len(adapters) == 1 else list(adapters), limits=Limits(new_tokens=max(512, max_new_tokens))) as engine:
        made = application(
            engine, store, prompts=asked, sampling=Sampling(max_new_tokens, temperature), users=users,
            pages=[f"/{name}" for name in pages], address=address,
        )  # fmt: skip
        print(f"Serving {', '.join(pane.name for pane in engine.panes)} at {address.url} (Ctrl-C ends it). Votes: {store.path}")
        serve(made, address)
    store.close()


def _prompts_of(run: Path | None) -> str | list[dict]:
    """The run's prompts, or else the examples."""
    from ..feedback.app.examples import EXAMPLES

    found = run and next(
        (path for path in (run / "data" / "prompts.jsonl", run / "data" / "heldout_prompts.jsonl") if path.is_file()), None
    )
    return str(found) if found else [{"prompt": text, "category": use_case} for use_case, text in EXAMPLES]
