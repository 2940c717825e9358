"""AbU's two modes: what they cost in plain passes, and how alike they rank.

`python benchmarks/abu.py` writes `abu.json` beside itself. A network that says the noise in digits
of 8 × 8 pixels is trained on 500 of them; scores are those of 16 others. A plain pass is a forward
and a backward pass of the loss, 10 levels of noise, over the training set; all times are processor
time of one thread, medians of three.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr

import forebear as fb
from forebear.zoo import digits_diffusion

TRAIN, QUERIES, EPOCHS = 500, 16, 200
CHANGES = (1e-4, 1e-3, 3e-3, 1e-2)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Processor time, median."""
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found)


def measure(kind: digits_diffusion.Kind) -> dict[str, Any]:
    """One network."""
    found = digits_diffusion.load(train=TRAIN, queries=QUERIES)
    model = digits_diffusion.recipe(kind, epochs=EPOCHS).train(found.train)
    task = fb.Task(model, digits_diffusion.loss(kind))

    def plain() -> None:
        for _, batch in found.train.batches(512):
            model.zero_grad()
            task.losses(model, batch).sum().backward()

    plain()
    once, about = seconds(plain), {}
    for curvature in ("ekfac", "diagonal"):
        fit = fb.AbU(curvature=curvature).fit(task, found.train)
        linear = fit.score(found.queries).values

        def again(fit: Any = fit, **options: Any) -> Any:
            fit._kept.clear()
            other = fit.on(None)
            other.method = dataclasses.replace(fit.method, **options)
            return other.score(found.queries).values

        costs = {
            "fit": seconds(lambda c=curvature: fb.AbU(curvature=c).fit(task, found.train)) / once,
            "gradients of queries": seconds(lambda f=fit: f._query().gradients(found.queries))
            / once,
            "linear": seconds(again) / once,
            "step": seconds(lambda f=again: f(mode="step")) / once,
        }
        agreement = {}
        for change in CHANGES:
            step = again(mode="step", change=change)
            ranks = [spearmanr(a, b).statistic for a, b in zip(step, linear, strict=True)]
            agreement[str(change)] = sum(ranks) / len(ranks)
        about[curvature] = {"passes": costs, "spearman of step and linear": agreement}
    return {"plain pass, seconds": once, **about}


def main() -> None:
    """Measure both networks."""
    torch.set_num_threads(1)
    facts = {"training images": TRAIN, "queries": QUERIES, "query_draws": 4096}
    found = {kind: measure(kind) for kind in ("epsilon", "x0")}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
