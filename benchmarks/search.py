"""Exact search over a million rows on disk, and what int8 loses.

`python benchmarks/search.py` builds stores of 1,000,000 × 512 rows in a folder of its own (1.5 GB,
removed afterwards) and writes `search.json` beside itself: seconds of the top 100 for 64 queries
and for one, each as a multiple of the bare bfloat16 product with the same rows and of one read of
the same files, in turn, medians; peak memory; recall of int8 rows against float32 ones.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.search import ArrayRows, RunningTop, search_exact
from forebear.store import Manifest, Store, StoreBuilder

DIMENSION, QUERIES, K = 512, 64, 100
STEP = 50_000
KINDS = ("isotropic", "clustered")


def draw(kind: str, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows in float32, some at a time and the same each time."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(1000, DIMENSION, generator=generator)
    for start in range(0, rows, STEP):
        count = min(STEP, rows - start)
        part = torch.randn(count, DIMENSION, generator=generator)
        if kind == "clustered":
            part = centres[torch.randint(1000, (count,), generator=generator)] + 0.5 * part
        yield slice(start, start + count), part


def draw_queries(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(1000, DIMENSION, generator=generator)
    other = torch.randn(QUERIES, DIMENSION, generator=torch.Generator().manual_seed(2))
    return centres[:QUERIES] + 0.5 * other if kind == "clustered" else other


def build(folder: Path, kind: str, rows: int, dtype: Any) -> Store:
    """A store whose shards hold `STEP` rows."""
    manifest = Manifest(rows=rows, dimension=DIMENSION, dtype=dtype, shard_rows=STEP)
    with StoreBuilder.create(folder, manifest) as builder:
        for number, (part, values) in enumerate(draw(kind, rows)):
            builder.write(number, values, np.arange(part.start, part.stop))
        return builder.finish()


def read_files(folder: Path) -> Callable[[], None]:
    """Read every shard from beginning to end, two megabytes at a time."""
    buffer = bytearray(2**21)

    def run() -> None:
        for path in sorted(folder.glob("shard-*")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return run


def touch(store: Store) -> Callable[[], None]:
    """Add up the mapped rows as whole numbers: nothing faster looks at every byte."""

    def run() -> None:
        for block in store.blocks(STEP):
            block.values.view(torch.int64).sum()

    return run


def bare_product(store: Store, queries: Tensor) -> Callable[[], None]:
    """The product in bfloat16 alone, by torch's own threads, the result thrown away."""
    rounded = queries.bfloat16().T.contiguous()

    def run() -> None:
        for block in store.blocks(STEP):
            block.values @ rounded

    return run


def in_turn(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work, one after the other, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """Times of search over bfloat16 and int8 stores."""
    queries = draw_queries("isotropic")
    store = build(folder / "bfloat16", "isotropic", rows, "bfloat16")
    small = build(folder / "int8", "isotropic", rows, "int8")
    seconds = in_turn(
        {
            "bare product, 64 queries": bare_product(store, queries),
            "read the files": read_files(store.folder),
            "touch mapped rows": touch(store),
            "search, 64 queries": lambda: search_exact(store, queries, K),
            "search, 1 query": lambda: search_exact(store, queries[:1], K),
            "bare product, 1 query": bare_product(store, queries[:1]),
            "read the int8 files": read_files(small.folder),
            "search int8, 64 queries": lambda: search_exact(small, queries, K),
            "search int8, 1 query": lambda: search_exact(small, queries[:1], K),
        },
        repeats,
    )
    ratios = {
        "search, 64 queries / bare product, 64 queries": 0.0,
        "search int8, 64 queries / bare product, 64 queries": 0.0,
        "search, 1 query / read the files": 0.0,
        "search, 1 query / touch mapped rows": 0.0,
        "search, 1 query / bare product, 1 query": 0.0,
        "search int8, 1 query / read the int8 files": 0.0,
    }
    for name in ratios:
        one, other = name.split(" / ")
        pairs = zip(seconds[one], seconds[other], strict=True)
        ratios[name] = median(a / b for a, b in pairs)
    return {"seconds": {name: median(s) for name, s in seconds.items()}, "ratios": ratios}


def exact_in_float32(kind: str, rows: int) -> np.ndarray:
    """Positions `[q, K]` found in float32 rows that are never all in memory."""
    queries = draw_queries(kind)
    running = RunningTop.empty(K, QUERIES)
    keys = np.repeat(np.arange(QUERIES), K)
    for part, values in draw(kind, rows):
        found = search_exact(ArrayRows(values), queries, K)
        positions = found.positions.numpy().reshape(-1) + part.start
        running = running.add(keys, positions, found.values.numpy().reshape(-1))
    return running.positions.reshape(QUERIES, K)


def recall(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    """Share of the float32 top 100 that rows of other types have in theirs."""
    out: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        truth = exact_in_float32(kind, rows)
        out[kind] = {}
        for dtype in ("bfloat16", "int8"):
            place = folder / f"{kind}-{dtype}"
            found = search_exact(build(place, kind, rows, dtype), draw_queries(kind), K)
            pairs = zip(truth, found.positions.numpy(), strict=True)
            out[kind][dtype] = float(np.mean([np.isin(a, b).mean() for a, b in pairs]))
            shutil.rmtree(place)
    return out


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="forebear-search-"))
    try:
        load = os.getloadavg()[0]
        result = {
            "setting": {
                "rows": options.rows,
                "dimension": DIMENSION,
                "k": K,
                "threads": options.threads,
                "repeats": options.repeats,
                "load_average_before": load,
                "torch": torch.__version__,
            },
            **speed(folder, options.rows, options.repeats),
        }
        result["recall"] = recall(folder, options.rows)
    finally:
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["setting"]["peak_memory_mb_with_mapped_rows"] = round(peak)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
