"""Joining tasks, methods, ground truth and run folders."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from forebear import methods, metrics
from forebear.data import Data
from forebear.descriptions import same, shown
from forebear.errors import DataError, FormatError, MismatchError
from forebear.executors import Executor
from forebear.methods.belonging import require_same_task
from forebear.methods.features import build_store, query_features
from forebear.methods.fitted import Fitted, require_same_state
from forebear.methods.settings import method_of, settings_of
from forebear.methods.stored import fit_store
from forebear.record import open_run, plain_pass_seconds, write_texts
from forebear.run import (
    Interval,
    MethodResult,
    Run,
    TruthFacts,
    scores_folder,
    self_influence_path,
    top_path,
)
from forebear.store import Manifest, Store
from forebear.store.manifest import NAME, StoredType
from forebear.store.shards import path_of
from forebear.stream import BATCH
from forebear.task import Task
from forebear.task_file import defined
from forebear.training import GroundTruth
from forebear.types import UNSIGNED, Scores, read_json, read_tensors

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


def load(folder: str | Path, task: Task | None, train: Any = None, *, method: Any = None) -> Fitted:
    """A fitted method that was saved with `fitted.save(folder)`.

    Args:
        folder: what `save` wrote.
        task: with the same model; None for a method that was fitted without one, as NDA may be.
        train: the same training set; methods compute its gradients again as they need them.
        method: the configuration, when it has parts of your own.

    Raises:
        FormatError: the folder is missing or damaged, or its configuration has parts that this
            version does not know.
        MismatchError: model, training set, loss or layers differ from those of the fit.
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
    collate = None if task is None else task.collate
    data = Data.of(train, ids=about["train_ids"], collate=collate)
    require_same_state(about, task, data)
    if method is None:
        method = method_of(about["settings"])
    elif not same(own := settings_of(method), about["settings"]):
        raise MismatchError(
            f"method= has settings {shown(own, about['settings'])}; saved were "
            f"{shown(about['settings'], own)}: pass the configuration that was fitted, or fit again"
        )
    fitted = method.restore(task, data, read_tensors(Path(folder) / "fitted.safetensors"))
    # What it looks at: some methods have noise levels of their own, whatever those of the task.
    require_same_task(about, method, fitted.task)
    return fitted


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
    found = defined(path, ("task", "train", "queries"), ("examples",))
    return attribute_defined(found, path.stem, [configured], out)


def attribute_defined(
    found: Mapping[str, Any], name: str, configured: Sequence[Any], out: Path
) -> Run:
    """Attribute what a file defined by methods that are configured; see `attribute_file`."""
    task = found["task"]
    train = Data.of(found["train"], collate=task.collate)
    queries = Data.of(found["queries"], collate=task.collate)
    run = open_run(out, name, task, train, queries)
    for method in configured:
        result = run_method(method, task, train, queries, out)
        others = [other for other in run.methods if other.name != result.name]
        run = replace(run, methods=[*others, result], best=result.name)
        run.save(out)
    if "examples" in found:
        write_texts(out, found["examples"])
    return run


@dataclass(frozen=True)
class Indexed:
    """A store of what a Python file defines.

    Attributes:
        store: with the method's state beside it.
        rows: how many of its rows were written now; the others were there.
        seconds: that took, the method's state included.
        recalls: what each index says of itself, by kind.
    """

    store: Store
    rows: int
    seconds: float
    recalls: dict[str, str] = field(default_factory=dict)


def index_file(
    path: Path,
    method: str,
    options: dict[str, Any],
    out: Path,
    *,
    dtype: StoredType = "bfloat16",
    shard_rows: int = 0,
    batch_size: int = BATCH,
    executor: Executor | None = None,
    kinds: Sequence[str] = (),
    recall: float | None = None,
) -> Indexed:
    """Store the features of the training examples that a Python file defines, and index them.

    The file defines `task()` and `train()`; it may define `ids()`, an id for each example,
    `columns()`, values to filter by, by name, and `queries()`, which recall is then measured with.
    Stopped halfway, the same call goes on where it stopped.

    Raises:
        TaskError: the method has no explicit feature.
        MismatchError: the folder holds a store of another model, dataset or method.
    """
    configured = methods.get(method, **options)
    asked = ("queries",) if kinds else ()
    found = defined(path, ("task", "train"), ("ids", "columns", *asked))
    task = found["task"]
    train = Data.of(found["train"], ids=found.get("ids"), collate=task.collate)
    there, started = _rows_there(out), time.perf_counter()
    store = build_store(
        configured,
        task,
        train,
        out,
        dtype=dtype,
        shard_rows=shard_rows,
        columns=found.get("columns"),
        batch_size=batch_size,
        executor=executor,
    )
    fitted = fit_store(configured, task, train, store)
    seconds = time.perf_counter() - started
    recalls = {}
    if kinds:
        vectors = query_features(fitted, found["queries"]) if "queries" in found else None
        recalls = {kind: _indexed(store, kind, vectors, recall) for kind in kinds}
    return Indexed(store, len(store) - there, seconds, recalls)


def _rows_there(folder: Path) -> int:
    """Rows that an earlier build left."""
    if not (folder / NAME).exists():
        return 0
    manifest = Manifest.read(folder)
    rows = [manifest.rows_of(n) for n in range(manifest.shards) if path_of(folder, n).exists()]
    return sum(part.stop - part.start for part in rows)


def _indexed(store: Store, kind: str, queries: Any, recall: float | None) -> str:
    """What an index says of its recall; one that is there and good enough is kept."""
    from forebear import index

    try:
        there = index.open(store, kind)
        if recall is None or there.recall.mean >= recall:
            return str(there.recall)
    except (FormatError, MismatchError):
        pass
    return str(index.build(store, kind, queries=queries, recall_at_least=recall).recall)


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
    write_scores(scores, out)
    path = self_influence_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, fitted.self_influence().double().cpu().numpy())
    result = method_result(scores, label or methods.METHODS[name].label, seconds, plain)
    return replace(result, note=note)


def write_scores(scores: Scores, out: Path) -> None:
    """Scores and top lists of a method into a run; scores without a sign have no opponents."""
    name = scores.provenance.method
    scores.save(scores_folder(out, name))
    top_path(out, name).parent.mkdir(parents=True, exist_ok=True)
    kept = min(KEPT, len(scores.train_ids))
    scores.top(kept).to_parquet(top_path(out, name))
    if scores.provenance.sign != UNSIGNED:
        scores.top(kept, opponents=True).to_parquet(top_path(out, name, opponents=True))


def method_result(scores: Scores, label: str, seconds: float, plain: float | None) -> MethodResult:
    """What the record says of a method; `plain` is the time of one plain pass."""
    about = scores.provenance
    return MethodResult(
        name=about.method,
        label=label,
        settings=dict(about.settings),
        coverage=about.coverage,
        units=about.units,
        seconds=seconds,
        passes=None if plain is None else seconds / plain,
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
