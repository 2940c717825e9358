"""What do stacked ensembles and Ray save when the demo's model is retrained a hundred times?

    python benchmarks/retraining.py --json benchmarks/retraining.json

The 64-64-32-10 network of `forebear demo` is retrained on 100 random halves of the digits:

- stacked (`GroundTruth.collect`) and by a plain loop of `recipe.train` over models, which gives the
  same outcomes; seconds of the processor, both with one thread;
- in one process with one thread and with two, and by two Ray workers with one thread each; seconds
  of the clock. Ray is started beforehand, and what the start takes is given apart.

Every way is a process of its own, the ways take turns, and numbers are medians over the repeats.
The loop trains `--loop` models and is scaled up to a hundred: its models cost the same.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = 100
WAYS = {"loop": 1, "stacked": 1, "stacked, two threads": 2, "two Ray workers": 1}
"""Names, and threads of each."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--loop", type=int, default=10, help="models that the loop trains")
    arguments.add_argument("--epochs", type=int, default=40)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.loop, options.epochs)))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, own in runs.items():
            own.append(in_process(way, options))
            print(way, {k: v for k, v in own[-1].items() if k != "outcomes"}, flush=True)
    report = summary(runs, options)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def in_process(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way in a process with its number of threads."""
    threads = str(WAYS[way])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    program = [sys.executable, __file__, "--way", way]
    program += ["--loop", str(options.loop), "--epochs", str(options.epochs)]
    done = subprocess.run(
        program,
        env={**os.environ, **dict.fromkeys(names, threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(way: str, loop: int, epochs: int) -> dict[str, Any]:
    """Seconds of one way and the outcomes of its first models."""
    import torch

    from forebear import zoo
    from forebear.training import GroundTruth, half_subsets

    module = zoo.get("digits")
    images, recipe = module.load(), module.recipe(epochs=epochs)
    subsets = half_subsets(len(images.train), MODELS)
    executor, start = None, 0.0
    if way == "two Ray workers":
        from forebear.executors import results
        from forebear.executors.ray import Ray

        executor, clock = Ray(workers=2, threads=1), time.perf_counter()
        list(results(warm, ["a", "b"], "start", executor=executor))
        start = time.perf_counter() - clock
    if way == "loop":
        subsets = subsets[:loop]
    clock, processor = time.perf_counter(), time.process_time()
    if way == "loop":
        models = [recipe.train(images.train, subset, 1) for subset in subsets]
        inputs, labels = images.queries.batch(slice(None))
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none")
                for model in models
            ]
        outcomes = -torch.stack(losses)
    else:
        truth = GroundTruth.collect(
            recipe, images.train, images.queries,
            subsets=subsets, seeds=[1], full=False, executor=executor,
        )  # fmt: skip
        outcomes = truth.outcomes[0]
    seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    scale = MODELS / len(subsets)
    return {
        **{name: value * scale for name, value in seconds.items()},
        "start": start,
        "outcomes": outcomes[:loop].tolist(),
    }


def warm(piece: int) -> dict[str, Any]:
    """Something for each worker to import torch and forebear for."""
    import forebear.training  # noqa: F401

    time.sleep(1.0)
    return {}


def summary(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats, ratios within a repeat, and how far outcomes differ."""

    def ratio(name: str, one: str, other: str) -> float:
        pairs = zip(runs[one], runs[other], strict=True)
        return round(statistics.median(a[name] / b[name] for a, b in pairs), 2)

    def difference(one: str, other: str) -> float:
        rows = zip(runs[one][0]["outcomes"], runs[other][0]["outcomes"], strict=True)
        return max(abs(x - y) for a, b in rows for x, y in zip(a, b, strict=True))

    def median(name: str, way: str) -> float:
        return round(statistics.median(run[name] for run in runs[way]), 2)

    return {
        "models": MODELS,
        "epochs": options.epochs,
        "repeats": options.repeats,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average_after": os.getloadavg()[0],
        "loop_processor_over_stacked": ratio("processor", "loop", "stacked"),
        "one_process_clock_over_two_ray_workers": ratio("clock", "stacked", "two Ray workers"),
        "two_threads_clock_over_two_ray_workers": ratio(
            "clock", "stacked, two threads", "two Ray workers"
        ),
        "processor_seconds": {way: median("processor", way) for way in ("loop", "stacked")},
        "clock_seconds": {way: median("clock", way) for way in WAYS if way != "loop"},
        "ray_start_seconds": median("start", "two Ray workers"),
        "largest_difference_of_loop": difference("loop", "stacked"),
        "largest_difference_of_ray": difference("two Ray workers", "stacked"),
    }


if __name__ == "__main__":
    main()
