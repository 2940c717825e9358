"""Exact search gives what sorting the whole matrix in double precision gives."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forebear.errors import DataError, MismatchError, NonFiniteError
from forebear.search import ArrayRows, Equals, screening, search_exact
from forebear.search.rows import ArrayBlock

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
BY_COLUMN = "int8 with scales of columns"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(values: Tensor, dtype: Any, **more: Any) -> ArrayRows:
    if dtype == BY_COLUMN:
        scales = torch.stack([part.abs().amax(1) / 127 for part in values.split(16, 1)], 1)
        by = scales.repeat_interleave(16, 1)[:, : values.shape[1]]
        return ArrayRows((values / by).round().to(torch.int8), scales, **more)
    if dtype != torch.int8:
        return ArrayRows(values.to(dtype), **more)
    scales = values.abs().amax(1) / 127
    numbers = (values / scales.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return ArrayRows(numbers, scales, **more)


def matrix(rows: ArrayRows, queries: Tensor) -> np.ndarray:
    """All products `[q, n]`: numpy in double precision, rounded to float32."""
    values = rows.values.float().numpy()
    if rows.scales is not None:
        scales = rows.scales.float().numpy().reshape(len(values), -1)
        by = np.repeat(scales, 16 if scales.shape[1] > 1 else values.shape[1], 1)
        values = values * by[:, : values.shape[1]]
    return (queries.double().numpy() @ values.astype(np.float64).T).astype(np.float32)


def sorted_rows(scores: np.ndarray, k: int, opponents: bool = False) -> np.ndarray:
    return np.argsort(scores if opponents else -scores, axis=1, kind="stable")[:, :k]


@dataclass(frozen=True)
class Cut:
    """Rows in blocks of uneven sizes, as shards of a store may be."""

    rows: ArrayRows
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def blocks(self, rows_at_a_time: int) -> Iterator[ArrayBlock]:
        start = turn = 0
        while start < len(self):
            size = min(self.sizes[turn % len(self.sizes)], rows_at_a_time)
            part = slice(start, min(start + size, len(self)))
            scales = None if self.rows.scales is None else self.rows.scales[part]
            yield ArrayBlock(part, self.rows.values[part], scales)
            start, turn = part.stop, turn + 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_small_whole_numbers_are_found_in_the_order_of_the_sorted_matrix(data: Any) -> None:
    """Whole numbers have exact products in every type, and many ties."""
    n = data.draw(st.integers(1, 300), "rows")
    q = data.draw(st.integers(1, 9), "queries")
    k = data.draw(st.integers(1, n) | st.just(n), "k")
    largest = data.draw(st.integers(0, 3), "largest")
    dtype = data.draw(st.sampled_from(TYPES), "type")
    opponents = data.draw(st.booleans(), "opponents")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    values = torch.randint(-largest, largest + 1, (n, 4), generator=generator)
    queries = torch.randint(-2, 3, (q, 4), generator=generator).float()
    scales = 2.0 ** torch.randint(-2, 3, (n,), generator=generator) if dtype == torch.int8 else None
    rows = ArrayRows(values.to(dtype), scales)
    sizes = tuple(data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3), "blocks"))
    found = search_exact(Cut(rows, sizes), queries, k, opponents=opponents)
    scores = matrix(rows, queries)
    order = sorted_rows(scores, k, opponents)
    assert (found.positions.numpy() == order).all()
    assert (found.values.numpy() == np.take_along_axis(scores, order, 1)).all()


@pytest.mark.parametrize("dtype", [*TYPES, BY_COLUMN])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_screening_loses_no_row(
    dtype: Any, queries: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 40 if dtype == BY_COLUMN else 24
    rows, asked = stored(draw(30_000, width), dtype), draw(queries, width, seed=1)
    exact, sizes = screening.Screen.exact, []

    def counted(self: Any, values: Tensor, scales: Tensor | None) -> Tensor:
        sizes.append(len(values))
        return exact(self, values, scales)

    monkeypatch.setattr(screening.Screen, "exact", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = search_exact(Cut(rows, (11_000, 3)), asked, 20)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sizes == []  # never all pairs: cheap products left few of them
    scores = matrix(rows, asked)
    order = sorted_rows(scores, 20)
    assert (found.positions.numpy() == order).all()
    assert np.allclose(found.values.numpy(), np.take_along_axis(scores, order, 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_cheap_products_cannot_tell_apart_are_told_apart(dtype: torch.dtype) -> None:
    """All products round to the same bfloat16 number; the strongest rows come last."""
    n = 9000
    values = torch.ones(n, 8)
    values[:, 3] += torch.arange(n) * (2.0**-23 if dtype == torch.float32 else 0)
    values[-40:, 3] += 2.0**-9
    rows, asked = stored(values, dtype), torch.ones(5, 8)
    found = search_exact(rows, asked, 60)
    assert (found.positions.numpy() == sorted_rows(matrix(rows, asked), 60)).all()


@pytest.mark.parametrize(
    ("dtype", "query", "common", "strongest", "scales"),
    [
        # The query is rounded to (1, 1), and the strongest row's cheap product to zero.
        (torch.bfloat16, (1 + 2.0**-8, 1.0), (0.1, 0.0), (64.0, -64.0), None),
        (torch.bfloat16, (1 + 2.0**-8, 1.0), (0.1, 0.0), (1.0, -1.0), (1.0, 64.0)),
        # The others' cheap products are too large at the same time.
        (torch.bfloat16, (1 + 2.0**-8, 1.0), (-32.0, 32.25), (36.0, -36.0), None),
        # The row is rounded.
        (torch.float32, (1.0, -1.0), (0.1, 0.0), (64.25, 64.0), None),
        (torch.float16, (1.0, -1.0), (0.1, 0.0), (64.25, 64.0), None),
        # The product is rounded.
        (torch.bfloat16, (1.0, 1.0), (1.0, 2.0**-10), (1.0, 2.0**-9), None),
        # The scale is rounded.
        (torch.int8, (1.0, 1.0), (100, 0), (100, 0), (1.0, 1 + 2.0**-9)),
        # The row is rounded after it was scaled, to (−129, −131).
        (torch.int8, (1.0, -1.0), (9, 0), (103, 105), ((0.25,), (-1.25,))),
    ],
)
@pytest.mark.parametrize("size", [2048, 6000])
def test_a_row_whose_cheap_product_misleads_is_found(
    dtype: torch.dtype, query: Any, common: Any, strongest: Any, scales: Any, size: int
) -> None:
    values = torch.tensor([common]).repeat(6000, 1)
    values[20:] = 0  # were there many near the threshold, all pairs would be multiplied exactly
    values[5000] = torch.tensor(strongest)
    factors = None
    if scales is not None:
        factors = torch.tensor(scales[:1]).repeat_interleave(6000, 0)
        factors[5000] = torch.tensor(scales[1])
    rows = ArrayRows(values.to(dtype), factors)
    found = search_exact(Cut(rows, (size,)), torch.tensor([query] * 5), 3)
    assert (found.positions == torch.tensor([5000, 0, 1])).all()


def test_rows_of_very_different_lengths_and_zeros() -> None:
    values = draw(20_000, 16) * torch.logspace(-20, 6, 20_000)[torch.randperm(20_000)][:, None]
    values[::3] = 0.0
    rows, asked = stored(values, torch.bfloat16), draw(6, 16, seed=2)
    asked[4] = 0.0
    asked[5] *= 1e-12
    found = search_exact(rows, asked, 50)
    assert (found.positions.numpy() == sorted_rows(matrix(rows, asked), 50)).all()
    assert (found.positions[4] == torch.arange(50)).all()


def test_equal_rows_fall_to_the_earlier_one() -> None:
    rows = ArrayRows(draw(7, 5).repeat(3000, 1).bfloat16())
    asked = draw(3, 5, seed=1)
    found = search_exact(Cut(rows, (500,)), asked, 40)
    assert (found.positions.numpy() == sorted_rows(matrix(rows, asked), 40)).all()
    assert (found.positions.diff(dim=1) == 7).all()


@pytest.mark.parametrize("share", [0.6, 0.01])
def test_a_filter_leaves_rows_out_and_never_breaks_k(share: float) -> None:
    chosen = np.random.default_rng(0).random(20_000) < share
    rows = ArrayRows(draw(20_000, 12).bfloat16(), columns={"kept": chosen.astype(int)})
    asked = draw(3, 12, seed=1)
    scores = matrix(rows, asked)
    scores[:, ~chosen] = -np.inf
    k = int(chosen.sum()) if share < 0.1 else 25
    for condition in (chosen, Equals("kept", 1)):
        found = search_exact(rows, asked, k, filter=condition)
        assert (found.positions.numpy() == sorted_rows(scores, k)).all()


@pytest.mark.parametrize("opponents", [False, True])
def test_the_strongest_of_each_group(opponents: bool) -> None:
    labels = np.random.default_rng(0).choice(["cat", "dog", "owl"], 9000, p=[0.9, 0.09, 0.01])
    rows = ArrayRows(draw(9000, 12).bfloat16(), columns={"label": labels})
    asked = draw(4, 12, seed=1)
    found = search_exact(rows, asked, 8, group="label", opponents=opponents)
    assert found.groups is not None
    assert found.groups.tolist() == ["cat", "dog", "owl"]
    for g, label in enumerate(found.groups):
        scores = matrix(rows, asked)
        scores[:, labels != label] = np.inf if opponents else -np.inf
        assert (found.positions[:, g].numpy() == sorted_rows(scores, 8, opponents)).all()
    some = search_exact(rows, asked, 8, group="label", filter=~Equals("label", "dog"))
    assert some.groups is not None
    assert some.groups.tolist() == ["cat", "owl"]


def test_the_memory_of_a_long_list_is_the_list() -> None:
    """k = n keeps everything, in order, and a query may stand alone."""
    rows, asked = stored(draw(5000, 6), torch.float16), draw(6, seed=1)
    found = search_exact(rows, asked, 5000)
    assert found.positions.shape == (1, 5000)
    assert (found.positions.numpy() == sorted_rows(matrix(rows, asked[None]), 5000)).all()


def test_bad_input_is_refused_by_name() -> None:
    rows = ArrayRows(draw(50, 6), columns={"label": np.arange(50) % 7})
    asked = draw(2, 6)
    with pytest.raises(DataError, match="k is 51 and there are 50 rows"):
        search_exact(rows, asked, 51)
    with pytest.raises(DataError, match="k is 0"):
        search_exact(rows, asked, 0)
    with pytest.raises(DataError, match="k is 9 and the filter leaves 8 rows"):
        search_exact(rows, asked, 9, filter=Equals("label", 0))
    with pytest.raises(DataError, match="group 1 has 7 rows"):
        search_exact(rows, asked, 8, group="label")
    with pytest.raises(DataError, match="one bool for each of the 50"):
        search_exact(rows, asked, 1, filter=np.ones(49, bool))
    with pytest.raises(DataError, match="one label for each of the 50"):
        search_exact(rows, asked, 1, group=np.ones(49))
    with pytest.raises(MismatchError, match="5 columns and the rows have 6"):
        search_exact(rows, draw(2, 5), 1)
    with pytest.raises(DataError, match="q at least 1"):
        search_exact(rows, draw(0, 6), 1)
    for bad in (torch.nan, torch.inf):
        asked[1, 2] = bad
        with pytest.raises(NonFiniteError, match="queries is NaN or infinite for 1"):
            search_exact(rows, asked, 1)
        with pytest.raises(NonFiniteError, match="rows is NaN or infinite for 1"):
            ArrayRows(asked)
    with pytest.raises(DataError, match="int8 rows need scales"):
        ArrayRows(torch.ones(3, 2, dtype=torch.int8))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_rows_too_short_to_matter_are_not_multiplied(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first piece, whose rows are long, `share` of the rows could reach the top."""
    n = 12_000
    values = torch.nn.functional.normalize(draw(n, 6), dim=1) * 0.01
    values[:2000] *= 1000
    values[2000:][torch.rand(n - 2000, generator=torch.Generator().manual_seed(3)) < share] *= 900
    rows, asked = stored(values, torch.bfloat16), draw(3, 6, seed=1)
    products, sizes = screening.Screen.products, []

    def counted(self: Any, values: Tensor, scales: Tensor | None) -> Tensor:
        sizes.append(len(values))
        return products(self, values, scales)

    monkeypatch.setattr(screening.Screen, "products", counted)
    for opponents in (False, True):
        sizes.clear()
        found = search_exact(Cut(rows, (2000,)), asked, 10, opponents=opponents)
        scores = matrix(rows, asked)
        assert (found.positions.numpy() == sorted_rows(scores, 10, opponents)).all()
        expected = n if share > 0.25 else 2000 + share * (n - 2000)
        assert abs(sum(sizes) - expected) <= 0.02 * n
    labels = np.arange(n) % 2
    groups = search_exact(Cut(rows, (2000,)), asked, 4, group=labels)
    for g in range(2):
        scores = matrix(rows, asked)
        scores[:, labels != g] = -np.inf
        assert (groups.positions[:, g].numpy() == sorted_rows(scores, 4)).all()
