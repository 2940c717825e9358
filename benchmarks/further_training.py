"""How much faster are runs of further training stacked than one at a time?

    python benchmarks/further_training.py --out benchmarks/further_training.json

101 runs (one on everything, 100 without an example) of a small network for some epochs: stacked,
and by a plain loop over one model each with the same batches and the same update, one after the
other in the same process. With one thread seconds are those of the processor, with more those of
the clock, for threads that wait for each other are part of the price; set OMP_WAIT_POLICY=passive
unless the machine is idle. Ratios are medians over the repeats.
Both ways give the same numbers; the largest difference between final measurements is reported.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from workloads import set_threads

RUNS = 101
QUERIES = 77


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--epochs", type=int, nargs="*", default=[1, 10])
    arguments.add_argument("--scheme", nargs="*", default=["every", "shift"])
    arguments.add_argument("--model", nargs="*", default=["energy", "small", "digits"])
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    set_threads(options.threads)
    rows = []
    for name in options.model:
        for double in (False, True):
            for scheme in options.scheme:
                for epochs in options.epochs:
                    rows.append(compared(name, double, scheme, epochs, options.repeats))
                    print(rows[-1], flush=True)
    report = {
        "runs": RUNS,
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": platform.machine(),
        "load_average_after": os.getloadavg()[0],
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def compared(name: str, double: bool, scheme: str, epochs: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways and their ratio."""
    import torch

    from forebear import Data, Task, losses
    from forebear.training import FurtherTraining
    from forebear.training.continuation import Continuation

    model, data, batch_size = problem(name, torch.float64 if double else torch.float32)
    loss = losses.squared_error if name != "digits" else losses.cross_entropy
    settings = FurtherTraining(
        learning_rate=0.03, batch_size=batch_size, amounts=(epochs,), scheme=scheme, double=double
    )
    nothing = torch.empty(0, dtype=torch.long)
    removals = settings.removals(len(data[0]), [nothing, *torch.arange(RUNS - 1)[:, None]])
    runs = Continuation(settings, Task(model, loss), Data.of(data), removals)

    def stacked() -> Any:
        found = []
        for part in runs.parts():
            for models in runs.follow(part, 0, (epochs,)):
                found.append(models.evaluate(loss, Data.of((data[0][:QUERIES], data[1][:QUERIES]))))
        return torch.cat(found)

    def single() -> Any:
        return torch.stack(
            [loop(model, data, batch_size, scheme, epochs, run - 1) for run in range(RUNS)]
        )

    ratios, seconds = [], []
    difference = float((stacked() - single()).abs().max())
    for _ in range(repeats):
        plain, together = timed(single), timed(stacked)
        ratios.append(plain / together)
        seconds.append((plain, together))
    return {
        "model": name,
        "dtype": "float64" if double else "float32",
        "scheme": scheme,
        "epochs": epochs,
        "times_faster": round(statistics.median(ratios), 2),
        "one_at_a_time_seconds": round(statistics.median(s for s, _ in seconds), 3),
        "stacked_seconds": round(statistics.median(s for _, s in seconds), 3),
        "difference": difference,
    }


def loop(model: Any, data: Any, batch_size: int, scheme: str, epochs: int, left: int) -> Any:
    """Losses of the first examples when one model is trained on without example `left`."""
    import copy

    import torch

    from forebear.training import schedule

    (x, y), n = data, len(data[0])
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    keep = torch.ones(n, dtype=torch.bool)
    if scheme == "shift" and left >= 0:
        keep[left] = False
    for order in schedule.epoch_orders(n, epochs, 0):
        for rows in schedule.epoch_batches(order, keep, batch_size):
            loss = each_loss(model, x[rows], y[rows]).mean()
            if scheme == "every" and left >= 0:
                loss = loss - each_loss(model, x[left : left + 1], y[left : left + 1])[0] / n
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return each_loss(model, x[:QUERIES], y[:QUERIES])


def each_loss(model: Any, x: Any, y: Any) -> Any:
    from torch.nn.functional import cross_entropy

    outputs = model(x)
    if y.is_floating_point():
        return 0.5 * (outputs - y).square().sum(1)
    return cross_entropy(outputs, y, reduction="none")


def problem(name: str, dtype: Any) -> tuple[Any, Any, int]:
    """A network, data and the batch size.

    "energy": 8-128-128-1 with ReLU, 691 examples, batches of 128. "small": 8-32-32-1, the same
    data. "digits": 64-24-24-10 with Tanh on scikit-learn's digits, batches of 64.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        data = (torch.as_tensor(x / 16 - 0.5).to(dtype), torch.as_tensor(y))
        widths, activation = (64, 24, 24, 10), nn.Tanh
    else:
        data = (torch.randn(691, 8).to(dtype), torch.randn(691, 1).to(dtype))
        width = 128 if name == "energy" else 32
        widths, activation = (8, width, width, 1), nn.ReLU
    layers: list[Any] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval(), data, 64 if name == "digits" else 128


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the processor for one thread, where the clock would measure others too."""
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


if __name__ == "__main__":
    main()
