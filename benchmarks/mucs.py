"""MUCS on the digits: its cost in a stack and one by one, and what its settings do to ranks.

`python benchmarks/mucs.py` writes `mucs.json` beside itself: for images that an EDM network made of
scikit-learn's digits, processor seconds a query, steps, losses at the end, and rank correlations
between settings; one thread. The network is trained first, which takes some ten seconds.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import forebear as fb
from forebear.methods.mucs import fitted as stacking
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided
from forebear.zoo import digits_diffusion

RATE = 3e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "100 levels": {"levels": 100},
    "window 5": {"window": 5},
    "fresh noise": {"consistent": False},
    "no bound": {"clamp": False},
    "plain difference": {"ratio": False},
    "all layers": {"layers": ("*",)},
    "no retained batch": {"retain": False},
    "other seed": {"seed": 1},
}


def run(task: fb.Task, train: Any, queries: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Scores, and what they took."""
    method = fb.MUCS(**{"layers": ("hidden.*",), "learning_rate": RATE, **options})
    begun = time.process_time()
    fitted = method.fit(task, train)
    between = time.process_time()
    scores = fitted.score(queries)
    ended = time.process_time()
    told = scores.provenance.settings["unlearning"]
    count = len(queries["image"])
    return scores.values, {
        "fit_seconds": between - begun,
        "seconds_a_query": (ended - between) / count,
        "steps": told["steps"],
        "not_converged": told["converged"].count(False),
        "bound": fitted.null,
        "retained_loss": sum(told["retained"]) / count,
    }


def agreement(some: Tensor, others: Tensor) -> float:
    """Mean rank correlation over queries."""
    each = [np.asarray(spearmanr(a, b))[0] for a, b in zip(some, others, strict=True)]
    return float(np.mean(each))


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fb.errors.NumericalWarning)
    pictures, recipe = digits_diffusion.load(), digits_diffusion.recipe("x0")
    model = recipe.train(pictures.train)
    loss, sampler = digits_diffusion.loss("x0"), digits_diffusion.sampler("x0")
    keys = 20_000 + torch.arange(arguments.queries)
    start = sampler.start(loss, keys, pictures.shape)
    queries = images(sampler.sample(Guided(model, loss), start), keys=keys)
    task = fb.Task(model, loss)
    scores, found = {}, {}
    for name, options in VARIANTS.items():
        scores[name], found[name] = run(task, pictures.train, queries, **options)
        found[name]["rank_correlation"] = agreement(scores["default"], scores[name])
    stacking.TOGETHER = 1
    _, found["one by one"] = run(task, pictures.train, queries)
    told = {"threads": 1, "load_average": os.getloadavg()[0], "queries": arguments.queries}
    arguments.out.write_text(json.dumps({**told, **found}, indent=1) + "\n")
    print(json.dumps({**told, **found}, indent=1))


if __name__ == "__main__":
    main()
