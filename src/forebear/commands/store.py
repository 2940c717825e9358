"""`forebear store`: look at a store, check it, join several, hand one to other programs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from forebear.errors import ForebearError

app = typer.Typer(
    help="Look at a store of rows, check it, join several, hand one to other programs.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]


@app.command()
def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a store holds and where it comes from; it may be incomplete."""
    from forebear.report.descriptions import described
    from forebear.store import Manifest
    from forebear.store.shards import path_of

    manifest = Manifest.read(folder)
    paths = [path_of(folder, number) for number in range(manifest.shards)]
    there = [path for path in paths if path.exists()]
    facts = {
        **manifest.plain(),
        "shards": manifest.shards,
        "shards_there": len(there),
        "bytes": sum(path.stat().st_size for path in there),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    columns = ", ".join(f"{name} ({c.dtype})" for name, c in manifest.columns.items())
    lines = {
        "rows": f"{manifest.rows:,} × {manifest.dimension} {manifest.dtype}",
        "shards": f"{len(there):,} of {manifest.shards:,} are there",
        "bytes": f"{facts['bytes']:,} ({facts['bytes'] / max(1, manifest.rows):,.0f} a row)",
        "columns": columns or "none",
        "method": manifest.method or "not said",
        "model": manifest.model or "not said",
        "loss": "not said" if manifest.loss is None else described(manifest.loss),
        "train": manifest.train or "not said",
        "version": manifest.version or "not said",
    }
    for name, value in lines.items():
        print(f"{name:<8} {value}")


@app.command()
def verify(
    folder: Folder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged shards, to be built again.")
    ] = False,
) -> None:
    """Read every shard and compare its content with its hash; exit code 1 if one is not intact."""
    from forebear.progress import progress
    from forebear.store import verify as check

    with progress():
        found = check(folder, repair=repair)
    for reason in found.damaged.values():
        print(reason)
    if found.missing:
        print(f"missing: {len(found.missing)} of {found.shards} shards, first {found.missing[0]}")
    if found.complete:
        print(f"{found.shards} of {found.shards} shards are intact")
        return
    if found.repaired:
        print(f"removed {len(found.damaged)} damaged shards: build the store again to fill them in")
    raise typer.Exit(1)


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="STORE...", help="Folders of stores.", min=1)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a shard; as in the first when left out.")
    ] = None,
) -> None:
    """Join stores of one model and method with disjoint ids; stopped halfway, it resumes."""
    from forebear.progress import progress
    from forebear.store import merge as join

    with progress():
        store = join(folders, out, shard_rows=shard_rows)
    print(f"wrote {len(store):,} rows to {out}")


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="A FILE.parquet, or a folder for npy files.")],
) -> None:
    """Write the rows as float32, with ids, norms and columns, to Parquet or npy files."""
    from forebear.progress import progress
    from forebear.store import Store, to_npy, to_parquet

    store = Store.open(folder)
    if out.suffix and out.suffix != ".parquet":
        raise ForebearError(f"--out {out} is neither a FILE.parquet nor a folder")
    with progress():
        (to_parquet if out.suffix else to_npy)(store, out)
    print(f"wrote {len(store):,} rows to {out}")
