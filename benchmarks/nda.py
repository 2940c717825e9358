"""NDA by groups of patches against the dense product and the direct convolution, and its memory.

`python benchmarks/nda.py` writes `nda.json` beside itself: seconds of processor time for the scores
of one query by each way and of many by groups, one thread, in turn, medians; how far they are apart
in float64; and the peak memory of a process that scores queries against 20,000 and 60,000 images.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forebear.methods.nda import NDA
from forebear.tasks.diffusion import images
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Discrete

SIDE, PATCH, LEVEL, FILL = 14, 7, 50, 10.0
KERNELS = 64
"""Query patches at a time, for the dense product and the convolution."""


def draw(count: int, seed: int) -> Tensor:
    """Smooth images from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    return F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").tanh()


def padded(query: Tensor, train: Tensor) -> tuple[Tensor, Tensor, float]:
    """The noisy query and what remains of training images, with a constant outside the frame."""
    signal, strength = Discrete.linear().at(LEVEL)
    noise = gaussian(torch.zeros(1).long(), tuple(query.shape[1:]), 0, LEVEL, 0, dtype=query.dtype)
    margin = (PATCH // 2,) * 4
    noisy = F.pad(signal * query + strength * noise, margin, value=FILL)
    return noisy, F.pad(signal * train, margin, value=FILL), strength


def by_product(query: Tensor, train: Tensor) -> Tensor:
    """All pairs of patches by one product with patches written out."""
    noisy, remaining, strength = padded(query, train)
    x = F.unfold(noisy, PATCH)[0].T
    y = F.unfold(remaining, PATCH).transpose(1, 2)
    norms = y.square().sum(-1).flatten()
    found = query.new_zeros(len(train))
    for part in x.split(KERNELS):
        logits = (part @ y.flatten(0, 1).T - 0.5 * norms) / strength**2
        found += logits.softmax(1).view(len(part), len(train), -1).sum((0, 2))
    return found


def by_convolution(query: Tensor, train: Tensor) -> Tensor:
    """Query patches as the kernels of a convolution over training images."""
    noisy, remaining, strength = padded(query, train)
    kernels = F.unfold(noisy, PATCH)[0].T.reshape(-1, query.shape[1], PATCH, PATCH)
    norms = F.conv2d(remaining.square(), torch.ones_like(kernels[:1]))
    found = query.new_zeros(len(train))
    for part in kernels.split(KERNELS):
        logits = (F.conv2d(remaining, part) - 0.5 * norms) / strength**2  # [n, u, h, w]
        weights = logits.transpose(0, 1).reshape(len(part), -1).softmax(1)
        found += weights.view(len(part), len(train), -1).sum((0, 2))
    return found


def by_groups(train: Tensor) -> Callable[[Tensor], Tensor]:
    fitted = NDA(patch=PATCH, timesteps=(LEVEL,), keep=None).fit(None, images(train))
    shared = torch.zeros(len(train)).long()
    return lambda queries: fitted.score({"image": queries, "key": shared[: len(queries)]}).values


def in_turn(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each work, one after the other, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return seconds


def speed(size: int, many: int, repeats: int) -> dict[str, Any]:
    """Times and agreement."""
    train, queries = draw(size, 1), draw(many, 2)
    groups = by_groups(train)
    ways: dict[str, Callable[[], Tensor]] = {
        "groups": lambda: groups(queries[:1])[0],
        "dense product": lambda: by_product(queries[:1], train),
        "direct convolution": lambda: by_convolution(queries[:1], train),
    }
    together = f"groups, {many} queries"
    seconds = in_turn({**ways, together: lambda: groups(queries)}, repeats)
    medians = {name: median(values) for name, values in seconds.items()}
    medians[f"{together}, each"] = medians.pop(together) / many
    double = train.double(), queries[:1].double()
    exact = by_product(double[1], double[0])
    return {
        "images": size,
        "seconds": medians,
        "times slower than groups": {
            name: medians[name] / medians["groups"] for name in ways if name != "groups"
        },
        "largest difference of scores in float64": {
            "groups": (by_groups(double[0])(double[1])[0] - exact).abs().max().item(),
            "direct convolution": (by_convolution(double[1], double[0]) - exact).abs().max().item(),
        },
        "largest difference of scores in float32": {
            name: (way().double() - exact).abs().max().item() for name, way in ways.items()
        },
    }


def memory(size: int, many: int) -> dict[str, Any]:
    """Peak memory and time of this process with so many images."""
    train, queries = images(draw(size, 1)), images(draw(many, 2))
    fitted = NDA(patch=PATCH, timesteps=(LEVEL,)).fit(None, train)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.process_time()
    fitted.top(queries, 10)
    return {
        "images": size,
        "queries": many,
        "seconds a query": (time.process_time() - start) / many,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "memory_before_mb": before,
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="*", default=[20_000, 60_000])
    parser.add_argument("--memory", type=int, help="measure the memory of this process alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(memory(arguments.memory, arguments.queries)))
        return
    found = {
        "side": SIDE,
        "patch": PATCH,
        "timestep": LEVEL,
        "threads": 1,
        "load_average": os.getloadavg()[0],
        "speed": speed(arguments.images, arguments.queries, arguments.repeats),
        "memory": [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--memory", str(size)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for size in arguments.sizes
        ],
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
