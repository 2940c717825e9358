"""Indexes over a store against exact search: recall, time to build, time to answer, bytes.

`python benchmarks/indexes.py` builds stores of 100,000 × 512 bfloat16 rows in a folder of its own
(removed afterwards) and writes `indexes.json` beside itself. Two kinds of rows: isotropic normal
ones, and rows as gradients are, around 1,000 centres in 64 directions, with noise in all of them
and lengths that differ by a factor of e. Queries are new draws of the same kind; times are CPU
seconds, each answer's the median of several, in turn with exact search over the same store.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import index
from forebear.index import StoredIndex
from forebear.search import search_exact
from forebear.store import Manifest, Store, StoreBuilder

DIMENSION, QUERIES, K = 512, 64, 100
STEP = 20_000
ROWS = ("isotropic", "as gradients")
KINDS = ("ivf", "pq", "hnsw")
RECALL = 0.9


def draw(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Rows in float32, of a distribution that does not depend on the generator."""
    noise = torch.randn(count, DIMENSION, generator=generator)
    if kind == "isotropic":
        return noise
    fixed = torch.Generator().manual_seed(0)
    directions = torch.randn(64, DIMENSION, generator=fixed) * torch.linspace(1, 0.1, 64)[:, None]
    centres = torch.randn(1000, 64, generator=fixed)
    which = torch.randint(1000, (count,), generator=generator)
    inner = centres[which] + 0.7 * torch.randn(count, 64, generator=generator)
    lengths = torch.randn(count, 1, generator=generator).exp()
    return (inner @ directions + 0.3 * noise) * lengths


def build_store(folder: Path, kind: str, rows: int) -> Store:
    manifest = Manifest(rows=rows, dimension=DIMENSION, dtype="bfloat16", shard_rows=STEP)
    generator = torch.Generator().manual_seed(1)
    with StoreBuilder.create(folder, manifest) as builder:
        for number in builder.missing():
            part = manifest.rows_of(number)
            values = draw(kind, part.stop - part.start, generator)
            builder.write(number, values, np.arange(part.start, part.stop))
        return builder.finish()


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turn(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each work, one after the other."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            seconds = seconds_of(work)
            if turn:
                found[name].append(seconds)
    return {name: median(each) for name, each in found.items()}


def measured(
    store: Store, queries: Tensor, kinds: list[str], repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each index with what it costs and finds: as it comes, and with the effort for `RECALL`."""
    yield "exact", {"bytes a row": _size(store.folder) / len(store)}
    for kind in kinds:
        start = time.process_time()
        built = index.build(store, kind, recall_at_least=RECALL)
        facts = {
            "seconds to build and tune": time.process_time() - start,
            "bytes a row": _size(built.folder) / len(store),
        }
        first = replace(built, config=replace(built.config, **built.trials[0].settings))
        yield f"{kind}, first", facts | answered(first, queries, repeats)
        yield f"{kind}, tuned", facts | answered(built, queries, repeats)
        shutil.rmtree(built.folder)


def answered(built: StoredIndex, queries: Tensor, repeats: int) -> dict[str, Any]:
    """How much an index finds of new queries, and in which time."""
    store = built.store
    seconds = in_turn(
        {
            "exact": lambda: search_exact(store, queries, K),
            "index": lambda: built.search(queries, K),
            "exact, 1 query": lambda: search_exact(store, queries[:1], K),
            "index, 1 query": lambda: built.search(queries[:1], K),
        },
        repeats,
    )
    sampled = np.random.default_rng(0).choice(len(store), 64, replace=False)
    return {
        "settings": asdict(built.config),
        "recall": built.measure(queries, K).mean,
        "recall of opponents": built.measure(queries, K, opponents=True).mean,
        "recall of sampled rows": built.measure(store.rows(sampled), K).mean,
        "seconds": seconds,
        "64 queries / exact": seconds["index"] / seconds["exact"],
        "1 query / exact": seconds["index, 1 query"] / seconds["exact, 1 query"],
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="forebear-indexes-"))
    result: dict[str, Any] = {
        "setting": {
            "rows": options.rows,
            "dimension": DIMENSION,
            "queries": QUERIES,
            "k": K,
            "threads": options.threads,
            "repeats": options.repeats,
            "load_average_before": os.getloadavg()[0],
            "torch": torch.__version__,
        }
    }
    try:
        for kind in ROWS:
            store = build_store(folder / kind, kind, options.rows)
            queries = draw(kind, QUERIES, torch.Generator().manual_seed(2))
            result[kind] = {}
            for name, found in measured(store, queries, options.kinds, options.repeats):
                result[kind][name] = found
                print(kind, name, json.dumps(found), flush=True)
            shutil.rmtree(store.folder)
    finally:
        shutil.rmtree(folder)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
