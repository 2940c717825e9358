"""How many plain forward + backward passes does each method take?

    python benchmarks/speed.py --model mlp --size 10000 --queries 500 --out benchmarks/mlp.json

Every work is timed between plain passes over the same examples in the same process; ratios are
medians over the repeats. Agreement is the Spearman correlation with the reference named in the
row, mean over the first queries.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from workloads import MODELS, median_ratio, peak_memory_mb, set_threads, workload

AGREEMENT_QUERIES = 50


WORKS: dict[str, str | None] = {
    "graddot": None,
    "graddot bfloat16": "graddot",
    "self-influence": None,
    "ekfac fit": None,
    "ekfac": "exact ekfac",
    "ekfac bfloat16": "exact ekfac",
    "ekfac self-influence": None,
    "trak 2048": None,
    "trak 2048 bfloat16": "trak 2048",
}
"""What is timed, and what its scores are compared with."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", choices=MODELS, default="mlp")
    arguments.add_argument("--size", type=int, default=10_000)
    arguments.add_argument("--queries", type=int, default=500)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", nargs="*", choices=WORKS, default=list(WORKS))
    arguments.add_argument("--child", choices=WORKS, help=argparse.SUPPRESS)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    set_threads(options.threads)
    if options.child:
        print(json.dumps(run(options, options.child)))
        return
    rows = []
    for name in options.only:  # a process each, so that peaks of memory are its own
        command = [sys.executable, *sys.argv, "--child", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(answer.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    report = {
        "model": options.model,
        "train": options.size,
        "queries": options.queries,
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": platform.machine(),
        "load_average_after": os.getloadavg()[0],
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Time one work."""
    import torch

    import forebear as fb

    made = workload(options.model, options.size, options.queries)
    model, train, queries = made.model, made.train, made.queries
    task = fb.Task(model, fb.losses.cross_entropy)
    few = torch.utils.data.TensorDataset(*(t[:AGREEMENT_QUERIES] for t in queries.tensors))
    precision = "bfloat16" if name.endswith("bfloat16") else "float32"
    method = {
        "graddot": lambda: fb.GradDot(precision=precision),
        "self-influence": fb.GradDot,
        "ekfac": lambda: fb.EKFAC(precision=precision),
        "exact ekfac": lambda: fb.EKFAC(rank=None),
        "trak": lambda: fb.TRAK(dimension=2048, precision=precision),
    }

    def work() -> Any:
        fitted = method[name.split()[0]]().fit(task, train)
        if name.endswith("fit"):
            return fitted
        if name.endswith("self-influence"):
            return fitted.self_influence()
        return fitted.score(queries).values

    before = peak_memory_mb()
    timing = median_ratio(work, model, train, repeats=options.repeats)
    row: dict[str, Any] = {
        "work": name,
        "passes": round(timing.ratio, 3),
        "plain_pass_seconds": round(timing.plain_seconds, 4),
        "peak_memory_mb": round(peak_memory_mb()),
        "memory_before_mb": round(before),
    }
    reference = WORKS[name]
    if reference:
        precision = "float32"
        make = method.get(reference) or method[reference.split()[0]]
        expected = make().fit(task, train).score(few).values
        row["spearman_with"] = reference
        row["spearman"] = round(spearman(expected, timing.result[:AGREEMENT_QUERIES]), 5)
    return row


def spearman(a: Any, b: Any) -> float:
    from scipy.stats import spearmanr

    pairs = zip(a.numpy(), b.numpy(), strict=True)
    return float(sum(spearmanr(x, y).statistic for x, y in pairs) / len(a))


if __name__ == "__main__":
    main()
