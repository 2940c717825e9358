"""Datasets as forebear reads them: in order, in batches, with stable ids and a fingerprint."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from forebear.errors import DataError, NonFiniteError

Batch = Any
"""Whatever the loss takes: a tuple or a dict of tensors whose first axis is the example."""


HASH_BYTES = 2**22
"""Tensors longer than this are fingerprinted in parts of so many bytes."""


class Data:
    """A map-style dataset with ids.

    Datasets that are tensors (a `TensorDataset`, a subset of one, a tuple or dict of tensors) are
    sliced; others are collated example by example.

    Args:
        dataset: anything with `len()` and integer indexing, or a tuple or dict of tensors.
        ids: one stable id an example (integers or strings); positions when left out.
        collate: makes a batch of a list of examples; torch's default when left out.

    Raises:
        DataError: the dataset is empty, or ids are duplicated or too few.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        ids: Sequence[int] | Sequence[str] | np.ndarray | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self.columns = None if collate else _columns(dataset)
        self.dataset = dataset
        self.own_collate = collate
        if self.columns is None and not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise DataError(
                f"{type(dataset).__name__} is not a map-style dataset: it needs len() and "
                "indexing; for an iterable, collect the examples into a list first"
            )
        size = len(_leaves(self.columns)[0]) if self.columns is not None else len(dataset)
        if size == 0:
            raise DataError("the dataset is empty: attribution needs at least one example")
        self.ids = np.arange(size) if ids is None else np.asarray(ids)
        if len(self.ids) != size:
            raise DataError(f"{len(self.ids)} ids were given for {size} examples: give one each")
        values, counts = np.unique(self.ids, return_counts=True)
        if counts.max() > 1:
            raise DataError(
                f"id {values[counts.argmax()].item()!r} stands {counts.max()} times: ids must be "
                "unique"
            )

    @classmethod
    def of(cls, data: Any, *, ids: Any = None, collate: Any = None) -> "Data":
        """`data` as a `Data`; one that has ids or a collate function of its own keeps them."""
        if not isinstance(data, cls):
            return cls(data, ids=ids, collate=collate)
        if ids is None and (data.own_collate or collate is None):
            return data
        ids = data.ids if ids is None else ids
        return cls(data.dataset, ids=ids, collate=data.own_collate or collate)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def collate(self) -> Callable[[list[Any]], Batch]:
        """What makes a batch of a list of examples."""
        return self.own_collate or default_collate

    def batch(self, rows: slice | Tensor) -> Batch:
        """The examples at `rows`, collated."""
        if self.columns is not None:
            return map_tensors(lambda column: column[rows], self.columns)
        positions = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return self.collate([self.dataset[i] for i in positions])

    def batches(self, size: int) -> Iterator[tuple[slice, Batch]]:
        """All examples in order, `size` at a time, with their positions."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.batch(rows)

    def slice(self, rows: slice) -> "Data":
        """The examples at `rows`, with their ids."""
        part = Data.__new__(Data)
        part.own_collate, part.ids = self.own_collate, self.ids[rows]
        if self.columns is not None:
            part.columns = part.dataset = map_tensors(lambda c: c[rows], self.columns)
        else:
            part.columns = None
            part.dataset = Subset(self.dataset, range(len(self))[rows])  # type: ignore[arg-type]
        return part

    def select(self, positions: Tensor) -> "Data":
        """The examples at `positions` `[m]`, with their ids."""
        if self.columns is not None:
            dataset = map_tensors(lambda c: c[positions.to(c.device)], self.columns)
        else:
            dataset = Subset(self.dataset, positions.tolist())  # type: ignore[arg-type]
        return Data(dataset, ids=self.ids[positions.numpy()], collate=self.own_collate)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, independent of how it is batched and collated."""
        digest = hashlib.sha256()
        columns = _columns(self.dataset)
        if columns is not None:
            for leaf in _leaves(columns):
                _hash_tensor(digest, leaf)
        else:
            for i in range(len(self)):
                _hash_any(digest, self.dataset[i])
        return digest.hexdigest()[:16]


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply `function` to every tensor of a nested tuple, list or dict."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if hasattr(batch, "keys"):  # transformers' BatchEncoding and other mappings
        return {key: map_tensors(function, batch[key]) for key in batch}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def batch_length(batch: Batch) -> int:
    """Number of examples in a batch: the first axis of its first tensor."""
    leaves = _leaves(batch)
    if not leaves:
        raise DataError(f"a batch of type {type(batch).__name__} holds no tensor")
    return len(leaves[0])


