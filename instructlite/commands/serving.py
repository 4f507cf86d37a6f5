"""`instructlite serve` and `merge`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InstructLiteError, require

KEY = "INSTRUCTLITE_API_KEY"


def serve(
    source: Annotated[
        list[str], typer.Argument(metavar="RUN|ADAPTER|USER/REPO", help="A run, or adapters of one base, here or on the Hub.")
    ],
    host: Annotated[str, typer.Option(help=f"Other than this machine's own addresses only with {KEY} set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    quantization: Annotated[str, typer.Option(help="none, nf4 or int8.", show_default="as trained")] = "none",
    rows: Annotated[int, typer.Option(help="Answers in one batch.", min=1)] = 24,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused (429).", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
) -> None:
    """Serve base and adapters as an OpenAI-compatible endpoint: the model's name picks the adapter, all share one batch."""
    require("starlette", "serve")
    require("uvicorn", "serve")
    key = os.environ.get(KEY)
    from ..config import BaseOptions
    from ..sharing.endpoint import LOOPBACK
    from ..sharing.endpoint import serve as answer

    if host not in LOOPBACK and not key:
        raise InstructLiteError(f"--host {host}: anybody who reaches this machine could use it; set {KEY} to a key that clients send")
    from ..models.engine import Engine, Limits
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    given = source[0] if len(source) == 1 else source
    with Engine.load(
        given, BaseOptions(quantization=quantization), limits=Limits(waiting=waiting, rows=rows, new_tokens=new_tokens)
    ) as engine:
        print(f"http://{host}:{port}/v1 answers as {', '.join(pane.name for pane in engine.panes)}. Ctrl-C ends it.", flush=True)
        answer(engine, host, port, key)


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The directory of a policy adapter, or user/repo on the Hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the whole model goes.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.", show_default="the adapter's")] = "auto",
) -> None:
    """Write base and adapter as one model without adapters, for programs that know none (llama.cpp), and check what it computes."""
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    from ..sharing.merging import merge as merge_adapter

    print(merge_adapter(adapter, output, dtype=dtype, say=print))
