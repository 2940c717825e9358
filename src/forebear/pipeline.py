"""Joining tasks, methods, ground truth and run folders."""

import importlib.util
import platform
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch

from forebear import methods, metrics
from forebear.data import Data, map_tensors
from forebear.errors import DataError, FormatError, MismatchError
from forebear.methods.fitted import Fitted, require_same_state, version
from forebear.methods.settings import method_of, settings_of
from forebear.run import (
    DatasetFacts,
    Interval,
    MethodResult,
    ModelFacts,
    Run,
    TruthFacts,
    scores_folder,
    self_influence_path,
    top_path,
)
from forebear.stream import BATCH
from forebear.task import Task
from forebear.training import GroundTruth
from forebear.types import Scores, read_json, read_tensors

KEPT = 50
"""Examples a query kept in the top lists of a run."""


def attribute(
    task: Task, train: Any, queries: Any, method: str = "ekfac", **options: Any
) -> Scores:
    """Scores of `queries` against `train` in one call, `[query, train]`; positive = proponent.

    Args:
        task: what was trained and what is asked.
        train: any map-style dataset, or a tuple or dict of tensors.
        queries: of the same kind.
        method: a registered name; see `forebear.methods()`.
        options: settings of the method.
    """
    return methods.get(method, **options).fit(task, train).score(queries)


def load(folder: str | Path, task: Task, train: Any = None, *, method: Any = None) -> Fitted:
    """A fitted method that was saved with `fitted.save(folder)`.

    Args:
        folder: what `save` wrote.
        task: with the same model.
        train: the same training set; methods compute its gradients again as they need them.
        method: the configuration, when it has parts of your own.

    Raises:
        FormatError: the folder is missing or damaged, or its configuration has parts that this
            version does not know.
        MismatchError: model or training set differ from those of the fit.
    """
    about = read_json(Path(folder) / "fitted.json")
    missing = {"settings", "model", "train", "train_ids"} - set(about)
    if missing:
        raise FormatError(f"{folder}/fitted.json is damaged: it lacks {', '.join(sorted(missing))}")
    if train is None:
        raise DataError(
            f"{folder} was fitted to {len(about['train_ids'])} examples, and scoring needs them: "
            "pass train="
        )
    data = Data.of(train, ids=about["train_ids"], collate=task.collate)
    require_same_state(about, task, data)
    if method is None:
        method = method_of(about["settings"])
    elif settings_of(method) != about["settings"]:
        raise MismatchError(f"method= has settings {settings_of(method)}; saved were others")
    return method.restore(task, data, read_tensors(Path(folder) / "fitted.safetensors"))


def evaluate(scores: Scores, truth: GroundTruth) -> dict[str, Any]:
    """How well scores predict what retraining really did.

    Returns:
        `lds` (or `loo_correlation` for leave-one-out truth) as an `Interval` of the mean over
        queries, `per_query` `[q]`, and `ceiling`, the highest value the retraining noise allows,
        as an `Interval`, when the truth has two seeds or more.

    Raises:
        MismatchError: scores and truth are of different data, queries or models.
    """
    truth.require_match(scores)
    if truth.kind == "leave_one_out":
        columns = scores.values[:, truth.left_out]
        values = metrics.loo_correlation(columns, truth.removal_effects)
        name = "loo_correlation"
    else:
        values = metrics.lds(scores.values, truth.subsets, truth.mean_outcomes)
        name = "lds"
    found: dict[str, Any] = {name: interval(values), "per_query": values}
    if len(truth.seeds) > 1:
        found["ceiling"] = interval(metrics.noise_ceiling(truth.outcomes).ceiling)
    return found


def interval(values: Any) -> Interval:
    """Mean over queries with its 95 % bootstrap interval."""
    low, high = metrics.bootstrap_interval(values)
    return Interval(mean=float(np.nanmean(values)), low=low, high=high)


def attribute_file(path: Path, method: str, options: dict[str, Any], out: Path) -> Run:
    """Attribute what a Python file defines, and write or extend the run folder `out`.

    The file defines `task()`, `train()` and `queries()`; it may define `examples()`, texts by id
    for people: `{"train": {id: text}, "queries": {id: text}}`.

    Raises:
        MismatchError: the folder holds a run of another model or data set.
    """
    configured = methods.get(method, **options)
    with importable(path.resolve().parent):
        module = imported(path)
        task = module.task()
        train = Data.of(module.train(), collate=task.collate)
        queries = Data.of(module.queries(), collate=task.collate)
    run = _open_run(out, path, task, train, queries)
    result = run_method(configured, task, train, queries, out)
    if hasattr(module, "examples"):
        _write_texts(out, module.examples())
    others = [other for other in run.methods if other.name != result.name]
    run = replace(run, methods=[*others, result], best=result.name)
    run.save(out)
    return run


def run_method(
    configured: Any,
    task: Task,
    train: Data,
    queries: Data,
    out: Path,
    *,
    label: str | None = None,
    note: str = "",
) -> MethodResult:
    """Fit, score, and write scores, top lists and self-influence of one method into a run."""
    name = configured.name
    plain = plain_pass_seconds(task, train)
    started = time.perf_counter()
    fitted = configured.fit(task, train)
    scores = fitted.score(queries)
    seconds = time.perf_counter() - started
    scores.save(scores_folder(out, name))
    top_path(out, name).parent.mkdir(parents=True, exist_ok=True)
    kept = min(KEPT, len(train))
    for opponents in (False, True):
        scores.top(kept, opponents=opponents).to_parquet(top_path(out, name, opponents=opponents))
    path = self_influence_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, fitted.self_influence().double().cpu().numpy())
    return MethodResult(
        name=name,
        label=label or methods.METHODS[name].label,
        settings=dict(scores.provenance.settings),
        coverage=scores.provenance.coverage,
        units=scores.provenance.units,
        seconds=seconds,
        passes=seconds / plain,
        note=note,
    )


