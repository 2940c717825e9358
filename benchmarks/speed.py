"""How many plain forward + backward passes does each method take?

    python benchmarks/speed.py --model mlp --size 10000 --queries 500 --out benchmarks/mlp.json

Every work is timed between plain passes over the same examples in the same process; ratios are
medians over the repeats. Agreement is the Spearman correlation with the reference named in the
row, mean over the first queries.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads import MODELS, median_ratio, peak_memory_mb, set_threads, workload

AGREEMENT_QUERIES = 50


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", choices=MODELS, default="mlp")
    arguments.add_argument("--size", type=int, default=10_000)
    arguments.add_argument("--queries", type=int, default=500)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", nargs="*", help="names of works")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    set_threads(options.threads)
    rows = run(options)
    report = {
        "model": options.model,
        "train": options.size,
        "queries": options.queries,
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": platform.machine(),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    import forebear as fb

    made = workload(options.model, options.size, options.queries)
    model, train, queries = made.model, made.train, made.queries
    task = fb.Task(model, fb.losses.cross_entropy)
    few = torch.utils.data.TensorDataset(*(t[:AGREEMENT_QUERIES] for t in queries.tensors))
    before = peak_memory_mb()

    def pairs(method: Any) -> Callable[[], Any]:
        return lambda: method.fit(task, train).score(queries).values

    def own(method: Any) -> Callable[[], Any]:
        return lambda: method.fit(task, train).self_influence()

    references = {
        "graddot": lambda: fb.GradDot().fit(task, train).score(few).values,
        "trak 2048": lambda: fb.TRAK(dimension=2048).fit(task, train).score(few).values,
        "exact ekfac": lambda: fb.EKFAC(rank=None).fit(task, train).score(few).values,
    }
    works: list[tuple[str, Callable[[], Any], str | None]] = [
        ("graddot", pairs(fb.GradDot()), None),
        ("graddot bfloat16", pairs(fb.GradDot(precision="bfloat16")), "graddot"),
        ("self-influence", own(fb.GradDot()), None),
        ("ekfac fit", lambda: fb.EKFAC().fit(task, train), None),
        ("ekfac", pairs(fb.EKFAC()), "exact ekfac"),
        ("ekfac bfloat16", pairs(fb.EKFAC(precision="bfloat16")), "exact ekfac"),
        ("ekfac self-influence", own(fb.EKFAC()), None),
        ("trak 2048", pairs(fb.TRAK(dimension=2048)), None),
        ("trak 2048 bfloat16", pairs(fb.TRAK(dimension=2048, precision="bfloat16")), "trak 2048"),
    ]
    rows = []
    for name, work, reference in works:
        if options.only and name not in options.only:
            continue
        timing = median_ratio(work, model, train, repeats=options.repeats)
        row: dict[str, Any] = {
            "work": name,
            "passes": round(timing.ratio, 3),
            "plain_pass_seconds": round(timing.plain_seconds, 4),
            "peak_memory_mb": round(peak_memory_mb()),
            "memory_before_mb": round(before),
        }
        rows.append(row)
        result = timing.result
        if reference:
            row["spearman_with"] = reference
            row["spearman"] = round(
                spearman(references[reference](), result[:AGREEMENT_QUERIES]), 5
            )
        print(row, flush=True)
    return rows


def spearman(a: Any, b: Any) -> float:
    from scipy.stats import spearmanr

    pairs = zip(a.numpy(), b.numpy(), strict=True)
    return float(sum(spearmanr(x, y).statistic for x, y in pairs) / len(a))


if __name__ == "__main__":
    main()
