"""Quantiles and ranks of all scores, against numpy on the whole matrix."""

import numpy as np
import pytest
import torch
from torch import Tensor

from forebear.errors import DataError, MismatchError
from forebear.search import ArrayRows, Equals, quantiles, ranks, search_exact
from forebear.store import Manifest, Store, StoreBuilder

N, K, LABELS = 9000, 20, np.arange(9000) % 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    manifest = Manifest(rows=N, dimension=K, dtype=request.param, shard_rows=2500, weighted=True)
    values, weights = draw(N, K), torch.rand(N, generator=torch.Generator().manual_seed(9))
    with StoreBuilder.create(tmp_path_factory.mktemp("s"), manifest) as builder:
        for shard in builder.missing():
            part = manifest.rows_of(shard)
            builder.write(shard, values[part], np.arange(N)[part], weights=weights[part])
        return builder.finish()


def matrix(store: Store, queries: Tensor) -> np.ndarray:
    rows = store.rows(range(N)).numpy().astype(np.float64)
    return (queries.numpy().astype(np.float64) @ rows.T).astype(np.float32)


def test_quantiles_are_those_of_the_sorted_matrix(store: Store) -> None:
    queries, levels = draw(5, K, seed=1), [0.0, 0.01, 0.5, 0.9, 0.999, 1.0]
    found = quantiles(store, queries, levels)
    assert found.shape == (5, len(levels))
    truth = np.quantile(matrix(store, queries), levels, axis=1, method="inverted_cdf").T
    assert np.allclose(found.numpy(), truth, rtol=0.008, atol=1e-6)
    assert torch.equal(quantiles(store, queries[2], levels), found[2:3])


def test_what_a_search_finds_has_the_ranks_from_zero(store: Store) -> None:
    queries = draw(4, K, seed=1)
    top = search_exact(store, queries, 30)
    assert torch.equal(ranks(store, queries, top.values), torch.arange(30).expand(4, 30))
    scores = matrix(store, queries)
    some = torch.from_numpy(scores[:, [17, 4, 8000, 17]])
    some[0, 1] = torch.inf
    truth = (scores[:, None, :] > some.numpy()[:, :, None]).sum(2)
    assert (ranks(store, queries, some).numpy() == truth).all()


def test_filters_leave_rows_out() -> None:
    rows = ArrayRows(draw(N, K).bfloat16(), columns={"label": LABELS})
    queries = draw(3, K, seed=1)
    scores = rows.values.double().numpy() @ queries.double().numpy().T
    kept = scores[LABELS == 1].T.astype(np.float32)
    found = quantiles(rows, queries, [0.25], filter=Equals("label", 1))
    truth = np.quantile(kept, 0.25, axis=1, method="inverted_cdf")
    assert np.allclose(found[:, 0].numpy(), truth, rtol=0.008)
    middle = torch.from_numpy(np.median(kept, axis=1))[:, None]
    counted = (kept > middle.numpy()).sum(1, keepdims=True)
    assert (ranks(rows, queries, middle, filter=LABELS == 1).numpy() == counted).all()


def test_bad_input_is_refused_by_name() -> None:
    rows, queries = ArrayRows(draw(50, 6), columns={"label": np.zeros(50)}), draw(2, 6)
    with pytest.raises(DataError, match=r"levels are \[0.5, 2\]"):
        quantiles(rows, queries, [0.5, 2])
    with pytest.raises(DataError, match="the filter leaves no row"):
        quantiles(rows, queries, [0.5], filter=Equals("label", 1))
    with pytest.raises(DataError, match=r"values have shape \(3, 1\) for 2 queries"):
        ranks(rows, queries, draw(3, 1))
    with pytest.raises(DataError, match="give numbers"):
        ranks(rows, queries, torch.full((2, 1), torch.nan))
    with pytest.raises(MismatchError, match="5 columns and the rows have 6"):
        ranks(rows, draw(2, 5), draw(2, 1))
