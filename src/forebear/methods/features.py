"""Explicit features: methods whose score is a product of a query's vector and an example's.

The vectors of the training set go to a store once; every query is then one vector, and

    score(q, z) = query_features(q) · row(z)

is what the method scores, within the rounding of the stored type. For influence in a projected
space a row is the projected gradient of the example at every checkpoint, times its weight (TRAK's
residual), and a query's vector is its own, solved with the curvature and with all factors in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Function, Gradients
from forebear.curvature import FittedCurvature, as_damping
from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.gradients import joined
from forebear.methods.baselines import FittedSimilarity, Similarity
from forebear.methods.fitted import Fitted, require_same_columns, version
from forebear.methods.influence import FittedInfluence, Influence, TrainingFunction
from forebear.methods.settings import settings_of
from forebear.plan import make_plan
from forebear.progress import track
from forebear.projections.stream import as_blocks
from forebear.store import Column, Manifest, Store, StoreBuilder
from forebear.store.manifest import FINGERPRINTS, StoredType
from forebear.store.rows import decode
from forebear.stream import BATCH
from forebear.task import Task

READ = 16384
"""Rows read at a time."""


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

    Raises:
        TaskError: the method has no explicit feature.
        MismatchError: the folder holds a store of another model, dataset or method.
        NonFiniteError: a feature is NaN or infinite, with ids.
    """
    method = method.method if isinstance(method, Fitted) else method
    data = Data.of(train, ids=ids, collate=task.collate)
    source = _source(method, task, data, batch_size)
    labels = {name: _array(column) for name, column in (columns or {}).items()}
    for name, column in labels.items():
        if len(column) != len(data):
            raise DataError(f"column {name!r} has {len(column)} values for {len(data)} examples")
    manifest = _manifest(method, task, data, source).with_rows(
        len(data),
        dtype=dtype,
        shard_rows=shard_rows,
        columns={name: _column(column) for name, column in labels.items()},
    )
    with StoreBuilder.create(folder, manifest) as builder:
        for shard in track(builder.missing(), "shards"):
            rows = builder.manifest.rows_of(shard)
            part = data.slice(rows)
            values, weights = source.features(part)
            own = {name: column[rows] for name, column in labels.items()}
            builder.write(shard, values, part.ids, own, weights)
        return builder.finish()


