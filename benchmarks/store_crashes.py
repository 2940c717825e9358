"""Does a store that was killed while it was made end as one that was not?

    python benchmarks/store_crashes.py --trials 50 --out benchmarks/store_crashes.json

Each trial makes a store (shard by shard, from a method, or by a merge of two) in a child process
that is killed with SIGKILL at random moments, three times, and then let finish. The files must then
be the very bytes of an uninterrupted store, with nothing besides.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLS = 3
SHARD_ROWS, DIMENSION = 100, 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--trials", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--shards", type=int, default=100)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # children are forks, which must not wait for threads
    import torch

    import forebear.methods.features  # noqa: F401  here, so that no child spends its life importing

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), options.trials, options.seed, options.shards)
    print(json.dumps(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["identical"] == report["trials"] else 1)


def run(folder: Path, trials: int, seed: int, shards: int) -> dict[str, Any]:
    """All trials, and what the kills met."""
    chance = random.Random(seed)
    build(folder / "a", 0, shards)
    build(folder / "b", 1, shards)
    works: dict[str, Callable[[Path], Any]] = {
        "build": lambda out: build(out, 0, shards),
        "merge": lambda out: merged([folder / "a", folder / "b"], out),
        "method": lambda out: from_method(out, shards),
    }
    expected = {}
    for name, work in works.items():
        in_child(work, folder / f"whole-{name}", None)
        expected[name] = content(folder / f"whole-{name}")
    report: dict[str, Any] = {"trials": trials, "seed": seed, "shards": shards}
    report |= {"identical": 0, "kills": 0}
    report |= {"kills_between_shards": 0, "kills_inside_a_write": 0, "kills_at_the_ends": 0}
    for trial in range(trials):
        name = list(works)[trial % len(works)]
        out = folder / f"trial-{trial}"
        for _ in range(KILLS):
            # A few shards after where it stands; a write takes about a millisecond.
            more = chance.randrange(shards // KILLS)
            if in_child(
                works[name], out, Moment(out, shards_of(out) + more, chance.random() / 500)
            ):
                break
            count(report, out, len(expected[name]) - 1)
        in_child(works[name], out, None)
        report["identical"] += content(out) == expected[name]
    return report


@dataclass(frozen=True)
class Moment:
    """So many seconds after `out` has so many shards."""

    out: Path
    shards: int
    seconds: float

    def wait(self, child: int) -> None:
        """Return then, or when the child has ended."""
        while shards_of(self.out) < self.shards:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
        time.sleep(self.seconds)


def shards_of(out: Path) -> int:
    return len(list(out.glob("shard-*.safetensors"))) if out.exists() else 0


def count(report: dict[str, Any], out: Path, shards: int) -> None:
    """Where a kill met the work."""
    report["kills"] += 1
    if any(out.glob("*.partial")):
        report["kills_inside_a_write"] += 1
    else:
        between = 0 < shards_of(out) < shards
        report["kills_between_shards" if between else "kills_at_the_ends"] += 1


def in_child(work: Callable[[Path], Any], out: Path, moment: Moment | None) -> bool:
    """Whether the work came to its end; without a moment it is not killed."""
    child = os.fork()
    if child == 0:
        try:
            work(out)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if moment is not None:
        moment.wait(child)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the work failed by itself")
    return os.WIFEXITED(status)


def build(out: Path, part: int, shards: int) -> None:
    """A store of random rows."""
    import numpy as np
    import torch

    from forebear.store import Manifest, StoreBuilder

    size = shards * SHARD_ROWS
    manifest = Manifest(rows=size, dimension=DIMENSION, dtype="int8", shard_rows=SHARD_ROWS)
    with StoreBuilder.create(out, manifest) as builder:
        for shard in builder.missing():
            generator = torch.Generator().manual_seed(1000 * part + shard)
            values = torch.randn(SHARD_ROWS, DIMENSION, generator=generator)
            start = part * size + shard * SHARD_ROWS
            builder.write(shard, values, np.arange(start, start + SHARD_ROWS))
        builder.finish()


def merged(sources: list[Path], out: Path) -> None:
    """Two stores as one, cut in another way."""
    from forebear.store import merge

    merge(sources, out, shard_rows=130)


def from_method(out: Path, shards: int) -> None:
    """A store of projected gradients of a small network."""
    import torch
    from torch import nn

    import forebear as fb
    from forebear.methods.features import build_store

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    data = torch.randn(20 * shards, 8), torch.randint(4, (20 * shards,))
    task = fb.Task(model, fb.losses.cross_entropy)
    build_store(fb.TRAK(dimension=32), task, data, out, shard_rows=20)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
