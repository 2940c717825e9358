"""`forebear search`: the training examples that queries owe most to, out of a store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.commands.options import examples
from forebear.commands.tables import cell, print_table
from forebear.errors import ForebearError

if TYPE_CHECKING:
    from torch import Tensor

    from forebear.search import TopRows
    from forebear.service import Searcher

EPILOG = examples(
    "forebear search stores/mine task.py -k 20 --where 'label=3' --where 'date>=2024-01-01'",
    "forebear search stores/mine task.py --query 7 --kind ivf --out top.parquet",
    "forebear search stores/mine --row 1234",
)
SHOWN_QUERIES = 3

StoreFolder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]
TaskFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE.py]",
        exists=True,
        dir_okay=False,
        help="Python file that defines task() and queries(), and may define examples().",
    ),
]
Kind = Annotated[
    str | None, typer.Option(help="Search by an index: ivf, pq, hnsw or qdrant; exact if left out.")
]


def search(
    folder: StoreFolder,
    file: TaskFile = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Rows of each query and group.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="COLUMN=VALUE, COLUMN=ONE|OTHER, COLUMN>=VALUE or COLUMN<=VALUE; may be repeated.",
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The strongest rows of each of its values.")
    ] = None,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="The lowest scores instead of the highest.")
    ] = False,
    kind: Kind = None,
    query: Annotated[str | None, typer.Option("--query", "-q", help="Id of one query.")] = None,
    row: Annotated[
        str | None, typer.Option(metavar="ID", help="Rows near a stored one; needs no FILE.py.")
    ] = None,
    quantiles: Annotated[
        bool, typer.Option("--quantiles", help="Where each score stands among those of all rows.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write a FILE.parquet, or a folder with provenance.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the stored training examples that queries owe most to."""
    if (file is None) == (row is None):
        raise ForebearError("name the FILE.py whose queries are asked, or a row with --row ID")
    if out is not None and out.suffix not in ("", ".parquet"):
        raise ForebearError(f"--out {out} is neither a FILE.parquet nor a folder")
    from forebear.progress import progress
    from forebear.service import Question

    asked = Question(k=k, where=where or [], group=group, opponents=opponents)
    names: Sequence[Any]
    with progress():
        if file is None:
            searcher, texts = opened(folder, kind), {}
            position = searcher.position(str(row))
            vectors, names, fingerprint = searcher.store.rows([position]), [row], ""
            found = searcher.neighbours(position, asked)
        else:
            searcher, queries, texts = from_file(folder, file, kind)
            queries = _only(queries, query) if query is not None else queries
            vectors, names = searcher.vectors(queries), queries.ids
            fingerprint = queries.fingerprint
            found = searcher.search(vectors, asked)
        told = searcher.told(found, names, fingerprint)
        if quantiles:
            _place(told, searcher, vectors, found)
    if out is not None:
        _write(out, searcher.top(found, names, fingerprint, opponents=opponents), told)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    _print(told, opponents, "query" if row is None else "row", texts, all_of_them=query is not None)
    if out is not None:
        print(f"wrote {out}")


def opened(folder: Path, kind: str | None, **facts: Any) -> "Searcher":
    """A store, ready to be asked, with an index where a kind is named."""
    from forebear.service import Searcher
    from forebear.store import Store

    store = Store.open(folder)
    if kind is None:
        return Searcher(store, **facts)
    from forebear import index

    return Searcher(store, index=index.open(store, kind), **facts)


def from_file(folder: Path, file: Path, kind: str | None) -> tuple["Searcher", Any, dict]:
    """The same with the model of a file, its queries, and what people call them."""
    from forebear.data import Data
    from forebear.methods.stored import load_fitted
    from forebear.task_file import defined

    plain = opened(folder, kind)  # a wrong folder is found out before a model is made
    found = defined(file, ("task", "queries"), ("examples",))
    queries = Data.of(found["queries"], collate=found["task"].collate)
    texts = found.get("examples", {})
    searcher = type(plain)(
        plain.store,
        fitted=load_fitted(plain.store, found["task"], queries),
        index=plain.index,
        texts=texts.get("train", {}),
        form=queries.batch(slice(0, 1)),
    )
    return searcher, queries, texts.get("queries", {})


def _only(queries: Any, name: str) -> Any:
    """The one query with an id."""
    ids = [str(item) for item in queries.ids.tolist()]
    if name not in ids:
        raise ForebearError(
            f"unknown query {name!r}: the file has {len(ids)}, from {ids[0]!r} to {ids[-1]!r}"
        )
    place = ids.index(name)
    return queries.slice(slice(place, place + 1))


def _place(told: dict[str, Any], searcher: "Searcher", vectors: "Tensor", found: "TopRows") -> None:
    """Add to each score which share of all rows does not score higher."""
    shares = searcher.places(vectors, found).tolist()
    for answer, row in zip(told["answers"], shares, strict=True):
        for one, share in zip(answer["rows"], row, strict=True):
            one["quantile"] = share


def _write(out: Path, top: Any, told: dict[str, Any]) -> None:
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        top.to_parquet(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    top.to_parquet(out / "top.parquet")
    about = {name: told[name] for name in ("search", "recall", "provenance")}
    (out / "search.json").write_text(json.dumps(about, indent=1) + "\n")


def _print(
    told: dict[str, Any], opponents: bool, noun: str, texts: dict, *, all_of_them: bool
) -> None:
    side = "opponents" if opponents else "proponents"
    answers = told["answers"] if all_of_them else told["answers"][:SHOWN_QUERIES]
    for answer in answers:
        name, rows = answer["query"], answer["rows"]
        what = f"strongest {side} of query" if noun == "query" else "rows nearest to row"
        text = texts.get(name)
        print(f"{what} {name}" + (f" ({text})" if text else ""))
        columns = ["rank", "example", "score"]
        columns += [key for key in ("group", "quantile") if key in rows[0]]
        named = list(rows[0]["columns"])
        has_text = any("text" in one for one in rows)
        lines = [
            [
                *(_shown(key, one.get({"example": "id"}.get(key, key))) for key in columns),
                *(cell(one["columns"][key]) for key in named),
                *([one.get("text", "")] if has_text else []),
            ]
            for one in rows
        ]
        heads = [*columns, *named, *(["what it is"] if has_text else [])]
        print_table(heads, lines, right=["rank", "example", "score", "quantile"])
    if len(told["answers"]) > len(answers):
        print(f"{len(told['answers']) - len(answers)} more queries: choose one with --query ID")
    if told["recall"] is None:
        return
    if all(answer["exact"] for answer in answers):
        print("few rows meet the conditions, so each of them was looked at: the answer is exact")
    else:
        print(f"index {told['search']} {told['recall']}")


def _shown(key: str, value: Any) -> str:
    if key == "score":
        return f"{value:+.4g}"
    return f"{value:.2%}" if key == "quantile" else cell(value)
