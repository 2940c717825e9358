"""Methods fitted to a store: to its rows alone, and answering without the training examples.

What a method knows of the training set is the rows and a curvature. The curvature is found in one
scan of the rows and kept beside them, in `STORE/fitted/`: `fitted.json` says what it belongs to and
`fitted.safetensors` is the state. It can be deleted at any time, and is found again when needed.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature import as_damping
from forebear.data import Data
from forebear.differentiation import Function
from forebear.errors import DataError, FormatError, MismatchError, TaskError
from forebear.methods.features import manifest_of, size_of, source_of
from forebear.methods.fitted import Fitted
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.settings import method_of
from forebear.methods.training_function import TrainingFunction
from forebear.progress import track
from forebear.projections.stream import KeptStream, as_blocks
from forebear.store import Manifest, Store
from forebear.store.files import explained, write_whole
from forebear.store.manifest import FINGERPRINTS
from forebear.store.rows import decode
from forebear.stream import BATCH
from forebear.task import Task
from forebear.types import FORMAT, read_json

FOLDER = "fitted"
READ = 16384
"""Rows read at a time."""

State = list[dict[str, Tensor]]
"""Tensors of the curvature at each checkpoint."""


def fit_store(method: Any, task: Task, train: Any, store: Store, *, ids: Any = None) -> Fitted:
    """The fitted method that reads its training features from a store.

    The curvature is estimated from the stored features in one scan, without the model, and kept
    beside them: the next time it is read.

    Raises:
        TaskError: the method has no explicit feature.
        MismatchError: the store belongs to another model, dataset or method.
    """
    data = Data.of(train, ids=ids, collate=task.collate)
    source = source_of(method, task, data, BATCH)
    manifest = manifest_of(task, data, source)
    manifest.require_same(store.manifest, (*FINGERPRINTS, "train", "parts"))
    return _fitted(source.fitted, store)


def load_fitted(
    store: Store, task: Task, queries: Any, *, method: Any = None, batch_size: int = BATCH
) -> Fitted:
    """The fitted method of a store, without the training examples.

    It scores queries as one fitted to the examples would: `top` and `score` read the rows, and
    `query_features` gives vectors to search them with.

    Args:
        store: what `build_store` made, or several of its stores merged.
        task: with the same model.
        queries: examples as they will be asked; layers are checked on the first few.
        method: the configuration, when it has parts of your own.
        batch_size: queries at a time.

    Raises:
        TaskError: the rows were not made by a method.
        MismatchError: the store belongs to another model, or `method` is another than its rows'.
    """
    if not store.manifest.method:
        raise TaskError(
            f"{store.folder} was not built from a method, so queries have no vectors for it: build "
            "one with build_store or 'forebear index', or search it with rows or vectors"
        )
    method = method_of(dict(store.manifest.settings)) if method is None else method
    data, seen = _absent(store), Data.of(queries, collate=task.collate)
    source = source_of(method, task, data, batch_size, seen=seen)
    if source.model != store.manifest.model:
        raise MismatchError(
            f"model differs: {store.folder} was built with {store.manifest.model} and the task has "
            f"{source.model}: load the weights that it was built with; training the model again, "
            "with other threads for one, gives others"
        )
    manifest = manifest_of(task, data, source)
    manifest.require_same(store.manifest, (*FINGERPRINTS, "parts"))
    return _fitted(source.fitted, store)


def save_fitted(fitted: Fitted, folder: str | Path) -> None:
    """Keep what a method found in the rows of a store beside them; nothing for similarity.

    Args:
        fitted: of `fit_store`, or fitted to the examples themselves.
        folder: of the store.

    Raises:
        OSError: the folder cannot be written to.
    """
    from safetensors.torch import save

    if not isinstance(fitted, FittedInfluence):
        return
    tensors = {
        f"{i}:{name}": tensor.contiguous()
        for i, fit in enumerate(fitted.curvatures)
        for name, tensor in fit.tensors().items()
    }
    content = save(tensors)
    facts = _facts(Manifest.read(Path(folder))) | {
        "sha256": hashlib.sha256(content).hexdigest(),
        "examples": len(fitted.train),
    }
    where = Path(folder) / FOLDER
    try:
        where.mkdir(exist_ok=True)
    except OSError as error:
        raise explained(error, where) from error
    # The hash is written last: a state that is not the one it names counts as missing.
    write_whole(where / "fitted.safetensors", [content])
    text = json.dumps({"format": FORMAT, **facts}, indent=1) + "\n"
    write_whole(where / "fitted.json", [text.encode()])


@dataclass(frozen=True)
class StoredStream:
    """Projected gradients `[n, k]` of a dataset in a store, with the face of a stream.

    Features belong to the function they were made with, which is told the weights they were stored
    with.

    Attributes:
        task: model and functions.
        data: the examples; there are as many as rows are looked at.
        plan: of the features.
        store: the rows.
        offset: where the numbers of this stream's checkpoint begin in a row.
        first: position of the first row.
    """

    task: Task
    data: Data
    plan: Plan
    store: Store
    offset: int = 0
    first: int = 0

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, weights `[b]` and features."""
        for rows, _ in track(self.batches(description), description):
            yield rows, *self.at(rows, function)

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Weights and features of the rows of one block."""
        size = self.store.manifest.shard_rows
        number, start = divmod(self.first + rows.start, size)
        features, weights = self._read(number, slice(start, start + rows.stop - rows.start))
        if isinstance(function, TrainingFunction):
            function.weights = weights
        return weights.expand(len(features)), as_blocks(features, self.plan)

    def batches(self, description: str) -> Iterator[tuple[slice, object]]:
        """Positions of blocks, none of which crosses a shard; no batch is needed."""
        size = self.store.manifest.shard_rows
        start, populated = 0, -1
        while start < len(self.data):
            number, inside = divmod(self.first + start, size)
            if number != populated:
                self.store.shard(number).populate()
                populated = number
            rows = slice(start, min(start + READ, start + size - inside, len(self.data)))
            yield rows, None
            start = rows.stop

    @property
    def executor(self) -> None:
        """In this process, where the rows are mapped into memory."""
        return None

    def part(self, rows: slice) -> "StoredStream":
        """The features of some examples."""
        return replace(self, data=self.data.slice(rows), first=self.first + rows.start)

    def select(self, data: Data, positions: Tensor) -> KeptStream:
        """The features at `positions` `[m]`, ascending, which are those of `data`, in memory."""
        size = self.store.manifest.shard_rows
        where = positions + self.first
        read = [
            self._read(number, where[where // size == number] % size)
            for number in (where // size).unique().tolist()
        ]
        features = torch.cat([values for values, _ in read])
        weights = torch.cat([weights.expand(len(values)) for values, weights in read])
        return KeptStream(self.task, data, self.plan, features, weights)

    def _read(self, shard: int, inside: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Features of some rows of a shard, and their weights."""
        tensors = self.store.shard(shard).tensors
        scales = tensors.get("scales")
        width = slice(self.offset, self.offset + size_of(self.plan))
        values = tensors["values"][inside][:, width]
        features = decode(values, None if scales is None else scales[inside], self.offset)
        weights = tensors["weights"][inside] if "weights" in tensors else features.new_ones(())
        return features, weights


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings `[n, d]` in a store, read when they are looked at."""

    store: Store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.store.rows(np.arange(len(self))[rows])


@dataclass(frozen=True)
class _Examples:
    """A training set of which only the number of examples is known."""

    store: Store
    absent = True

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> Any:
        raise DataError(
            f"the training examples of {self.store.folder} are not here, only their rows: use "
            "fit_store with train= for what needs the examples themselves"
        )


def _absent(store: Store) -> Data:
    """The training set as a store knows it: ids and fingerprint."""
    data = Data(_Examples(store), ids=store.ids)
    data.fingerprint = store.manifest.train
    return data


def _fitted(fitted: Any, store: Store) -> Fitted:
    """Facing the rows of the store, with the curvature that was kept or is found in them."""
    if not isinstance(fitted, FittedInfluence):
        fitted.embeddings = StoredEmbeddings(store)
        return fitted
    method, offset = fitted.method, 0
    kept = _kept(store, len(fitted.moments))
    for i, checkpoint in enumerate(fitted.moments):
        stream: Any = StoredStream(fitted.task, fitted.train, fitted.feature_plan, store, offset)
        fitted.training.append(stream)
        function = fitted.training_function()
        with fitted.task.at(checkpoint):
            if kept is not None:
                fit = method.curvature.restore(stream, function, kept[i])
            else:
                fit = method.curvature.fit(
                    stream, function, as_damping(method.damping), method.seed
                )
        fitted.curvatures.append(fit)
        offset += size_of(fitted.feature_plan)
    if kept is None:
        # A store that cannot be written to is scanned again the next time.
        with suppress(OSError):
            save_fitted(fitted, store.folder)
    return fitted


def _kept(store: Store, checkpoints: int) -> State | None:
    """The state beside the rows; None where there is none, or not that of these rows."""
    from safetensors.torch import load

    where = store.folder / FOLDER
    if not (where / "fitted.json").exists():
        return None
    try:
        about = read_json(where / "fitted.json")
        content = (where / "fitted.safetensors").read_bytes()
    except (FormatError, OSError):
        return None
    facts = _facts(store.manifest) | {"sha256": hashlib.sha256(content).hexdigest()}
    if any(about.get(name) != value for name, value in facts.items()):
        return None
    tensors = load(content)
    return [
        {
            name.partition(":")[2]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{i}:")
        }
        for i in range(checkpoints)
    ]


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What a state belongs to; the manifest stands for model, data, settings and form."""
    text = json.dumps(manifest.plain(), sort_keys=True)
    return {
        "method": manifest.method,
        "settings": manifest.plain()["settings"],
        "model": manifest.model,
        "train": manifest.train,
        "manifest": hashlib.sha256(text.encode()).hexdigest(),
    }
