"""`forebear serve`: a store that programs and people ask over HTTP."""

from typing import Annotated

import typer

from forebear.commands.options import examples
from forebear.commands.search import Kind, StoreFolder, TaskFile, from_file, opened

EPILOG = examples(
    "forebear serve stores/mine task.py",
    "forebear serve stores/mine --port 9000 --kind hnsw",
)


def serve(
    folder: StoreFolder,
    file: TaskFile = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine need 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; any when 0.")
    ] = 8000,
    kind: Kind = None,
    searches: Annotated[
        int, typer.Option(min=1, help="Searches at a time; each uses all threads.")
    ] = 2,
) -> None:
    """Answer questions about a store over HTTP, and show it on a page.

    With FILE.py queries are taken too. There is no password: whoever reaches the port may ask.
    """
    from forebear.service import create, listen, run

    searcher = opened(folder, kind) if file is None else from_file(folder, file, kind)[0]
    app = create(searcher, searches=searches)
    at = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {folder} at http://{shown}:{at.getsockname()[1]}/ until Ctrl-C", flush=True)
    run(app, at)
