"""The same work by forebear and by kronfluence, captum, dattri and traker.

    python benchmarks/peers.py --size 1000 --queries 50 --threads 2 --out peers.json

One model, trained for one epoch, is given to all. Each (library, work) runs in a process of its
own, so that peaks of memory are separate and a failure stays alone; each times plain forward +
backward passes over the same examples in turn with the work. Scores are compared with forebear's,
query by query. Libraries that are not installed are reported as failed: see README.md.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from workloads import (
    MODELS,
    Workload,
    median_ratio,
    pack,
    peak_memory_mb,
    set_threads,
    unpack,
    workload,
)

DIMENSION = 2048
DAMPING = 0.1  # times the mean eigenvalue, of each layer or of the projected Gauss-Newton
BUDGET = 20.0  # seconds after which a work is not repeated
Scores = np.ndarray  # [query, train] or, for self-influence, [train]; positive = proponent
Work = Callable[[], Scores]


@dataclass(frozen=True)
class Case:
    """What one process has to do: `work` is a row of `PEERS`."""

    work: str
    load: Workload
    folder: Path

    def loader(self, data: TensorDataset, batch_size: int) -> DataLoader:
        return DataLoader(data, batch_size=min(batch_size, len(data)))


def forebear(case: Case, **options: Any) -> Work:
    import forebear as fb

    task = fb.Task(case.load.model, loss=fb.losses.cross_entropy)
    if case.work.startswith("ekfac"):
        targets = "empirical" if case.work == "ekfac_empirical" else "sampled"
        method = fb.get("ekfac", damping=DAMPING, targets=targets, **options)
    elif case.work == "trak":
        method = fb.get("trak", dimension=DIMENSION, damping=DAMPING, **options)
    else:
        method = fb.get("graddot")

    def work() -> Scores:
        fitted = method.fit(task, case.load.train)
        if case.work.endswith("self_influence"):
            return np.asarray(fitted.self_influence())
        return np.asarray(fitted.score(case.load.queries).values)

    return work


def forebear_reseeded(case: Case) -> Work:
    """Other sampled targets or another projection: how much chance alone changes the scores."""
    return forebear(case, seed=1)


def forebear_exact(case: Case) -> Work:
    """Without the low-rank form of the inverse: what that approximation changes."""
    return forebear(case, rank=None)


def captum(case: Case) -> Work:
    from captum.influence import TracInCP

    def already_loaded(model: nn.Module, checkpoint: Any) -> float:
        return 1.0  # the learning rate, with which the products are multiplied

    tracin = TracInCP(
        case.load.model,
        case.loader(case.load.train, 250),
        checkpoints=["last"],
        checkpoints_load_func=already_loaded,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        sample_wise_grads_per_batch=True,  # hooks; the other way is one backward pass an example
    )

    def work() -> Scores:
        if case.work == "self_influence":
            return tracin.self_influence().detach().numpy()
        queries = case.loader(case.load.queries, 250)
        return tracin.influence(queries).detach().numpy()

    return work


def kronfluence(case: Case) -> Work:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(
            self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            logits = model(batch[0])
            if sample:
                targets = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                return cross_entropy(logits, targets, reduction="sum")
            return cross_entropy(logits, batch[1], reduction="sum")

        def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
            # The loss, not minus the loss: the score is a product with the gradient of the
            # training loss, so that proponents of the query come out positive.
            return self.compute_train_loss(batch, model)

    task = Classification()
    model = prepare_model(copy.deepcopy(case.load.model), task)  # it freezes the parameters
    factors = FactorArguments(
        strategy="ekfac" if case.work.startswith("ekfac") else "identity",
        use_empirical_fisher=case.work == "ekfac_empirical",
    )
    arguments = ScoreArguments(damping_factor=None)  # None: 0.1 × mean eigenvalue, as DAMPING

    def work() -> Scores:
        analyzer = Analyzer(
            "peers", model, task, cpu=True, disable_tqdm=True, output_dir=str(case.folder)
        )
        analyzer.fit_all_factors(
            "factors",
            case.load.train,
            per_device_batch_size=250,
            factor_args=factors,
            overwrite_output_dir=True,
        )
        common = {"score_args": arguments, "overwrite_output_dir": True}
        if case.work.endswith("self_influence"):
            analyzer.compute_self_scores(
                "scores", "factors", case.load.train, per_device_train_batch_size=250, **common
            )
            return analyzer.load_self_scores("scores")["all_modules"].flatten().numpy()
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            case.load.queries,
            case.load.train,
            per_device_query_batch_size=min(250, len(case.load.queries)),
            per_device_train_batch_size=250,
            **common,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()

    return work


def dattri(case: Case) -> Work:
    from dattri.algorithm import IFAttributorEKFAC, TracInAttributor, TRAKAttributor
    from dattri.task import AttributionTask

    model = case.load.model
    output = mean_loss if case.work != "trak" else margin
    task = AttributionTask(
        loss_func=lambda parameters, data: output(model, parameters, data),
        model=model,
        checkpoints=copy.deepcopy(model.state_dict()),
    )
    # Query gradients are taken again for every batch of examples, so batches are large.
    train, queries = case.loader(case.load.train, 500), case.loader(case.load.queries, 250)
    if case.work == "trak":

        def probability(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
            return torch.exp(-mean_loss(model, parameters, data))

        damping = DAMPING * margin_energy(case.load) / DIMENSION

        def trak() -> Scores:
            attributor = TRAKAttributor(
                task,
                probability,
                projector_kwargs={"proj_dim": DIMENSION, "device": "cpu"},
                regularization=damping,
            )
            attributor.cache(case.loader(case.load.train, 1000))  # draws the matrix every batch
            return attributor.attribute(queries).T.detach().numpy()

        return trak
    if case.work == "ekfac_empirical":  # its Fisher is that of the loss, with the true labels
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise NotImplementedError("IFAttributorEKFAC handles linear layers only")

        def ekfac() -> Scores:
            attributor = IFAttributorEKFAC(task)
            attributor.cache(train)
            for eigenvalues in attributor.cached_lambdas.values():
                # `damping` is one absolute number for all layers; this is the same for each layer.
                eigenvalues += DAMPING * eigenvalues.mean()
            return attributor.attribute(train, queries).T.detach().numpy()

        return ekfac

    def graddot() -> Scores:
        attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
        # In 0.3.0 `projector_kwargs=None` means 512 dimensions; this means no projection.
        attributor.projector_kwargs = None
        if case.work == "self_influence":
            return attributor.self_attribute(train).detach().numpy()
        return attributor.attribute(train, queries).T.detach().numpy()

    return graddot


def traker(case: Case) -> Work:
    from trak import TRAKer

    state = copy.deepcopy(case.load.model.state_dict())
    damping = DAMPING * margin_energy(case.load)

    def work() -> Scores:
        with tempfile.TemporaryDirectory(dir=case.folder) as folder:
            trak = TRAKer(
                copy.deepcopy(case.load.model),
                task="image_classification",
                train_set_size=len(case.load.train),
                save_dir=folder,
                device="cpu",  # with it comes BasicProjector, which redraws its matrix every batch
                proj_dim=DIMENSION,
                use_half_precision=False,
                lambda_reg=damping,
                logging_level="ERROR",
            )
            trak.load_checkpoint(state, model_id=0)
            for batch in case.loader(case.load.train, 1000):
                trak.featurize(batch, num_samples=len(batch[0]))
            trak.finalize_features()
            trak.start_scoring_checkpoint("queries", state, 0, num_targets=len(case.load.queries))
            for batch in case.loader(case.load.queries, 1000):
                trak.score(batch, num_samples=len(batch[0]))
            return np.array(trak.finalize_scores("queries")).T

    return work


def mean_loss(model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch, or of one example without the batch axis."""
    logits, targets = _logits(model, parameters, data)
    return cross_entropy(logits, targets)


