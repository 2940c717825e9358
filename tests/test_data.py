"""Datasets: batches, ids, slices and fingerprints."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from forebear.data import Data, batch_length, map_tensors, naming, require_finite
from forebear.errors import DataError, NonFiniteError

X, Y = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


class Pairs(Dataset):
    """A map-style dataset that is not made of tensors."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return X[i], int(Y[i])


class Nested(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": {"pixels": X[i]}, "labels": (Y[i], f"row {i}")}


KINDS: dict[str, Any] = {
    "tuple of tensors": (X, Y),
    "dict of tensors": {"x": X, "y": Y},
    "TensorDataset": TensorDataset(X, Y),
    "subset of a TensorDataset": Subset(TensorDataset(X.repeat(2, 1), Y.repeat(2)), range(6, 12)),
    "subset of a subset": Subset(Subset(TensorDataset(X.flip(0), Y.flip(0)), [5, 4, 3, 2, 1, 0]),
                                 range(6)),
    "map-style": Pairs(),
    "subset of a map-style": Subset(Pairs(), range(6)),
    "list of pairs": [(X[i], Y[i]) for i in range(6)],
}  # fmt: skip


def values(batch: Any) -> list[Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


@pytest.mark.parametrize("dataset", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [1, 4, 6, 10])
def test_batches_are_all_examples_in_order(dataset: Any, size: int) -> None:
    met = []
    for rows, batch in Data(dataset).batches(size):
        x, y = values(batch)
        assert torch.equal(x, X[rows])
        assert torch.equal(y, Y[rows])
        assert batch_length(batch) == rows.stop - rows.start <= size
        met.extend(range(6)[rows])
    assert met == list(range(6))


@pytest.mark.parametrize("dataset", KINDS.values(), ids=KINDS)
def test_rows_may_be_positions_and_a_slice_keeps_its_ids(dataset: Any) -> None:
    data = Data(dataset, ids=list("abcdef"))
    x, _ = values(data.batch(torch.tensor([4, 0, 4])))
    assert torch.equal(x, X[[4, 0, 4]])
    part = data.slice(slice(2, 5))
    assert part.ids.tolist() == ["c", "d", "e"]
    assert len(part) == 3
    assert torch.equal(values(part.batch(slice(1, 3)))[1], Y[3:5])
    assert part.slice(slice(1, 2)).ids.tolist() == ["d"]
    assert torch.equal(values(part.slice(slice(1, 2)).batch(slice(0, 1)))[0], X[3:4])


@pytest.mark.parametrize("dataset", KINDS.values(), ids=KINDS)
def test_a_fingerprint_is_that_of_the_content(dataset: Any) -> None:
    data = Data(dataset)
    fingerprint = data.fingerprint
    assert len(fingerprint) == 16
    assert Data(dataset, ids=list("abcdef")).fingerprint == fingerprint
    assert Data(dataset, collate=lambda examples: examples).fingerprint == fingerprint
    assert data.slice(slice(0, 6)).fingerprint == fingerprint
    assert data.slice(slice(0, 5)).fingerprint != fingerprint
    assert data.slice(slice(1, 6)).fingerprint != data.slice(slice(0, 5)).fingerprint


def changed(part: int) -> Any:
    x, y = X.clone(), Y.clone()
    (x if part == 0 else y).view(-1)[3] += 1
    return [(x[i], y[i]) for i in range(6)], (x, y)


def test_one_changed_number_changes_the_fingerprint() -> None:
    for part in (0, 1):
        as_list, as_tensors = changed(part)
        assert Data(as_list).fingerprint != Data(KINDS["list of pairs"]).fingerprint
        assert Data(as_tensors).fingerprint != Data((X, Y)).fingerprint
    assert Data((X.double(), Y)).fingerprint != Data((X, Y)).fingerprint
    assert Data((X.view(6, 1, 2), Y)).fingerprint != Data((X, Y)).fingerprint
    assert Data((X.flip(0), Y.flip(0))).fingerprint != Data((X, Y)).fingerprint


@dataclass(repr=False)
class Example:
    """Its text names its address, which is another in every process."""

    pixels: Tensor
    label: int


def test_fingerprints_see_into_objects() -> None:
    def images(value: int) -> list[Any]:
        pictures = [Image.new("L", (3, 2), value) for value in (1, value)]
        return [(picture, i) for i, picture in enumerate(pictures)]

    def objects(value: float) -> list[Any]:
        # Long tensors are shortened when printed.
        return [Example(torch.full((5000,), 1.0).index_fill(0, torch.tensor(2500), value), 3)]

    def arrays(value: Any) -> list[Any]:
        return [np.array(["a", value], dtype=object), np.array([1, 2])]

    for make in (images, objects, arrays):
        same = [Data(make(7), collate=list).fingerprint for _ in range(2)]
        assert same[0] == same[1]
        assert Data(make(8), collate=list).fingerprint != same[0]


def test_nested_batches_keep_their_structure() -> None:
    batch = Data(Nested()).batch(slice(0, 3))
    assert torch.equal(batch["image"]["pixels"], X[:3])
    assert torch.equal(batch["labels"][0], Y[:3])
    assert list(batch["labels"][1]) == ["row 0", "row 1", "row 2"]
    doubled = map_tensors(lambda t: 2 * t, batch)
    assert torch.equal(doubled["image"]["pixels"], 2 * X[:3])
    assert doubled["labels"][1] == batch["labels"][1]
    assert batch_length(batch) == 3


def test_map_tensors_keeps_named_tuples_and_reads_mappings() -> None:
    Pair = namedtuple("Pair", "x y")
    pair = map_tensors(lambda t: t + 1, Pair(X, [Y, "text"]))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.y[0], Y + 1)

    class Encoding:  # as transformers' BatchEncoding: a mapping that is no dict
        def keys(self) -> list[str]:
            return ["ids"]

        def __iter__(self) -> Any:
            return iter(self.keys())

        def __getitem__(self, key: str) -> Tensor:
            return Y

    assert torch.equal(map_tensors(lambda t: t + 1, Encoding())["ids"], Y + 1)


def test_a_collate_function_makes_the_batches() -> None:
    def longest(examples: list[Tensor]) -> dict[str, Tensor]:
        return {"x": torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)}

    ragged = [torch.ones(n) for n in (1, 3, 2)]
    data = Data(ragged, collate=longest)
    assert data.batch(slice(0, 2))["x"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert data.slice(slice(1, 3)).batch(slice(0, 2))["x"].shape == (2, 3)
    assert Data.of(data) is data
    with_ids = Data.of(data, ids=["a", "b", "c"])
    assert with_ids.ids.tolist() == ["a", "b", "c"]
    assert with_ids.batch(slice(0, 2))["x"].shape == (2, 3)
    # Of a task's and one's own collate function one's own counts; ids stay either way.
    assert Data.of(data, collate=list) is data
    given = Data.of(Data(ragged, ids=[7, 8, 9]), collate=longest)
    assert given.ids.tolist() == [7, 8, 9]
    assert given.batch(slice(0, 2))["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ((X[:0], Y[:0]), {}, "the dataset is empty"),
        ([], {}, "the dataset is empty"),
        (iter([1]), {}, "not a map-style dataset.*collect the examples into a list"),
        ((X, Y), {"ids": [1, 2]}, "2 ids were given for 6 examples"),
        ((X, Y), {"ids": [1, 2, 3, 4, 5, 3]}, "id 3 stands 2 times"),
        ((X, Y), {"ids": list("abcdea")}, "id 'a' stands 2 times"),
        ((X, Y[:5]), {}, r"different lengths: \[5, 6\]"),
        ((X.numpy(), Y.numpy()), {}, r"tuple of ndarray: convert .* torch\.as_tensor"),
        ({"x": X, "y": [1, 2, 3, 4, 5, 6]}, {}, "dict of Tensor, list: convert"),
    ],
)
def test_unusable_datasets_are_refused(dataset: Any, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Data(dataset, **options)


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(DataError, match="holds no tensor"):
        batch_length({"text": ["a"]})


def test_numbers_that_are_not_finite_are_named_by_id() -> None:
    data = Data((X, Y), ids=list("abcdef"))
    for bad in (float("nan"), float("inf"), -float("inf")):
        batch = X[2:5].clone()
        batch[1, 0] = bad
        with (
            pytest.raises(NonFiniteError, match=r"the loss .* for 1 examples \(ids d\)"),
            naming(data, slice(2, 5)),
        ):
            require_finite(batch, "loss")
    require_finite(X, "loss")
    huge = torch.full((4,), 3e38)  # their sum overflows and none of them does
    require_finite(huge, "loss")


def test_selected_examples_keep_ids_and_collate() -> None:
    positions = torch.tensor([1, 3])
    columns = Data((torch.arange(4), torch.arange(4) * 2.0), ids=list("abcd")).select(positions)
    assert columns.ids.tolist() == ["b", "d"]
    assert [column.tolist() for column in columns.batch(slice(0, 2))] == [[1, 3], [2.0, 6.0]]
    listed = Data([10, 11, 12, 13], collate=sum).select(positions)
    assert listed.batch(slice(0, 2)) == 24
    assert listed.ids.tolist() == [1, 3]
