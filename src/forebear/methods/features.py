"""Explicit features: methods whose score is a product of a query's vector and an example's.

The vectors of the training set go to a store once; every query is then one vector, and

    score(q, z) = query_features(q) · row(z)

is what the method scores, within the rounding of the stored type. For influence in a projected
space a row is the projected gradient of the example at every checkpoint, times its weight (TRAK's
residual), and a query's vector is its own, solved with the curvature and with all factors in it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature import FittedCurvature
from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.executors import Executor, InProcess
from forebear.gradients import joined
from forebear.methods.baselines import FittedSimilarity, Similarity
from forebear.methods.fitted import Fitted, require_same_columns, version
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.influence import Influence
from forebear.methods.settings import settings_of
from forebear.plan import make_plan
from forebear.projections.stream import as_blocks
from forebear.store import Column, Manifest, ShardWriter, Store, StoreBuilder
from forebear.store.manifest import StoredType
from forebear.stream import BATCH
from forebear.task import Task, state_hash


def build_store(
    method: Any,
    task: Task,
    train: Any,
    folder: str | Path,
    *,
    dtype: StoredType = "bfloat16",
    shard_rows: int = 0,
    columns: Mapping[str, Any] | None = None,
    ids: Any = None,
    batch_size: int = BATCH,
    executor: Executor | None = None,
) -> Store:
    """Write the features of every training example, in one pass and in memory for one shard.

    Stopped halfway, the same call goes on where it stopped.

    Args:
        method: a configuration with an explicit feature, or a fitted one: `Influence` with a
            projection (TRAK among them) or `Similarity`.
        task: what was trained.
        train: any map-style dataset.
        folder: of the store.
        dtype: of the stored numbers.
        shard_rows: rows of a shard; as many as take 8 MB when 0.
        columns: further values of each example, `[n, ...]` by name, to filter by.
        ids: a stable id for each example; positions when left out.
        batch_size: examples at a time.
        executor: where to compute and write shards, to a folder that workers see; in this process
            when left out.

    Raises:
        TaskError: the method has no explicit feature.
        MismatchError: the folder holds a store of another model, loss, dataset or method.
        NonFiniteError: a feature is NaN or infinite, with ids.
    """
    method = method.method if isinstance(method, Fitted) else method
    data = Data.of(train, ids=ids, collate=task.collate)
    source = source_of(method, task, data, batch_size)
    labels = {name: _array(column) for name, column in (columns or {}).items()}
    for name, column in labels.items():
        if len(column) != len(data):
            raise DataError(f"column {name!r} has {len(column)} values for {len(data)} examples")
    manifest = manifest_of(task, data, source).with_rows(
        len(data),
        dtype=dtype,
        shard_rows=shard_rows,
        columns={name: _column(column) for name, column in labels.items()},
    )
    executor = executor or InProcess()
    if not executor.leads:
        executor.run(_Shards(source, data, labels, ShardWriter(Path(folder), manifest)))
        return Store.open(folder)
    with StoreBuilder.create(folder, manifest) as builder:
        # The builder itself writes while the next shard is computed; others cannot have it.
        here = isinstance(executor, InProcess)
        executor.run(_Shards(source, data, labels, builder if here else builder.writer))
        return builder.finish()


@dataclass(frozen=True)
class _Shards:
    """Shards of features as numbered pieces, which are their own markers."""

    source: "_Projected | _Embedded"
    data: Data
    columns: Mapping[str, np.ndarray]
    writer: ShardWriter
    description: str = "shards"

    def __len__(self) -> int:
        return self.writer.manifest.shards

    def done(self, piece: int) -> bool:
        """Whether the shard is written."""
        return self.writer.has(piece)

    def do(self, piece: int) -> None:
        """Compute the features of a shard's rows and write them."""
        rows = self.writer.manifest.rows_of(piece)
        part = self.data.slice(rows)
        values, weights = self.source.features(part)
        own = {name: column[rows] for name, column in self.columns.items()}
        self.writer.write(piece, values, part.ids, own, weights)


