"""How near do predictions of `forebear plan` come to what the commands then really take?

    python benchmarks/planning.py --out benchmarks/planning.json

For each workload the planner predicts every method from samples; then each command that it printed
is run, and its time, highest memory and bytes on disk are compared with the prediction. Real runs
come right after the prediction, so that both see the same load.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workloads import MODELS, set_threads, train_briefly, workload

SIZES = {
    "mlp": {"size": 10_000, "queries": 100},
    "convnet": {"size": 6_000, "queries": 50},
    "transformer": {"size": 4_000, "queries": 32},
    "digits": {"size": 1_500, "queries": 100},
}
"""Of each workload, so that most methods take 5 to 60 seconds."""

LENGTH = 64
"""Tokens of a sequence."""

BUDGET = "20m"
OPTIONS = {"trak": ["--option", "dimension=2048"]}
"""Without them the planner would try every dimension that fits, each of which takes its time."""

LONGEST = 240.0
"""Seconds; what is predicted to take longer is not run."""

FILE = """import sys
from pathlib import Path

import torch

sys.path.insert(0, {benchmarks!r})
import forebear as fb
from planning import architecture, task_of

made = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)


def task():
    model = architecture({name!r})
    model.load_state_dict(made["state"])
    return task_of({name!r}, model)


def train():
    return made["train"] if isinstance(made["train"], dict) else tuple(made["train"])


def queries():
    return made["queries"] if isinstance(made["queries"], dict) else tuple(made["queries"])
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--only", nargs="*", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--methods", nargs="*", help="those that the planner finds if left out")
    arguments.add_argument("--budget", default=BUDGET, help="given to the planner")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    set_threads(options.threads)
    report: dict[str, Any] = {"threads": options.threads, "budget": options.budget}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="forebear-planning-") as folder:
            report[name] = compare(name, Path(folder), options)
        report["load_average_after"] = os.getloadavg()[0]
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def compare(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predictions and real runs of one workload."""
    write(name, folder)
    rows: list[dict[str, Any]] = []
    sampling = 0.0
    for method in options.methods or known_methods():
        plan = planned(folder / f"{name}.py", method, options.budget)
        sampling += plan["sampling_seconds"]
        for offer in plan["offers"]:
            rows += compared(offer, folder)
    return {**SIZES[name], "sampling_seconds": round(sampling, 1), "rows": rows}


def known_methods() -> list[str]:
    command = [sys.executable, "-m", "forebear", "methods", "--json"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [row["name"] for row in json.loads(answer.stdout)]


def planned(file: Path, method: str, budget: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "forebear", "plan", file.name, "--budget", budget, "--json"]
    answer = subprocess.run(
        [*command, "--method", method, *OPTIONS.get(method, [])],
        cwd=file.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(answer.stdout)


def compared(offer: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """One line for the table; none for methods that cannot be used."""
    if offer["prediction"] is None:
        print(offer["kind"], offer["method"], offer["refused"] or offer["stopped"], flush=True)
        return []
    found = offer["prediction"]
    row: dict[str, Any] = {
        "what": f"{offer['kind']} {offer['method']}",
        "options": offer["options"],
        "sampled": found["sampled"],
        "predicted_seconds": round(found["seconds"]["value"], 2),
        "predicted_range": [found["seconds"]["low"], found["seconds"]["high"]],
    }
    if found["at_least"] or found["seconds"]["value"] > LONGEST:
        row["not_run"] = "predicted to take longer than this benchmark waits"
        print(row, flush=True)
        return [row]
    real = measured(offer["command"], folder)
    for what in ("seconds", "processor", "memory", "disk"):
        row[f"predicted_{what}"] = round(found[what]["value"], 2)
        row[f"real_{what}"] = round(real[what], 2)
        row[f"ratio_{what}"] = round(found[what]["value"] / max(real[what], 1e-9), 3)
    print(row, flush=True)
    return [row]


def measured(command: str, folder: Path) -> dict[str, float]:
    """Time, processor time, highest memory and bytes written of a command."""
    words = shlex.split(command)
    out = folder / words[words.index("--out") + 1]
    before = os.times()
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, stdout=subprocess.DEVNULL)
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, _peak(child.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{command} ended with code {child.returncode}")
    after = os.times()
    spent = after.children_user + after.children_system
    return {
        "seconds": seconds,
        "processor": spent - before.children_user - before.children_system,
        "memory": peak,
        "disk": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def _peak(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Transformer(nn.Module):
    """Four layers, 128 wide, as language models are: 1.0 M parameters."""

    def __init__(self, vocabulary: int = 1024, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """Attention and a small network, each after a normalisation."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        parts = self.qkv(self.before(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


def architecture(name: str) -> nn.Module:
    """The untrained model of a workload."""
    torch.manual_seed(0)
    if name == "transformer":
        return Transformer()
    if name == "digits":
        return nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    return MODELS[name]()


def task_of(name: str, model: nn.Module) -> Any:
    """The task of a workload."""
    import forebear as fb

    return fb.Task(model, fb.losses.causal_lm if name == "transformer" else fb.losses.cross_entropy)


def write(name: str, folder: Path) -> None:
    """The file of a task and what it loads."""
    size, queries = SIZES[name]["size"], SIZES[name]["queries"]
    model, train, asked = material(name, size, queries)
    path = folder / f"{name}.py"
    torch.save(
        {"state": model.state_dict(), "train": train, "queries": asked}, f"{folder}/{name}.pt"
    )
    path.write_text(FILE.format(name=name, benchmarks=str(Path(__file__).resolve().parent)))


def material(name: str, size: int, queries: int) -> tuple[nn.Module, Any, Any]:
    """A model, its training set and queries."""
    if name in MODELS:
        made = workload(name, size, queries)
        return made.model, list(made.train.tensors), list(made.queries.tensors)
    model = architecture(name)
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.data).float() / 16
        y = torch.from_numpy(digits.target).long()
        train_briefly(model, TensorDataset(x[:size], y[:size]))
        return model, [x[:size], y[:size]], [x[-queries:], y[-queries:]]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1024, (size + queries, LENGTH), generator=generator)
    return model, {"input_ids": tokens[:size]}, {"input_ids": tokens[size:]}


if __name__ == "__main__":
    main()
