"""The models, data and clock that every benchmark shares.

Times are reported as multiples of one plain forward + backward pass over the same examples, taken
in the same process just before the work, so that numbers from two machines can be compared.
"""

import gzip
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
CLASSES = 10


def set_threads(count: int) -> None:
    """Use `count` threads in every library; call it first, it may restart the script.

    Idle OpenMP threads spin. That is right on a quiet machine; where other processes want the
    cores a plain pass is then up to twenty times slower and every ratio to it is wrong: set
    `OMP_WAIT_POLICY=passive` there. The variables are read only when torch is loaded, hence the
    restart with them set.
    """
    wanted = {
        "OMP_NUM_THREADS": str(count),
        "OPENBLAS_NUM_THREADS": str(count),
        "MKL_NUM_THREADS": str(count),
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    torch.set_num_threads(count)


def mlp() -> nn.Module:
    """784-512-256-10 with ReLU: 535,818 parameters."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


def convnet() -> nn.Module:
    """Two convolutions and two linear layers: 199,258 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1600, 112),
        nn.ReLU(),
        nn.Linear(112, CLASSES),
    )


EPOCHS = 5

MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A trained model, training examples, queries, and where the data came from."""

    name: str
    model: nn.Module
    train: TensorDataset
    queries: TensorDataset
    source: str


def workload(name: str, size: int, queries: int, *, seed: int = 0) -> Workload:
    """The model `name` trained for `EPOCHS` epochs on `size` examples."""
    train, source = images("train", size, flat=name == "mlp", seed=seed)
    asked, _ = images("t10k", queries, flat=name == "mlp", seed=seed + 1)
    torch.manual_seed(seed)
    model = MODELS[name]()
    train_briefly(model, train, seed=seed)
    return Workload(name=name, model=model, train=train, queries=asked, source=source)


def images(part: str, count: int, *, flat: bool, seed: int = 0) -> tuple[TensorDataset, str]:
    """The first `count` Fashion-MNIST images of `part` ("train", "t10k"), standardised.

    Gaussian noise of the same shape, with labels from a fixed random linear teacher, where the
    Debian package is absent. Returns the data and what they are.
    """
    shape = (784,) if flat else (1, 28, 28)
    if FASHION_MNIST.is_dir():
        pixels = _idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz", count, header=16, item=784)
        labels = _idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz", count, header=8, item=1)
        values = torch.from_numpy(pixels).float().div_(255).sub_(0.286).div_(0.353)
        targets = torch.from_numpy(labels).long()
        return TensorDataset(values.view(-1, *shape), targets.view(-1)), "Fashion-MNIST"
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 784, generator=generator)
    teacher = torch.randn(784, CLASSES, generator=torch.Generator().manual_seed(12345))
    return TensorDataset(values.view(-1, *shape), (values @ teacher).argmax(1)), "Gaussian noise"


def _idx(path: Path, count: int, *, header: int, item: int) -> np.ndarray:
    with gzip.open(path) as stream:
        stream.seek(header)
        content = stream.read(count * item)
    if len(content) < count * item:
        raise ValueError(f"{path} holds {len(content) // item} items, {count} were asked for")
    return np.frombuffer(content, dtype=np.uint8).reshape(count, item).copy()


def train_briefly(model: nn.Module, data: TensorDataset, *, seed: int = 0) -> None:
    """Five epochs of SGD with momentum, weight decay and a falling rate, batches of 64."""
    inputs, targets = data.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.eval()


def plain_pass(model: nn.Module, data: TensorDataset, batch_size: int = 512) -> float:
    """Seconds of one forward + backward pass over `data`, with all weight gradients."""
    inputs, targets = data.tensors
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = time.perf_counter()
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), parameters)
    return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over the repeats, and what the last repeat returned."""

    ratio: float
    seconds: float
    plain_seconds: float
    repeats: int
    result: Any


def median_ratio(
    work: Callable[[], Any],
    model: nn.Module,
    data: TensorDataset,
    *,
    repeats: int = 3,
    budget: float = float("inf"),
    batch_size: int = 512,
    passes: int = 1,
) -> Timing:
    """Time `work` against plain passes over `data`, interleaved so that both see the same load.

    Args:
        work: what is timed.
        model: the model of the plain pass; `work` must leave it trainable.
        data: the examples of the plain pass.
        repeats: how often; each repeat gives one ratio and the median is reported.
        budget: seconds after which no further repeat starts; the first always runs.
        batch_size: of the plain pass.
        passes: plain passes before and again after the work in each repeat; their median counts.
            One is enough for many repeats, more steady the ratio of a work that runs only once.
    """
    result = None
    plain_pass(model, data, batch_size)  # the first pass of a process also pays for allocation
    ratios, seconds, plains = [], [], []
    begin = time.perf_counter()
    while len(ratios) < repeats and (not ratios or time.perf_counter() - begin < budget):
        before = [plain_pass(model, data, batch_size) for _ in range(passes)]
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
        after = [plain_pass(model, data, batch_size) for _ in range(passes)] if passes > 1 else []
        plains.append(statistics.median(before + after))
        ratios.append(seconds[-1] / plains[-1])
    return Timing(
        ratio=statistics.median(ratios),
        seconds=statistics.median(seconds),
        plain_seconds=statistics.median(plains),
        repeats=len(ratios),
        result=result,
    )


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in 2²⁰ bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage also counts what the parent held when it started this process.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pack(work: Workload) -> dict[str, Any]:
    """A workload as tensors and strings, for `torch.save`."""
    return {
        "name": work.name,
        "source": work.source,
        "state": work.model.state_dict(),
        "train": work.train.tensors,
        "queries": work.queries.tensors,
    }


def unpack(content: dict[str, Any], size: int, queries: int) -> Workload:
    """The workload that `pack` took apart, with its first `size` examples and `queries` queries."""
    model = MODELS[content["name"]]()
    model.load_state_dict(content["state"])

    def first(tensors: tuple[Tensor, ...], count: int) -> TensorDataset:
        return TensorDataset(*(tensor[:count].clone() for tensor in tensors))

    return Workload(
        name=content["name"],
        model=model.eval(),
        train=first(content["train"], size),
        queries=first(content["queries"], queries),
        source=content["source"],
    )
