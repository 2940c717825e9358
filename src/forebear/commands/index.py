"""`forebear index`: the features of every training example on disk, and indexes over them."""

from pathlib import Path
from typing import Annotated

import typer

from forebear.commands.options import examples, settings_of
from forebear.errors import ForebearError

EPILOG = examples(
    "forebear index task.py --method trak --out stores/mine",
    "forebear index task.py -m trak --out stores/mine --executor processes:4 --kind ivf",
)
TYPES = ("float32", "float16", "bfloat16", "int8")


def index(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.py",
            exists=True,
            dir_okay=False,
            help="Python file that defines task() and train(), and may define ids() and columns().",
        ),
    ],
    method: Annotated[
        str, typer.Option("--method", "-m", help="A method with a vector for each example.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Setting of the method; may be repeated."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of stored numbers: {', '.join(TYPES)}.")] = (
        "bfloat16"
    ),
    shard_rows: Annotated[
        int, typer.Option(min=0, help="Rows of a shard; as many as take 8 MB when 0.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 512,
    executor: Annotated[
        str | None, typer.Option(help="Where to work: processes:4, ray, ray:ADDRESS, torchrun.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Build an index too: ivf, pq, hnsw or qdrant; may be repeated."),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Double the index's effort until it finds this share."),
    ] = None,
) -> None:
    """Store a vector of every training example, built once and searched many times.

    Stopped halfway, the same command goes on where it stopped; on a complete store it does nothing.
    """
    if dtype not in TYPES:
        raise ForebearError(f"--dtype {dtype!r} is unknown: choose {', '.join(TYPES)}")
    settings = settings_of(option or [])
    from forebear import executors
    from forebear.pipeline import index_file
    from forebear.progress import progress

    where = executors.get(executor) if executor is not None else None
    with progress():
        done = index_file(
            file,
            method,
            settings,
            out,
            dtype=dtype,  # type: ignore[arg-type]
            shard_rows=shard_rows,
            batch_size=batch_size,
            executor=where,
            kinds=kind or [],
            recall=recall,
        )
    size = sum(path.stat().st_size for path in out.glob("shard-*.safetensors"))
    rows = len(done.store)
    if done.rows:
        there = f", {rows - done.rows:,} were there" if done.rows < rows else ""
        rate = done.rows / done.seconds
        print(f"wrote {done.rows:,} rows in {done.seconds:.3g} s{there}: {rate:,.0f} a second")
    else:
        print("every row was there: nothing to build")
    about = done.store.manifest
    print(
        f"{out}: {rows:,} rows × {about.dimension:,} {about.dtype}, {size:,} bytes, "
        f"{size / rows:,.0f} a row"
    )
    for name, said in done.recalls.items():
        print(f"index {name} {said}")
    print(f"search it with: forebear search {out} {file}, or forebear serve {out} {file}")
