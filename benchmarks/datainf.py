"""DataInf by Gram matrices against its published loop, on a small regression network.

Scores of 77 queries × 691 training examples for an MLP 8-128-128-1, the sizes of the UCI Energy
set. The loop form is the formula as it is published: for each training example k, the vectors of
each layer, one after the other; once with a query at a time, and once with all queries together,
which is the best a loop over k can do. Its gradients are written out beforehand and not timed; the
time of forebear includes them, with the check of the layers and everything else.

    python benchmarks/datainf.py --out datainf.json
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import DataInf


def energy_sized(train: int, queries: int) -> tuple[fb.Task, tuple, tuple]:
    """A network trained a little on noise with a trend."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    x = torch.randn(train + queries, 8)
    y = (x @ torch.randn(8)).sin() + 0.1 * torch.randn(train + queries)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        fb.losses.squared_error(model, (x[:train], y[:train])).mean().backward()
        optimizer.step()
    task = fb.Task(model.eval(), fb.losses.squared_error)
    return task, (x[:train], y[:train]), (x[train:], y[train:])


def written_out(task: fb.Task, batch: tuple) -> list[Tensor]:
    """Gradients `[b, P_l]` of each layer with its bias, by vmap."""
    parameters = {name: p.detach() for name, p in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(task.model, parameters, (x[None],))
        return 0.5 * (output[0, 0] - y).square()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, *batch)
    return [
        torch.cat([grads[f"{layer}.weight"].flatten(1), grads[f"{layer}.bias"]], 1)
        for layer in (0, 2, 4)
    ]


def published(queries: list[Tensor], train: list[Tensor], factor: float = 0.1) -> Tensor:
    """The loop over queries, layers and training examples k."""
    scores = torch.zeros(len(queries[0]), len(train[0]))
    for q in range(len(queries[0])):
        for of_queries, of_train in zip(queries, train, strict=True):
            damping = factor * of_train.square().mean()
            v = of_queries[q]
            total = torch.zeros_like(v)
            for g in of_train:
                total += (v - (g @ v) / (damping + g @ g) * g) / (len(of_train) * damping)
            scores[q] += of_train @ total
    return scores / len(train[0])


def all_queries(queries: list[Tensor], train: list[Tensor], factor: float = 0.1) -> Tensor:
    """The same loop over layers and training examples k, with all queries together."""
    scores = torch.zeros(len(queries[0]), len(train[0]))
    for v, of_train in zip(queries, train, strict=True):
        damping = factor * of_train.square().mean()
        total = torch.zeros_like(v)
        for g in of_train:
            total += v - torch.outer((v @ g) / (damping + g @ g), g)
        scores += total @ of_train.T / (len(of_train) * damping)
    return scores / len(train[0])


def median_time(work: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=691)
    parser.add_argument("--queries", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task, train, queries = energy_sized(arguments.train, arguments.queries)
    method = fb.Influence(name="datainf", curvature=DataInf(), damping=0.1, units="removal")

    def ours() -> Tensor:
        return method.fit(task, train).score(queries).values

    of_queries, of_train = written_out(task, queries), written_out(task, train)
    theirs = published(of_queries, of_train)
    scores = ours()
    by_gram = median_time(ours, 5)
    by_loop = median_time(lambda: published(of_queries, of_train), 3)
    by_batches = median_time(lambda: all_queries(of_queries, of_train), 3)
    found = {
        "train": arguments.train,
        "queries": arguments.queries,
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "seconds_gram": by_gram,
        "seconds_loop": by_loop,
        "seconds_loop_all_queries": by_batches,
        "ratio": by_gram / by_loop,
        "ratio_all_queries": by_gram / by_batches,
        "relative_difference": ((scores - theirs).norm() / theirs.norm()).item(),
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