def evaluate_run(folder: Path, truth_folder: Path | None = None) -> Run:
    """Compare every method of a run with a ground truth and write the results into its record.

    Raises:
        FormatError: there is no ground truth.
        MismatchError: it is of other data, queries or another model.
    """
    folder = Path(folder)
    run = Run.load(folder)
    where = Path(truth_folder) if truth_folder is not None else folder / "truth"
    if not (where / "truth.json").is_file():
        raise FormatError(
            f"{where} holds no ground truth: collect one with GroundTruth.collect and save it "
            "there, or name one with --truth"
        )
    truth = GroundTruth.load(where)
    results = []
    for result in run.methods:
        found = evaluate(Scores.load(scores_folder(folder, result.name)), truth)
        results.append(replace(result, lds=found.get("lds") or found["loo_correlation"]))
    facts = truth_facts(truth, run.truth.seconds if run.truth else None)
    best = max(results, key=lambda r: r.lds.mean if r.lds else -1.0, default=None)
    run = replace(run, methods=results, truth=facts, best=best.name if best else None)
    run.save(folder)
    return run


def truth_facts(truth: GroundTruth, seconds: float | None) -> TruthFacts:
    """How a ground truth was made and how far its retrainings agree."""
    noise = metrics.noise_ceiling(truth.outcomes) if len(truth.seeds) > 1 else None
    return TruthFacts(
        subsets=len(truth.subsets),
        seeds=len(truth.seeds),
        fraction=truth.subsets.double().mean().item(),
        agreement=float(np.nanmean(noise.agreement)) if noise else None,
        ceiling=interval(noise.ceiling) if noise else None,
        seconds=seconds,
    )


def plain_pass_seconds(task: Task, train: Data, *, batch_size: int = BATCH) -> float:
    """Median time of one plain forward and backward pass over the training set, of three."""
    parameters = [p for p in task.model.parameters() if p.requires_grad]

    def once() -> float:
        started = time.perf_counter()
        for _, batch in train.batches(batch_size):
            moved = _to(batch, task.device)
            torch.autograd.grad(
                task.losses(task.model, moved).mean(), parameters, allow_unused=True
            )
        return time.perf_counter() - started

    with task.evaluation(), torch.enable_grad():
        once()
        return median(once() for _ in range(3))


def environment() -> dict[str, Any]:
    """Versions and threads, for the record of a run."""
    import scipy

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def now() -> str:
    """The time for a record, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _to(batch: Any, device: torch.device) -> Any:
    return map_tensors(lambda t: t.to(device), batch)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules beside a file can be imported by it, as when Python runs the file."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def imported(path: Path) -> ModuleType:
    """A file as a module, always from its text.

    Raises:
        FormatError: it is not Python.
    """
    spec = importlib.util.spec_from_file_location(f"forebear_file_{uuid.uuid4().hex}", path)
    if spec is None:
        raise FormatError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    # Not by the loader: its bytecode cache takes a file edited within a second for the old one.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    missing = [name for name in ("task", "train", "queries") if not hasattr(module, name)]
    if missing:
        raise FormatError(
            f"{path} does not define {', '.join(f'{name}()' for name in missing)}: it must define "
            "task(), train() and queries()"
        )
    return module


def _open_run(out: Path, path: Path, task: Task, train: Data, queries: Data) -> Run:
    """The record of a run of the same model and data, or a new one."""
    model = ModelFacts(
        description=type(task.model).__name__,
        parameters=sum(p.numel() for p in task.model.parameters()),
        hash=task.model_hash(),
    )
    dataset = DatasetFacts(
        name=path.stem, train=len(train), queries=len(queries), fingerprint=train.fingerprint
    )
    if not (out / "run.json").is_file():
        return Run(
            kind="attribute",
            title=path.stem,
            created=now(),
            version=version(),
            dataset=dataset,
            model=model,
            plain_pass_seconds=plain_pass_seconds(task, train),
            environment=environment(),
        )
    run = Run.load(out)
    scored = [read_json(scores_folder(out, r.name) / "scores.json") for r in run.methods[:1]]
    for what, mine, theirs in (
        ("model", model.hash, run.model and run.model.hash),
        ("training set", dataset.fingerprint, run.dataset and run.dataset.fingerprint),
        *(("set of queries", queries.fingerprint, s["provenance"]["queries"]) for s in scored),
    ):
        if mine != theirs:
            raise MismatchError(
                f"{out} holds a run of another {what} ({theirs}, this one is {mine}): choose "
                "another --out, or delete the folder"
            )
    return run


def _write_texts(out: Path, texts: dict[str, dict[Any, str]]) -> None:
    import json

    named = {
        side: {str(key): str(text) for key, text in texts.get(side, {}).items()}
        for side in ("train", "queries")
    }
    (out / "examples.json").write_text(json.dumps(named, indent=1) + "\n")