def require_finite(values: Tensor, what: str) -> None:
    """Raise `NonFiniteError`, whose `rows` are positions, when a row of `values` is NaN or inf."""
    # One sum is finite unless an entry is not; only then is every row looked at.
    if math.isfinite(values.sum().item()):
        return
    bad = torch.nonzero(~torch.isfinite(values.reshape(len(values), -1)).all(1))[:, 0]
    if len(bad):
        error = NonFiniteError(f"the {what} is NaN or infinite for {len(bad)} examples")
        error.rows = bad
        raise error


@contextmanager
def naming(data: Data, rows: slice | Tensor) -> Iterator[None]:
    """Inside the block, an error about positions in a batch gets their ids."""
    try:
        yield
    except (DataError, NonFiniteError) as error:
        if error.rows is None:
            raise
        # Batches of a stack of models, and those filled up to a size, have examples twice.
        ids = list(dict.fromkeys(data.ids[rows][error.rows.cpu().numpy()].tolist()))
        told = f"{error} (ids {', '.join(map(str, ids[:5]))}{' …' if len(ids) > 5 else ''})"
        if isinstance(error, NonFiniteError):
            told += ": remove or repair them, or raise the precision of the model"
        raise type(error)(told) from None


def _leaves(batch: Batch) -> list[Tensor]:
    leaves: list[Tensor] = []
    map_tensors(lambda leaf: leaves.append(leaf) if leaf.ndim else None, batch)
    return leaves


def _columns(dataset: Any) -> Any:
    """The tensors behind a dataset, so that batches are slices; None where there are none."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    if isinstance(dataset, Subset):
        columns = _columns(dataset.dataset)
        rows = torch.as_tensor(dataset.indices)
        return None if columns is None else map_tensors(lambda column: column[rows], columns)
    if isinstance(dataset, tuple | dict):
        values = list(dataset.values()) if isinstance(dataset, dict) else list(dataset)
        if values and all(isinstance(value, Tensor) and value.ndim for value in values):
            lengths = sorted({len(value) for value in values})
            if len(lengths) > 1:
                raise DataError(f"the tensors of the dataset have different lengths: {lengths}")
            return dataset
        # Taken for a sequence of examples, arrays would give one "example" a column.
        if isinstance(dataset, dict) or any(isinstance(value, np.ndarray) for value in values):
            kinds = sorted({type(value).__name__ for value in values})
            raise DataError(
                f"the dataset is a {type(dataset).__name__} of {', '.join(kinds)}: convert its "
                "columns with torch.as_tensor, or give a list of examples"
            )
    return None


def _hash_tensor(digest: Any, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content = tensor.view(-1).view(torch.uint8).numpy()
    if len(content) <= HASH_BYTES:
        digest.update(content)
        return
    # Long tensors are hashed in parts, side by side: hashlib lets other threads run.
    parts = [content[i : i + HASH_BYTES] for i in range(0, len(content), HASH_BYTES)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in pool.map(lambda part: hashlib.sha256(part).digest(), parts):
            digest.update(part)


def _hash_any(digest: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        _hash_tensor(digest, item)
    elif isinstance(item, np.ndarray) and item.dtype != object:
        digest.update(f"{item.dtype}{item.shape}".encode())
        digest.update(np.ascontiguousarray(item).tobytes())
    elif isinstance(item, dict) or hasattr(item, "keys"):
        for key in item:
            digest.update(str(key).encode())
            _hash_any(digest, item[key])
    elif isinstance(item, list | tuple):
        for value in item:
            _hash_any(digest, value)
    elif hasattr(item, "__array__") or hasattr(item, "__array_interface__"):  # images of Pillow
        array = np.asarray(item)
        _hash_any(digest, array.tolist() if array.dtype == object else array)
    elif hasattr(item, "__dict__"):  # the text of an object may hold its address
        digest.update(type(item).__qualname__.encode())
        _hash_any(digest, vars(item))
    else:
        digest.update(repr(item).encode())