def fit_store(method: Any, task: Task, train: Any, store: Store, *, ids: Any = None) -> Fitted:
    """The fitted method that reads its training features from a store.

    The curvature is estimated from the stored features in one scan, without the model.

    Raises:
        TaskError: the method has no explicit feature.
        MismatchError: the store belongs to another model, dataset or method.
    """
    data = Data.of(train, ids=ids, collate=task.collate)
    source = _source(method, task, data, BATCH)
    _manifest(method, task, data, source).require_same(store.manifest, (*FINGERPRINTS, "train"))
    fitted = source.fitted
    if isinstance(fitted, FittedSimilarity):
        fitted.embeddings = store.rows(np.arange(len(store)))
        return fitted
    offset = 0
    for checkpoint in fitted.moments:
        stream = StoredStream(task, data, fitted.feature_plan, store, offset)
        fitted.training.append(stream)  # type: ignore[arg-type]
        with fitted.task.at(checkpoint):
            damping = as_damping(method.damping)
            function = fitted.training_function()
            fit = method.curvature.fit(stream, function, damping, method.seed)
        fitted.curvatures.append(fit)
        offset += _size(fitted.feature_plan)
    return fitted


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
        parts.append(solved * (scale * _share(fitted, i)))
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class StoredStream:
    """Projected gradients `[n, k]` of a dataset in a store, with the face of a stream.

    `offset` is where the numbers of this stream's checkpoint begin in a row. Features belong to the
    function they were made with, which is told the weights they were stored with.
    """

    task: Task
    data: Data
    plan: Plan
    store: Store
    offset: int = 0

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, weights `[b]` and features."""
        for rows, _ in track(self.batches(description), description):
            yield rows, *self.at(rows, function)

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Weights and features of the rows of one block."""
        number, start = divmod(rows.start, self.store.manifest.shard_rows)
        inside = slice(start, start + rows.stop - rows.start)
        tensors = self.store.shard(number).tensors
        scales = tensors.get("scales")
        values = tensors["values"][inside, self.offset : self.offset + _size(self.plan)]
        features = decode(values, None if scales is None else scales[inside])
        weights = tensors["weights"][inside] if "weights" in tensors else features.new_ones(())
        if isinstance(function, TrainingFunction):
            function.weights = weights
        return weights.expand(len(features)), as_blocks(features, self.plan)

    def batches(self, description: str) -> Iterator[tuple[slice, object]]:
        """Positions of blocks; the batches themselves are not needed."""
        for block in self.store.blocks(READ):
            yield block.rows, None


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

    def features(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """`[b, k]` over all checkpoints, and weights `[b]` where the method has some."""
        fitted, moments = self.fitted, self.fitted.moments
        size = _size(fitted.feature_plan)
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
    weighted: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """One part, as wide as the embedding of the first example."""
        return {"embedding": self.features(self.fitted.train.slice(slice(0, 1)))[0].shape[1]}

    def features(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """Embeddings `[b, d]`."""
        return self.fitted.embed(data, "embeddings"), None


def _source(method: Any, task: Task, data: Data, batch_size: int) -> _Projected | _Embedded:
    _require_explicit(method)
    if isinstance(method, Similarity):
        return _Embedded(FittedSimilarity(method, task, data, batch_size=batch_size))
    if method.layers is not None:
        task = task.select(method.layers)
    plan = make_plan(task, data)
    return _Projected(FittedInfluence(method, task, data, plan, batch_size=batch_size))


def _require_explicit(method: Any) -> None:
    """Raise `TaskError` unless scores of `method` are products of stored vectors."""
    if isinstance(method, Similarity):
        return
    remedy = "use trak, similarity, or Influence(projection=...) without normalise="
    if not isinstance(method, Influence) or method.projection is None:
        raise TaskError(f"{method.name} has no vector for each example to store: {remedy}")
    if method.normalise != "none":
        # Lengths in the curvature's metric are known only after the rows.
        raise TaskError(f"normalise={method.normalise!r} cannot be stored: {remedy}")


def _manifest(method: Any, task: Task, data: Data, source: _Projected | _Embedded) -> Manifest:
    parts = source.parts
    return Manifest(
        rows=len(data),
        dimension=sum(parts.values()),
        ids="integer" if data.ids.dtype.kind in "iu" else "string",
        weighted=source.weighted,
        parts=parts,
        model=task.model_hash(),
        train=data.fingerprint,
        method=method.name,
        settings=settings_of(method),
        seed=getattr(method, "seed", None),
        precision=str(next(task.model.parameters()).dtype).removeprefix("torch."),
        version=version(),
    )


def _solved(fit: FittedCurvature, gradients: Gradients, plan: Plan) -> Tensor:
    """`(C + λI)⁻¹` applied to projected gradients, `[q, k]`.

    The inner product is linear: its products with the unit vectors are the entries.
    """
    like = next(iter(gradients.values()))[0].left
    units = torch.eye(_size(plan), dtype=like.dtype, device=like.device)
    return fit.products(fit.prepare(gradients), as_blocks(units, plan)).cpu()


def _share(fitted: FittedInfluence, i: int) -> float:
    """Weight of checkpoint i in the sum over checkpoints."""
    if fitted.method.checkpoints == "mean":
        return 1.0 / len(fitted.moments)
    checkpoint = fitted.moments[i]
    return 1.0 if checkpoint is None else checkpoint.learning_rate


def _size(plan: Plan) -> int:
    return sum(block.size for block in plan.blocks.values())


def _array(column: Any) -> np.ndarray:
    return column.numpy() if isinstance(column, Tensor) else np.asarray(column)


def _column(values: np.ndarray) -> Column:
    kinds = {"i": "int64", "u": "int64", "f": "float64", "b": "bool", "U": "string", "O": "string"}
    if values.dtype.kind not in kinds:
        raise DataError(f"a column of type {values.dtype} cannot be stored: use numbers or strings")
    return Column(kinds[values.dtype.kind], values.shape[1:])
