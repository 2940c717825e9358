"""Gradient methods for diffusion on scikit-learn's digits: scores against retraining, by ridge.

`python benchmarks/diffusion_gradients.py` writes `diffusion_gradients.json` beside itself. A small
network learns 1,000 digits, and 16 others 500 of them each, with half as many steps as the half
subsets of a full study. LDS on 100 images that were held out and 100 generated ones, with ridges
that are multiples of the mean eigenvalue that is not zero: 1 is the rule, the best of them a look
at the answer. About two minutes of one processor.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import forebear as fb
from forebear.curvature import Dense
from forebear.methods.diffusion_gradients import ridge_sweep
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.sampling import Guided
from forebear.zoo import digits_diffusion
from forebear.zoo.pictures import half_subsets

QUERIES, SUBSETS, EPOCHS = 100, 16, 200
FACTORS = (0.01, 0.1, 1.0, 10.0)
LEVELS = tuple(range(50, 1000, 100))
SAMPLER = digits_diffusion.sampler()
METHODS = {
    "trak": fb.DTRAK(function="loss"),
    "dtrak": fb.DTRAK(),
    "dtrak, points='unit'": fb.DTRAK(points="unit"),
    "das, form='linear'": fb.DAS(form="linear"),
    "das": fb.DAS(),
    "das, points='mean'": fb.DAS(points="mean"),
    "journey_trak": fb.JourneyTRAK(sampler=SAMPLER),
    "journey_trak, function='square_norm'": fb.JourneyTRAK(sampler=SAMPLER, function="square_norm"),
}


class Truth:
    """A trained network, its queries, and what networks of half the images say of them."""

    def __init__(self) -> None:
        data = digits_diffusion.load(queries=QUERIES)
        self.train: Any = data.train.dataset
        recipe = digits_diffusion.recipe()
        self.model = recipe.train(self.train, seed=0)
        judge = Denoising(levels=tuple(range(10, 1000, 20)), draws=2, seed=77)
        keys = torch.arange(QUERIES) + 5000
        start = SAMPLER.start(judge, keys, data.shape)
        made = SAMPLER.sample(Guided(self.model, judge), start, keys)
        held_out = torch.as_tensor(data.queries.batch(slice(None))["image"])
        self.queries = {
            "held out": images(held_out, keys=keys - 1000),
            "generated": images(made, keys=keys),
        }
        self.subsets = half_subsets(len(data.train), SUBSETS)
        several = recipe.with_settings(epochs=EPOCHS).train_many(self.train, self.subsets, 1)
        self.outcomes = {
            kind: several.evaluate(lambda model, batch: -judge(model, batch), some).detach()
            for kind, some in self.queries.items()
        }
        self.task = fb.Task(self.model, Denoising(levels=LEVELS, noise="shared"))

    def lds(self, kind: str, scores: Any) -> float:
        """Mean over queries."""
        values = fb.metrics.lds(scores, self.subsets, self.outcomes[kind])
        return round(float(np.mean(values)), 3)


def swept(truth: Truth, method: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LDS by kind of query and ridge, and the scores of the rule."""
    before = time.process_time()
    fitted = method.fit(truth.task, truth.train)
    found: dict[str, Any] = {"fit_seconds": round(time.process_time() - before, 1)}
    ruled = {}
    for kind, queries in truth.queries.items():
        if method.name == "journey_trak" and kind == "held out":
            continue
        ridges = [fb.NonzeroRelative(factor) for factor in FACTORS]
        each = list(ridge_sweep(fitted, queries, ridges))
        found[kind] = {str(f): truth.lds(kind, s) for f, s in zip(FACTORS, each, strict=True)}
        ruled[kind] = each[FACTORS.index(1.0)]
    return found, ruled


def dual_against_primal(truth: Truth) -> float:
    """Largest difference of the two forms' scores over the largest score, 2,048 dimensions."""
    dual = fb.DTRAK(dimension=2048).fit(truth.task, truth.train)
    primal = fb.Influence(
        gradient="square_norm",
        projection=dual.method.projection,
        curvature=Dense(kind="fisher"),
        damping=fb.NonzeroRelative(1.0),
    ).fit(truth.task, truth.train)
    one, other = (fitted.score(truth.queries["held out"]).values for fitted in (dual, primal))
    return ((one - other).abs().max() / other.abs().max()).item()


def together(truth: Truth, rules: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """LDS of `das` and `dtrak` combined, by the rule's ridge."""
    about = fb.Random().fit(truth.task, truth.train).score(truth.queries["held out"])
    found: dict[str, Any] = {}
    for kind in truth.queries:
        members = [
            fb.Scores(
                values=rules[name][kind],
                query_ids=about.query_ids,
                train_ids=about.train_ids,
                provenance=about.provenance,
            )
            for name in ("das", "dtrak")
        ]
        found[kind] = {how: truth.lds(kind, fb.combine(members, how=how)) for how in ("z", "rank")}
    return found


def main() -> None:
    """Measure and write."""
    before = time.process_time()
    truth = Truth()
    found: dict[str, Any] = {"training_seconds": round(time.process_time() - before, 1)}
    for name in ("graddot", "gradcos", "similarity"):
        fitted = fb.get(name).fit(truth.task, truth.train)
        found[name] = {k: truth.lds(k, fitted.score(q)) for k, q in truth.queries.items()}
    pixels = truth.train["image"].flatten(1)
    found["minus pixel distance"] = {
        kind: truth.lds(kind, -torch.cdist(queries["image"].flatten(1), pixels).square())
        for kind, queries in truth.queries.items()
    }
    rules = {}
    for name, method in METHODS.items():
        found[name], rules[name] = swept(truth, method)
        print(name, found[name], flush=True)
    found["das and dtrak combined"] = together(truth, rules)
    found["dual against primal"] = dual_against_primal(truth)
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