def query_features(fitted: Fitted, queries: Any, *, ids: Any = None) -> Tensor:
    """`[q, k]` vectors whose products with stored rows are the scores of `fitted`.

    Raises:
        TaskError: the method has no explicit feature.
    """
    _require_explicit(fitted.method)
    data = Data.of(queries, ids=ids, collate=fitted.task.collate)
    require_same_columns(fitted.train, data)
    if isinstance(fitted, FittedSimilarity):
        return fitted.embed(data, "queries")
    assert isinstance(fitted, FittedInfluence)
    scale = 1.0 / len(fitted.train) if fitted.method.units == "removal" else 1.0
    parts = []
    for i, (checkpoint, fit) in enumerate(zip(fitted.moments, fitted.curvatures, strict=True)):
        with fitted.task.at(checkpoint):
            stream = fitted.stream(i, data)
            found = [g for _, _, g in stream.gradients(fitted.query_function, "queries")]
        solved = _solved(fit, joined(found), fitted.feature_plan)
        parts.append(solved * (scale * fitted.share(i)))
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class _Projected:
    """Rows of influence in a projected space."""

    fitted: FittedInfluence

    @property
    def parts(self) -> dict[str, int]:
        """Names and widths of the parts of a row."""
        sizes = {name: block.size for name, block in self.fitted.feature_plan.blocks.items()}
        if len(self.fitted.moments) == 1:
            return sizes
        checkpoints = range(len(self.fitted.moments))
        return {f"{i}:{name}": size for i in checkpoints for name, size in sizes.items()}

    @property
    def model(self) -> str:
        """Hash of all weights that rows are made with, those of checkpoints included."""
        moments = self.fitted.moments
        if moments == (None,):
            return self.fitted.model_hash
        digest = hashlib.sha256(self.fitted.model_hash.encode())
        for moment in moments:
            assert moment is not None
            digest.update(f"{state_hash(moment.load())} {moment.learning_rate!r}".encode())
        return digest.hexdigest()[:16]

    def features(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """`[b, k]` over all checkpoints, and weights `[b]` where the method has some."""
        fitted, moments = self.fitted, self.fitted.moments
        size = size_of(fitted.feature_plan)
        values = torch.empty(len(data), size * len(moments))
        # TRAK averages the weights over checkpoints apart from the products.
        weights = torch.zeros(len(data)) if self.weighted else None
        for i, checkpoint in enumerate(moments):
            function, place = fitted.training_function(), slice(size * i, size * (i + 1))
            with fitted.task.at(checkpoint):
                stream = fitted.stream(i, data)
                for rows, _, gradients in stream.gradients(function, "projected gradients"):
                    written = [terms[0].left[:, 0] for terms in gradients.values()]
                    values[rows, place] = torch.cat(written, 1).to(values)
                    if weights is not None:
                        weights[rows] += function.weights.to(weights) / len(moments)
        return values, weights

    @property
    def weighted(self) -> bool:
        """Whether examples have weights."""
        return self.fitted.method.gradient == "output"


@dataclass(frozen=True)
class _Embedded:
    """Rows of similarity."""

    fitted: FittedSimilarity
    seen: Data
    weighted: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """One part, as wide as the embedding of the first example."""
        return {"embedding": self.features(self.seen.slice(slice(0, 1)))[0].shape[1]}

    @property
    def model(self) -> str:
        """Hash of the weights."""
        return self.fitted.model_hash

    def features(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """Embeddings `[b, d]`."""
        return self.fitted.embed(data, "embeddings"), None


def source_of(
    method: Any, task: Task, data: Data, batch_size: int, *, seen: Data | None = None
) -> "_Projected | _Embedded":
    """What makes rows of a method, nothing of it fitted.

    Args:
        method: the configuration.
        task: what was trained.
        data: the training set.
        batch_size: examples at a time.
        seen: the examples that layers are checked on; the training set's first when left out.

    Raises:
        TaskError: the method has no explicit feature.
    """
    _require_explicit(method)
    seen = data if seen is None else seen
    if isinstance(method, Similarity):
        return _Embedded(FittedSimilarity(method, task, data, batch_size=batch_size), seen)
    # Those of the task are written down as the method's: rows of other layers must not pass.
    method = replace(method, layers=task.layers) if method.layers is None else method
    if method.layers is not None:
        task = task.select(method.layers)
    plan = make_plan(task, seen)
    return _Projected(FittedInfluence(method, task, data, plan, batch_size=batch_size))


def _require_explicit(method: Any) -> None:
    """Raise `TaskError` unless scores of `method` are products of stored vectors."""
    if isinstance(method, Similarity) and method.metric != "distance":
        return
    remedy = "use trak, similarity, or Influence(projection=...) without normalise="
    # Kinds of influence of their own make more of their products.
    if type(method) is not Influence or method.projection is None:
        raise TaskError(f"{method.name} has no vector for each example to store: {remedy}")
    if method.normalise != "none":
        # Lengths in the curvature's metric are known only after the rows.
        raise TaskError(f"normalise={method.normalise!r} cannot be stored: {remedy}")


def manifest_of(task: Task, data: Data, source: "_Projected | _Embedded") -> Manifest:
    """What a store of these rows says of them, but for how they are kept."""
    method, parts = source.fitted.method, source.parts
    return Manifest(
        rows=len(data),
        dimension=sum(parts.values()),
        ids="integer" if data.ids.dtype.kind in "iu" else "string",
        weighted=source.weighted,
        parts=parts,
        model=source.model,
        train=data.fingerprint,
        method=method.name,
        settings=settings_of(method),
        seed=getattr(method, "seed", None),
        precision=str(next(task.model.parameters()).dtype).removeprefix("torch."),
        version=version(),
        loss=task.facts()["loss"],
    )


def _solved(fit: FittedCurvature, gradients: Gradients, plan: Plan) -> Tensor:
    """`(C + λI)⁻¹` applied to projected gradients, `[q, k]`.

    The inner product is linear: its products with the unit vectors are the entries.
    """
    like = next(iter(gradients.values()))[0].left
    units = torch.eye(size_of(plan), dtype=like.dtype, device=like.device)
    return fit.products(fit.prepare(gradients), as_blocks(units, plan)).cpu()


def size_of(plan: Plan) -> int:
    """Numbers of a plan's blocks."""
    return sum(block.size for block in plan.blocks.values())


def _array(column: Any) -> np.ndarray:
    return column.numpy() if isinstance(column, Tensor) else np.asarray(column)


def _column(values: np.ndarray) -> Column:
    kinds = {"i": "int64", "u": "int64", "f": "float64", "b": "bool", "U": "string", "O": "string"}
    if values.dtype.kind not in kinds:
        raise DataError(f"a column of type {values.dtype} cannot be stored: use numbers or strings")
    return Column(kinds[values.dtype.kind], values.shape[1:])
