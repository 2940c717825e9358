"""What does a store cost to build, to hold, to read in order and to read at random?

    python benchmarks/store.py --out benchmarks/store.json

Building is timed against plain passes on the MLP of `workloads.py`; reading against one read of the
same bytes by plain system calls. Each part runs in a process of its own.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads import images, median_ratio, peak_memory_mb, plain_pass, set_threads, workload

DIMENSION = 512
REPEATS = 5
PARTS = ["build 10000", "build 50000", "transformer", "memory 10000", "memory 100000", "read"]
SEQUENCES, TOKENS = 1024, 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rows", type=int, default=1_000_000, help="of the store that is read")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--folder", type=Path, help="where stores are made; a temporary one")
    arguments.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    arguments.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    set_threads(options.threads)
    if options.child:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(run(options, Path(folder))))
        return
    report: dict[str, Any] = {"dimension": DIMENSION, "threads": options.threads}
    for part in options.only:
        command = [sys.executable, *sys.argv, "--child", part]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report[part] = json.loads(answer.stdout.splitlines()[-1])
        print(part, report[part], flush=True)
    report["load_average_after"] = os.getloadavg()[0]
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part."""
    if options.child == "read":
        return read(folder, options.rows)
    if options.child == "transformer":
        return transformer(folder)
    what, size = options.child.split()
    return {"build": build, "memory": memory}[what](folder, int(size))


def method() -> Any:
    """Projected loss gradients without curvature: what a store of gradients needs."""
    import forebear as fb
    from forebear.projections import TensorSketch

    return fb.Influence(projection=TensorSketch(DIMENSION))


def build(folder: Path, size: int) -> dict[str, Any]:
    """Plain passes that building takes, with everything that comes before and after the pass."""
    import forebear as fb
    from forebear.methods.features import build_store

    made = workload("mlp", 10_000, 1)
    train, _ = images("train", size, flat=True)
    task = fb.Task(made.model, fb.losses.cross_entropy)
    count = itertools.count()

    def timed(chosen: Any, dtype: Any) -> dict[str, Any]:
        def work() -> Any:
            return build_store(chosen, task, train, folder / str(next(count)), dtype=dtype)

        timing = median_ratio(work, made.model, train, repeats=REPEATS, passes=2)
        return {
            "passes": round(timing.ratio, 3),
            "seconds": round(timing.seconds, 4),
            "plain_pass_seconds": round(timing.plain_seconds, 4),
        }

    methods = {"loss": method(), "trak": fb.TRAK(dimension=DIMENSION)}
    dtypes = ("bfloat16", "int8")
    return {f"{name} {dtype}": timed(methods[name], dtype) for name in methods for dtype in dtypes}


def transformer(folder: Path) -> dict[str, Any]:
    """The same for a language model of four layers, about 512 numbers for each sequence."""
    import torch
    from planning import Transformer

    import forebear as fb
    from forebear.methods.features import build_store
    from forebear.projections import TwoSided

    torch.manual_seed(0)
    model = Transformer(width=256)
    train = {"input_ids": torch.randint(1024, (SEQUENCES, TOKENS))}
    task = fb.Task(model, fb.losses.causal_lm)
    parameters = list(model.parameters())
    count = itertools.count()

    def plain() -> float:
        start = time.perf_counter()
        for tokens in train["input_ids"].split(64):
            loss = task.losses(model, {"input_ids": tokens}).mean()
            torch.autograd.grad(loss, parameters)
        return time.perf_counter() - start

    chosen, ratios = fb.Influence(projection=TwoSided(20)), []
    for _ in range(3):  # the first pays for allocation
        before, start = plain(), time.perf_counter()
        store = build_store(chosen, task, train, folder / str(next(count)), batch_size=64)
        seconds = time.perf_counter() - start
        ratios.append(seconds / statistics.median([before, plain()]))
    passes = round(statistics.median(ratios[1:]), 3)
    return {"sequences": SEQUENCES, "passes": passes, "dimension": store.dimension}


