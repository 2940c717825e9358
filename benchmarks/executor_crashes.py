"""Does work that was killed, workers or driver, end as work that was not?

    python benchmarks/executor_crashes.py --trials 50 --out benchmarks/executor_crashes.json

Each trial is one of three works: ground-truth retraining in one process, the same with two worker
processes, and a store of features built by two worker processes. It runs in a child process that is
killed with SIGKILL at random moments, three times, and then let finish. With workers, a kill meets
now one of them (or the process that forks them), which is replaced while the work goes on, and now
the driver, whose workers must then end by themselves. The outcome must be that of uninterrupted
work in one process, bit for bit.
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
from pathlib import Path
from typing import Any

ORPHAN_SECONDS = 5.0
"""In which workers must end after their driver."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--trials", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--pieces", type=int, default=30)
    arguments.add_argument("--kills", type=int, default=3, help="of each trial")
    arguments.add_argument("--only", default="", help="works whose names hold this")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # children are forks, which must not wait for threads
    import torch

    import forebear.methods.features
    import forebear.training  # noqa: F401  here, so that no child spends its life importing

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            Path(folder),
            options.trials,
            options.seed,
            options.pieces,
            options.kills,
            options.only,
        )
    print(json.dumps(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    good = report["identical"] == report["trials"] and report["orphans"] == 0
    sys.exit(0 if good else 1)


def run(folder: Path, trials: int, seed: int, pieces: int, kills: int, only: str) -> dict[str, Any]:
    """All trials, and what the kills met."""
    from forebear.executors import InProcess
    from forebear.executors.processes import Processes

    chance = random.Random(seed)
    here, there = InProcess(), Processes(workers=2, attempts=kills + 1)
    works: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Any], Any], Any]] = {
        "retraining in process": (truth_of, lambda out, e: retrain(out, e, pieces), here),
        "retraining by processes": (truth_of, lambda out, e: retrain(out, e, pieces), there),
        "store by processes": (shards_of, lambda out, e: store(out, e, pieces), there),
    }
    expected = {}
    for name, (content, work, _) in works.items():
        out = folder / f"whole {name}"
        Trial(out, work, InProcess()).wait()
        expected[name] = content(out)
    report: dict[str, Any] = {"trials": trials, "seed": seed, "pieces": pieces, "identical": 0}
    report |= {"kills_of_drivers": 0, "kills_of_workers": 0, "kills_after_the_end": 0, "orphans": 0}
    chosen = [name for name in works if only in name]
    for number in range(trials):
        name = chosen[number % len(chosen)]
        content, work, executor = works[name]
        out = folder / f"trial {number}"
        trial = Trial(out, work, executor)
        for _ in range(kills):
            trial.let_work(chance.randrange(1 + pieces // kills), chance.random() / 100)
            workers = trial.workers()
            if trial.ended():
                report["kills_after_the_end"] += 1
            elif workers and chance.random() < 0.5:
                os.kill(chance.choice(workers), signal.SIGKILL)
                report["kills_of_workers"] += 1
            else:
                trial.kill()
                report["kills_of_drivers"] += 1
                report["orphans"] += left_alive(workers)
                trial = Trial(out, work, executor)
        trial.wait()
        same = content(out) == expected[name]
        report["identical"] += same
        if not same:
            files = sorted(path.name for path in out.iterdir())
            print(f"{name} differs: {files}", file=sys.stderr)
    return report


class Trial:
    """Work in a child process."""

    def __init__(self, out: Path, work: Callable[[Path, Any], Any], executor: Any) -> None:
        self.out = out
        self.child = os.fork()
        if self.child == 0:
            try:
                work(out, executor)
                os._exit(0)
            except BaseException as error:
                print(repr(error), getattr(error, "__notes__", ""), file=sys.stderr)
                os._exit(1)

    def let_work(self, more: int, seconds: float) -> None:
        """Return so many seconds after so many more pieces are done, or when it has ended."""
        before = done(self.out)
        while done(self.out) < before + more and not self.ended():
            time.sleep(0.001)
        time.sleep(seconds)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def workers(self) -> list[int]:
        """Processes that the child has started, and theirs."""
        found, parents = [], [self.child]
        while parents:
            path = Path(f"/proc/{parents.pop()}/task")
            for thread in path.iterdir() if path.exists() else []:
                try:
                    own = list(map(int, (thread / "children").read_text().split()))
                except OSError:  # it ended while we looked
                    continue
                found += own
                parents += own
        return found

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)

    def wait(self) -> None:
        _, status = os.waitpid(self.child, 0)
        if os.waitstatus_to_exitcode(status) != 0:
            raise RuntimeError(f"the work in {self.out} failed by itself")


def done(out: Path) -> int:
    """Pieces that are there."""
    return len(list(out.glob("*.safetensors"))) if out.exists() else 0


def left_alive(workers: list[int]) -> int:
    """How many of these processes outlive their driver."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + ORPHAN_SECONDS
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    return sum(map(alive, workers))


def retrain(out: Path, executor: Any, pieces: int) -> None:
    """Two retrainings a piece of a small network."""
    import torch
    from torch import nn

    from forebear import losses
    from forebear.training import GroundTruth, Recipe, half_subsets, truth

    truth.PIECE = 2
    recipe = Recipe(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)),
        losses.cross_entropy,
        learning_rate=0.2,
        epochs=3,
        batch_size=16,
    )
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(96, 8, generator=generator), torch.randint(4, (96,), generator=generator)
    subsets = half_subsets(96, 2 * pieces)
    GroundTruth.collect(
        recipe, data, data, subsets=subsets, seeds=1, full=False, folder=out, executor=executor
    ).save(out / "truth")


def truth_of(out: Path) -> bytes:
    """The outcomes."""
    from forebear.training import GroundTruth

    return GroundTruth.load(out / "truth").outcomes.numpy().tobytes()


def store(out: Path, executor: Any, pieces: int) -> None:
    """A store of projected gradients of a small network."""
    import torch
    from torch import nn

    import forebear as fb
    from forebear.methods.features import build_store

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    data = torch.randn(20 * pieces, 8), torch.randint(4, (20 * pieces,))
    task = fb.Task(model, fb.losses.cross_entropy)
    build_store(fb.TRAK(dimension=32), task, data, out, shard_rows=20, executor=executor)


def shards_of(out: Path) -> dict[str, bytes]:
    """All files of the store."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


if __name__ == "__main__":
    main()