def margin(model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """TRAK's output function of one example, log(p / (1 − p))."""
    logits, targets = _logits(model, parameters, data)
    right = targets.unsqueeze(-1) == torch.arange(logits.shape[-1])
    others = logits.masked_fill(right, -torch.inf).logsumexp(-1)
    return (logits.masked_fill(~right, 0).sum(-1) - others).sum()


def _logits(
    model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    inputs, targets = data
    if targets.ndim == 0:
        inputs, targets = inputs.unsqueeze(0), targets.unsqueeze(0)
    return functional_call(model, parameters, inputs), targets


def margin_energy(load: Workload) -> float:
    """Sum over the training examples of ‖∇margin‖², divided by the number of parameters.

    Both TRAK libraries divide gradients by √(number of parameters). traker projects with entries
    of unit variance, so this is the mean eigenvalue of its projected Gauss-Newton matrix; dattri
    also divides by √dimension, which makes the eigenvalues `DIMENSION` times smaller.
    """
    parameters = {name: value.detach() for name, value in load.model.named_parameters()}
    gradient = vmap(grad(lambda p, x, y: margin(load.model, p, (x, y))), in_dims=(None, 0, 0))
    total = 0.0
    for x, y in DataLoader(load.train, batch_size=100):
        total += sum(float(g.square().sum()) for g in gradient(parameters, x, y).values())
    return total / sum(p.numel() for p in parameters.values())


# Which libraries do a work, in the order of the table.
PEERS: dict[str, tuple[Callable[..., Work], ...]] = {
    "graddot": (forebear, captum, kronfluence, dattri),
    "self_influence": (forebear, captum, kronfluence, dattri),
    "ekfac": (forebear, forebear_reseeded, kronfluence),
    "ekfac_empirical": (forebear, forebear_exact, kronfluence, dattri),
    "ekfac_self_influence": (forebear, kronfluence),
    "trak": (forebear, forebear_reseeded, dattri, traker),
}

# The most (examples, queries) a library is given, so that one run of a work stays near a minute
# and its memory within a few GB. forebear is then timed at that size too.
CAPS: dict[tuple[str, str], tuple[int, int]] = {
    ("kronfluence", "ekfac"): (4000, 200),
    ("kronfluence", "ekfac_empirical"): (4000, 200),
    ("kronfluence", "ekfac_self_influence"): (4000, 200),
    ("dattri", "graddot"): (1000, 50),
    ("dattri", "self_influence"): (1000, 50),
    ("dattri", "ekfac_empirical"): (1000, 50),
    ("dattri", "trak"): (1000, 50),
    ("traker", "trak"): (2000, 100),
}


@dataclass(frozen=True)
class Job:
    """One process: a library, a work and the sizes it is given."""

    library: str
    work: str
    size: int
    queries: int

    @property
    def stem(self) -> str:
        return f"{self.library}-{self.work}-{self.size}x{self.queries}"


def jobs(works: list[str], libraries: list[str], size: int, queries: int) -> Iterator[Job]:
    """All jobs, forebear's before those that are compared with it."""
    for work in works:
        wanted = [peer.__name__ for peer in PEERS[work] if peer.__name__ in libraries]
        planned = []
        for library in wanted:
            most = CAPS.get((library, work), (size, queries))
            planned.append(Job(library, work, min(size, most[0]), min(queries, most[1])))
        for job in planned:
            reference = Job("forebear", work, job.size, job.queries)
            if "forebear" in wanted and reference not in planned:
                planned.append(reference)
        yield from sorted(
            planned, key=lambda job: (-job.size, -job.queries, job.library != "forebear")
        )


def run_here(job: Job, folder: Path) -> None:
    """Do one job in this process; leaves `<stem>.json` and `<stem>.npy` in `folder`."""
    content = torch.load(folder / "workload.pt", weights_only=True)
    load = unpack(content, job.size, job.queries)
    del content
    peer = next(p for p in PEERS[job.work] if p.__name__ == job.library)
    work = peer(Case(job.work, load, folder))
    at_start = peak_memory_mb()
    clock = copy.deepcopy(load.model)  # a library may freeze or wrap the one it was given
    timing = median_ratio(work, clock, load.train, budget=BUDGET, passes=5)
    scores = timing.result
    shape = (job.size,) if job.work.endswith("self_influence") else (job.queries, job.size)
    if scores.shape != shape:
        raise ValueError(f"scores have shape {scores.shape}, expected {shape}")
    np.save(folder / f"{job.stem}.npy", scores)
    measured = {
        "ratio": timing.ratio,
        "seconds": timing.seconds,
        "plain_seconds": timing.plain_seconds,
        "repeats": timing.repeats,
        "peak_mb": peak_memory_mb(),
        "peak_mb_before_the_work": at_start,
    }
    (folder / f"{job.stem}.json").write_text(json.dumps(measured))


def run_apart(job: Job, folder: Path, threads: int, limit: float) -> dict[str, Any]:
    """Do one job in a process of its own; what it measured, or why it failed."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", str(folder)]
    command += [job.library, job.work, str(job.size), str(job.queries)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"failed": last[:160]}
    return json.loads((folder / f"{job.stem}.json").read_text())


def agreement(folder: Path, job: Job) -> dict[str, float]:
    """Correlations with forebear's scores, per query, averaged over the queries."""
    reference = folder / f"{Job('forebear', job.work, job.size, job.queries).stem}.npy"
    mine = folder / f"{job.stem}.npy"
    if job.library == "forebear" or not reference.exists() or not mine.exists():
        return {}
    pairs = list(zip(np.atleast_2d(np.load(reference)), np.atleast_2d(np.load(mine)), strict=True))
    pearson = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    spearman = [np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in pairs]
    return {"spearman": float(np.mean(spearman)), "pearson": float(np.mean(pearson))}


def describe(job: Job, row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{job.work:21} {job.library:18} {f'{job.size:,} × {job.queries}':>13}"
    if "failed" in row:
        return f"{head}  failed: {row['failed']}"
    line = f"{head} {row['ratio']:10.2f} {row['seconds']:9.3f} {row['peak_mb']:8.0f}"
    if "to_forebear" in row:
        line += f" {row['to_forebear']:10.1f}"
    if "spearman" in row:
        line += f" {row['spearman']:9.4f} {row['pearson']:8.4f}"
    return line


def circumstances(threads: int, load: Workload) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "numpy", "forebear", "captum", "kronfluence", "dattri", "traker")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "model": load.name,
        "data": load.source,
        "threads": threads,
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average_at_start": os.getloadavg()[0],
    }


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All jobs one after the other, each printed as soon as it is done."""
    load = workload(arguments.model, arguments.size, arguments.queries)
    torch.save(pack(load), folder / "workload.pt")
    about = circumstances(arguments.threads, load)
    print(f"{load.name} on {load.source}, {arguments.threads} threads, {about['versions']}")
    print(
        f"{'work':21} {'library':18} {'sizes':>13} {'× a pass':>10} {'seconds':>9} {'peak MB':>8} "
        f"{'× forebear':>10} {'Spearman':>9} {'Pearson':>8}"
    )
    rows: list[dict[str, Any]] = []
    ours: dict[tuple[str, int, int], float] = {}
    for job in jobs(arguments.works, arguments.libraries, arguments.size, arguments.queries):
        row = run_apart(job, folder, arguments.threads, arguments.limit) | agreement(folder, job)
        key = (job.work, job.size, job.queries)
        if job.library == "forebear" and "ratio" in row:
            ours[key] = row["ratio"]
        elif key in ours and "ratio" in row:
            row["to_forebear"] = row["ratio"] / ours[key]
        print(describe(job, row), flush=True)
        rows.append(vars(job) | row)
    return {**about, "load_average_at_end": os.getloadavg()[0], "rows": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    libraries = list(dict.fromkeys(peer.__name__ for peers in PEERS.values() for peer in peers))
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--size", type=int, default=1000, help="training examples")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--works", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--libraries", nargs="+", choices=libraries, default=libraries)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process")
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    parser.add_argument("--scores", type=Path, help="folder in which to keep all score matrices")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    set_threads(arguments.threads)
    if arguments.child:
        folder, library, work, size, queries = arguments.child
        run_here(Job(library, work, int(size), int(queries)), Path(folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.scores or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = compare(arguments, folder)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
