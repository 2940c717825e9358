"""The race of iterative solvers on one small classifier: error of inverse products, and of scores.

`python benchmarks/solvers.py` writes `solvers.json` beside itself: for each solver and damping the
relative error of `(C + λI)⁻¹ v` (Frobenius norm over all queries), the rank correlation of its
scores with exact ones (mean over queries), and seconds; C is the Gauss-Newton matrix.
"""

import json
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Absolute, ConjugateGradients, Dense, Kronecker, LiSSA
from forebear.curvature.conjugate_gradients import conjugate_gradients
from forebear.curvature.operator import curvature_operator, power_iteration
from forebear.curvature.solved import flat
from forebear.data import Data
from forebear.plan import make_plan
from forebear.stream import Stream

EXAMPLES, QUERIES = 1000, 30
DAMPINGS = (1e-3, 1e-2)
SEEDS = (0, 1, 2)


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1000 training digits, one in ten relabelled, and 30 others."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(images))
    x = torch.tensor(images[order] / 16 - 0.5)
    y = torch.tensor(labels[order])
    wrong = torch.tensor(random.choice(EXAMPLES, EXAMPLES // 10, replace=False))
    y[wrong] = torch.tensor(random.integers(0, 10, len(wrong)))
    last = slice(EXAMPLES, EXAMPLES + QUERIES)
    return (x[:EXAMPLES], y[:EXAMPLES]), (x[last], y[last])


def trained(train: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """64-16-16-10 with GELU by full-batch Adam, weight decay 1e-3 in the loss, in float64."""
    torch.manual_seed(seed)
    sizes = (64, 16, 16, 10)
    layers: list[nn.Module] = []
    for i, (one, two) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(one, two)] + ([nn.GELU()] if i < 2 else [])
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(train[0]), train[1])
        loss = loss + 5e-4 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
    return model.eval()


def solvers() -> dict[str, Any]:
    """Configurations by the name in the table."""
    return {
        "CG 10": ConjugateGradients(iterations=10, tolerance=0.0),
        "CG 30": ConjugateGradients(iterations=30, tolerance=0.0),
        "CG 100": ConjugateGradients(iterations=100, tolerance=0.0),
        "CG + EK-FAC 10": ConjugateGradients(iterations=10, tolerance=0.0, preconditioner="ekfac"),
        "CG + EK-FAC 30": ConjugateGradients(iterations=30, tolerance=0.0, preconditioner="ekfac"),
        "Neumann 100": LiSSA(depth=100, tolerance=0.0),
        "Neumann 1000": LiSSA(depth=1000, tolerance=0.0),
        "Neumann 1000, batches of 128": LiSSA(depth=1000, batch=128),
        "Neumann + EK-FAC 10": LiSSA(depth=10, tolerance=0.0, preconditioner="ekfac"),
        "Neumann + EK-FAC 50": LiSSA(depth=50, tolerance=0.0, preconditioner="ekfac"),
        "Neumann + EK-FAC 200": LiSSA(depth=200, tolerance=0.0, preconditioner="ekfac"),
        "EK-FAC": Kronecker(rank=None),
    }


def race(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row for each solver and damping, and the iterations that CG needs to converge."""
    train, queries = digits(seed)
    task = fb.Task(trained(train, seed), fb.losses.cross_entropy)
    plan = make_plan(task, Data.of(train))
    stream = Stream(task, plan, Data.of(train))
    rows = written(Stream(task, plan, Data.of(queries)), task)
    examples = written(stream, task)
    operator = curvature_operator("gauss_newton", stream, task.losses)
    largest = power_iteration(operator, steps=100)
    exact = Dense(kind="gauss_newton").fit(stream, task.losses, Absolute(DAMPINGS[0]), seed)
    fits: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, solver in solvers().items():
        start = time.perf_counter()
        fits[name] = solver.fit(stream, task.losses, Absolute(DAMPINGS[0]), seed)
        seconds[name] = time.perf_counter() - start
    out, needed = [], []
    for damping in DAMPINGS:
        truth = exact.with_damping(Absolute(damping)).solve(rows)
        scores = truth @ examples.T
        for name in fits:
            fitted = fits[name].with_damping(Absolute(damping))
            start = time.perf_counter()
            found = fitted.solve(rows)
            solve_seconds = time.perf_counter() - start
            pairs = zip(found @ examples.T, scores, strict=True)
            out.append(
                {
                    "seed": seed,
                    "solver": name,
                    "damping": damping,
                    "condition": largest / damping + 1,
                    "error": ((found - truth).norm() / truth.norm()).item(),
                    "spearman": float(np.mean([spearmanr(a, b).statistic for a, b in pairs])),
                    "fit_seconds": seconds[name],
                    "solve_seconds": solve_seconds,
                    "details": fitted.details() if name != "EK-FAC" else {},
                }
            )
        row: dict[str, Any] = {"seed": seed, "damping": damping}
        for label, name in (("plain", "CG 10"), ("ekfac", "CG + EK-FAC 10")):
            system = fits[name].with_damping(Absolute(damping)).system
            found = conjugate_gradients(system, rows, tolerance=1e-5, iterations=2000)
            row[label] = found.iterations
        needed.append(row)
    return out, needed


def written(stream: Stream, task: fb.Task) -> Tensor:
    """Loss gradients `[n, P]`."""
    parts = [g for _, _, g in stream.gradients(task.losses, "gradients")]
    return torch.cat([row for part in parts for row in flat(part, stream.plan)])


def main() -> None:
    """Race, write, and print the table of means."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fb.errors.ForebearWarning)
    rows, needed = [], []
    for seed in SEEDS:
        one, other = race(seed)
        rows += one
        needed += other
    result = {
        "setting": {
            "network": "64-16-16-10 GELU, float64, Gauss-Newton of digits",
            "examples": EXAMPLES,
            "queries": QUERIES,
            "seeds": SEEDS,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "race": rows,
        "iterations_to_1e-5": needed,
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    for damping in DAMPINGS:
        print(f"damping {damping}")
        for name in solvers():
            some = [r for r in rows if r["solver"] == name and r["damping"] == damping]
            mean: Callable[[str], float] = lambda key, some=some: float(  # noqa: E731
                np.mean([r[key] for r in some])
            )
            print(
                f"  {name:30} error {mean('error'):9.2e}  spearman {mean('spearman'):.3f}"
                f"  fit {mean('fit_seconds'):.2f} s  solve {mean('solve_seconds'):.3f} s"
                f"  condition {mean('condition'):.0f}"
            )
    print(needed)


if __name__ == "__main__":
    main()
