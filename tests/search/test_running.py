"""What is kept while scores stream past is what a sort of all of them would keep."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forebear.errors import DataError, MismatchError, NonFiniteError
from forebear.search import RunningQuantiles, RunningTop
from forebear.search.running import QUANTILE_ERROR

LISTS, K = 3, 4
entries = st.lists(st.tuples(st.integers(0, LISTS - 1), st.integers(-3, 3)), max_size=40)
numbers = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


def kept(running: RunningTop) -> list[tuple[int, int, float]]:
    columns = (running.keys, running.positions, running.values)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(scores=entries, data=st.data())
def test_merging_in_any_order_keeps_what_sorting_keeps(scores: Any, data: Any) -> None:
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(scores), max_size=len(scores)))
    parts = []
    for part in range(3):
        some = [(i, *scores[i]) for i in range(len(scores)) if owner[i] == part]
        positions, keys, values = np.array(some, np.int64).reshape(-1, 3).T
        parts.append(RunningTop.empty(K, LISTS).add(keys, positions, values.astype(np.float32)))
    a, b, c = parts
    expected = []
    for key in range(LISTS):
        mine = [(i, value) for i, (owner_key, value) in enumerate(scores) if owner_key == key]
        mine.sort(key=lambda pair: (-pair[1], pair[0]))
        expected += [(key, i, float(value)) for i, value in mine[:K]]
    assert kept(a.merge(b).merge(c)) == expected
    assert kept(a.merge(b.merge(c))) == expected
    assert kept(c.merge(a).merge(b)) == expected
    thresholds = a.merge(b).merge(c).thresholds()
    for key in range(LISTS):
        values = [value for owner_key, _, value in expected if owner_key == key]
        assert thresholds[key] == (values[-1] if len(values) == K else -np.inf)


def test_other_lists_or_lengths_cannot_be_merged_and_nan_has_no_place() -> None:
    one = RunningTop.empty(3, 2)
    for other in (RunningTop.empty(4, 2), RunningTop.empty(3, 5)):
        with pytest.raises(MismatchError, match="only equal ones"):
            one.merge(other)
    with pytest.raises(NonFiniteError, match="NaN"):
        one.add(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([np.nan]))


@settings(deadline=None)
@given(
    parts=st.lists(st.lists(numbers, min_size=1, max_size=20), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_quantiles_are_within_their_error_of_a_value_that_stood_there(
    parts: list[list[float]], share: float
) -> None:
    merged = RunningQuantiles.empty(1)
    for part in parts:
        merged = RunningQuantiles.empty(1).add(torch.tensor([part])).merge(merged)
    everything = np.concatenate([np.asarray(part, np.float32) for part in parts])
    true = np.quantile(everything, share, method="inverted_cdf")
    assert abs(merged.at(share).item() - true) <= QUANTILE_ERROR * abs(true) * (1 + 1e-6)


def test_quantiles_of_many_normal_numbers() -> None:
    values = torch.randn(3, 20_000) * torch.tensor([[1.0], [1e-8], [1e8]])
    running = RunningQuantiles.empty(3)
    for part in values.split(777, dim=1):
        running = running.add(part)
    for share in (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0):
        true = torch.from_numpy(np.quantile(values.numpy(), share, axis=1, method="inverted_cdf"))
        assert ((running.at(share) - true).abs() <= QUANTILE_ERROR * true.abs()).all()


def test_quantiles_refuse_what_has_none() -> None:
    running = RunningQuantiles.empty(2)
    with pytest.raises(DataError, match="quantiles of nothing"):
        running.at(0.5)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        running.add(torch.tensor([[1.0], [torch.inf]]))
    with pytest.raises(DataError, match=r"share is 1\.5"):
        running.add(torch.ones(2, 1)).at(1.5)
    with pytest.raises(MismatchError, match="only equal ones"):
        running.merge(RunningQuantiles.empty(3))