class Repeated:
    """As many examples as wanted, of ten thousand, so that the data take the same memory."""

    def __init__(self, tensors: tuple[Any, ...], size: int) -> None:
        self.tensors = tensors
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return tuple(tensor[i % len(tensor)] for tensor in self.tensors)


def memory(folder: Path, size: int) -> dict[str, Any]:
    """Highest resident memory while `size` examples are stored."""
    import forebear as fb
    from forebear.methods.features import build_store

    made = workload("mlp", 10_000, 1)
    plain_pass(made.model, made.train)
    before = peak_memory_mb()
    task = fb.Task(made.model, fb.losses.cross_entropy)
    build_store(method(), task, Repeated(made.train.tensors, size), folder / "store")
    return {"peak_memory_mb": round(peak_memory_mb()), "memory_before_mb": round(before)}


def read(folder: Path, rows: int) -> dict[str, Any]:
    """Seconds to write, open, verify, scan and pick rows."""
    import numpy as np
    import torch

    from forebear.store import Manifest, Store, StoreBuilder, verify

    values = torch.randn(16384, DIMENSION)
    manifest = Manifest(rows=rows, dimension=DIMENSION)
    start = time.perf_counter()
    with StoreBuilder.create(folder / "s", manifest) as builder:
        for shard in builder.missing():
            part = manifest.rows_of(shard)
            ids = np.arange(part.start, part.stop)
            builder.write(shard, values[: len(ids)], ids)
        builder.finish()
    written = time.perf_counter() - start
    files = sorted((folder / "s").glob("shard-*"))
    size = sum(path.stat().st_size for path in files)
    found: dict[str, Any] = {"rows": rows, "bytes_a_row": round(size / rows, 2)}
    found["write_rows_a_second"] = round(rows / written)
    found["open_seconds"] = round(seconds(lambda: Store.open(folder / "s")), 5)
    found["verify_seconds"] = round(seconds(lambda: verify(folder / "s"), 1), 3)
    store = Store.open(folder / "s")
    scan(store)
    found["plain_read_seconds"] = round(seconds(lambda: plain_read(files)), 4)
    found["scan_seconds"] = round(seconds(lambda: scan(store)), 4)
    found["scan_of_a_new_map_seconds"] = round(seconds(lambda: scan(Store.open(folder / "s"))), 4)
    parts = torch.cat([block.values for block in store.blocks()]).split(4096)
    found["scan_of_memory_seconds"] = round(seconds(lambda: added(parts)), 4)
    found |= cold(folder / "s", files)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 100, 10_000):
        where = torch.randint(rows, (count,), generator=generator)
        taken = seconds(lambda where=where: store.rows(where), 20)
        found[f"random_rows_a_second_{count}_at_a_time"] = round(count / taken)
    few = store.ids[torch.randint(rows, (100,), generator=generator).numpy()]
    found["first_lookup_by_id_seconds"] = round(
        seconds(lambda: Store.open(folder / "s").positions(few), 1), 3
    )
    return found


def cold(folder: Path, files: list[Path]) -> dict[str, Any]:
    """The same when nothing is in memory: the kernel is asked to forget the files before."""
    from forebear.store import Store

    def forget() -> None:
        for path in files:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    found = {"cold_plain_read_seconds": [], "cold_scan_seconds": []}
    for _ in range(3):
        for name, work in {
            "cold_plain_read_seconds": lambda: plain_read(files),
            "cold_scan_seconds": lambda: scan(Store.open(folder)),
        }.items():
            forget()
            found[name].append(seconds(work, 1))
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def plain_read(files: list[Path]) -> int:
    """Every byte into one small buffer, as `dd` does."""
    buffer, total = bytearray(2**20), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def scan(store: Any) -> int:
    """Every row touched once."""
    return added(block.values for block in store.blocks(4096))


def added(parts: Any) -> int:
    """Entries as integers added up: cheap, and needs every byte."""
    import torch

    return sum(int(part.view(torch.int32).sum()) for part in parts)


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median over the repeats."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
