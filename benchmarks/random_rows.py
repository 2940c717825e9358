"""Rows at random from a store, from zarr and from Lance: how many a second?

    python -m venv peers && peers/bin/pip install zarr pylance
    python benchmarks/random_rows.py --peers peers/bin/python --out benchmarks/random_rows.json

The same 1,000,000 × 512 float16 rows in each, nothing compressed, all of it in the page cache (each
file is read once before). 10,000 random rows at a time, 100 at a time, and one by one; other rows
each time, the same for all; medians. Every program answers in its own process, in turn, several
times over. zarr and Lance are given several layouts, of which the best counts; the rows that came
back are compared by their sum. forebear turns rows into float32 as it always does; the others give
float16.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

DIMENSION = 512
COUNTS = {10_000: 15, 100: 50, 1: 500}  # rows at a time: how often in one turn
STEP = 50_000
Take = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Write each form once, time all in turn, report."""
    parser = argparse.ArgumentParser(description="Rows at random, from several stores.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", help="a Python that has zarr and pylance; skipped without")
    parser.add_argument("--folder", type=Path, help="where files are made; a temporary one")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        write_rows(options.folder / "rows.npy", options.rows)
        report = run(options)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of every form that can be made here."""
    seconds: dict[str, dict[str, list[float]]] = {}
    sums: dict[str, float] = {}
    versions: dict[str, str] = {}
    forms = [name for name in FORMS if ask(options, name, "write", versions)]
    for _ in range(options.turns):
        for name in forms:
            answer = ask(options, name, "take", versions)
            for count, taken in answer["seconds"].items():
                seconds.setdefault(name, {}).setdefault(count, []).extend(taken)
            sums[name] = answer["sum"]
    assert len(set(sums.values())) == 1, sums
    rates = {
        name: {count: round(int(count) / median(taken)) for count, taken in by_count.items()}
        for name, by_count in seconds.items()
    }
    others = [name for name in rates if name != "forebear"]
    ratios = {
        peer: {
            count: round(
                rates["forebear"][count]
                / max(rates[name][count] for name in others if name.startswith(peer)),
                1,
            )
            for count in rates["forebear"]
        }
        for peer in ("zarr", "lance")
        if any(name.startswith(peer) for name in others)
    }
    return {
        "setting": {
            "rows": options.rows,
            "dimension": DIMENSION,
            "threads": options.threads,
            "turns": options.turns,
            "load_average_after": os.getloadavg()[0],
            **versions,
        },
        "rows_a_second_by_rows_at_a_time": rates,
        "forebear_faster_than_the_best_of": ratios,
    }


def ask(options: argparse.Namespace, name: str, what: str, versions: dict[str, str]) -> Any:
    """What a process of its own answers; None where the package is missing."""
    python = sys.executable if name == "forebear" else options.peers
    if python is None:
        return None
    command = [python, __file__, "--child", name, what, "--folder", str(options.folder)]
    command += ["--rows", str(options.rows), "--threads", str(options.threads)]
    threads = {key: str(options.threads) for key in ("OMP_NUM_THREADS", "LANCE_CPU_THREADS")}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer is not None:
        versions |= answer["versions"]
    return answer


def child(options: argparse.Namespace) -> None:
    """Write or take, in this process."""
    name, what = options.child
    package, write, opened = FORMS[name]
    if importlib.util.find_spec(package) is None:
        print("null")
        return
    from importlib.metadata import version

    packages = {"lance": "pylance"}.get(package, package)
    answer: dict[str, Any] = {"versions": {packages: version(packages)}}
    place = options.folder / name.replace(" ", "-")
    if what == "write":
        write(place, np.load(options.folder / "rows.npy", mmap_mode="r"))
    else:
        answer |= timed(opened(place), options.rows, place)
    print(json.dumps(answer))


def timed(take: Take, rows: int, place: Path) -> dict[str, Any]:
    """Seconds of each call, and the sum of all rows that came."""
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            path.read_bytes()
    chance = np.random.default_rng(0)
    seconds: dict[int, list[float]] = {}
    total = 0.0
    take(chance.integers(rows, size=100))
    for count, repeats in COUNTS.items():
        seconds[count] = []
        for _ in range(repeats):
            where = chance.integers(rows, size=count)
            start = time.perf_counter()
            found = take(where)
            seconds[count].append(time.perf_counter() - start)
            assert found.shape == (count, DIMENSION)
            # Whole numbers have exact sums, and their order matters by the weights.
            total += float((found.astype(np.float64).sum(1) * np.arange(1, count + 1)).sum())
    return {"seconds": seconds, "sum": total}


def write_rows(path: Path, rows: int) -> None:
    """Whole numbers from −100 to 100, which float16 and sums hold exactly."""
    chance = np.random.default_rng(1)
    shape = (rows, DIMENSION)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, rows, STEP):
        count = min(STEP, rows - start)
        out[start : start + count] = chance.integers(-100, 101, (count, DIMENSION), dtype=np.int8)
    out.flush()


def write_forebear(place: Path, rows: np.ndarray) -> None:
    import torch

    from forebear.store import Manifest, StoreBuilder

    manifest = Manifest(rows=len(rows), dimension=DIMENSION, dtype="float16")
    with StoreBuilder.create(place, manifest) as builder:
        for shard in builder.missing():
            part = manifest.rows_of(shard)
            values = torch.from_numpy(np.array(rows[part]))
            builder.write(shard, values, np.arange(part.start, part.stop))
        builder.finish()


def open_forebear(place: Path) -> Take:
    from forebear.store import Store

    store = Store.open(place)
    return lambda where: store.rows(where).numpy()


def write_zarr(chunk: int, shard: int | None = None) -> Callable[[Path, np.ndarray], None]:
    def write(place: Path, rows: np.ndarray) -> None:
        import zarr

        array = zarr.create_array(
            store=str(place),
            shape=rows.shape,
            dtype="float16",
            chunks=(chunk, DIMENSION),
            shards=None if shard is None else (shard, DIMENSION),
            compressors=None,
        )
        size = shard or STEP // chunk * chunk
        for start in range(0, len(rows), size):
            array[start : start + size] = rows[start : start + size]

    return write


def open_zarr(place: Path) -> Take:
    import zarr

    array = zarr.open_array(str(place), mode="r")
    return lambda where: array.oindex[where, :]


def write_lance(version: str) -> Callable[[Path, np.ndarray], None]:
    def write(place: Path, rows: np.ndarray) -> None:
        import lance
        import pyarrow as pa

        kind = pa.list_(pa.float16(), DIMENSION)

        def batches() -> Any:
            for start in range(0, len(rows), STEP):
                flat = pa.array(np.array(rows[start : start + STEP]).reshape(-1))
                values = pa.FixedSizeListArray.from_arrays(flat, DIMENSION)
                yield pa.record_batch([values], names=["values"])

        schema = pa.schema([pa.field("values", kind)])
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        lance.write_dataset(reader, str(place), data_storage_version=version)

    return write


def open_lance(place: Path) -> Take:
    import lance

    dataset = lance.dataset(str(place))

    def take(where: np.ndarray) -> np.ndarray:
        values = dataset.take(where, columns=["values"]).column("values").combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, DIMENSION)

    return take


FORMS: dict[str, tuple[str, Callable[[Path, np.ndarray], None], Callable[[Path], Take]]] = {
    "forebear": ("forebear", write_forebear, open_forebear),
    "zarr chunks of 1024": ("zarr", write_zarr(1024), open_zarr),
    "zarr chunks of 64": ("zarr", write_zarr(64), open_zarr),
    "zarr chunks of 16 in shards of 8192": ("zarr", write_zarr(16, 8192), open_zarr),
    "lance 2.0": ("lance", write_lance("2.0"), open_lance),
    "lance 2.1": ("lance", write_lance("2.1"), open_lance),
}


if __name__ == "__main__":
    main()
