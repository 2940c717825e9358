"""The dual form: training gradients by their coordinates in their own span."""

from pathlib import Path
from typing import Any

import pytest
import torch

import forebear as fb
from forebear.curvature import Dense, Whole
from forebear.curvature.gram import gram
from forebear.curvature.span import FittedSpan
from forebear.projections import KeptStream
from tests.denoising_cases import case


def influence(curvature: Any, **options: Any) -> fb.Influence:
    return fb.Influence(curvature=curvature, damping=fb.NonzeroRelative(0.01), **options)


@pytest.mark.parametrize("many", [40, 200])
def test_one_strong_direction_does_not_drown_the_others(many: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 0.03 * torch.randn(many, 30_000, generator=generator)
    rows += torch.randn(30_000, generator=generator)
    wide = rows.double()
    expected = wide @ wide.T
    miss = torch.linalg.matrix_norm(gram(rows) - expected, 2)
    plain = torch.linalg.matrix_norm((rows @ rows.T).double() - expected, 2)
    assert miss < 0.1 * plain
    # A thousandth of what an eigenvalue has that is not the strong one.
    assert miss < 1e-3 * torch.linalg.eigvalsh(expected)[: many // 2].mean()


def test_in_double_precision_it_is_the_product() -> None:
    rows = torch.randn(150, 700, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_no_training_gradient_is_computed_twice() -> None:
    task, train, queries = case()
    fitted = influence(Whole(Dense(kind="fisher"))).fit(task, train)
    assert isinstance(fitted.curvatures[0], FittedSpan)
    assert isinstance(fitted.training[0], KeptStream)
    dense = influence(Dense(kind="fisher")).fit(task, train)
    expected = dense.score(queries).values
    torch.testing.assert_close(fitted.score(queries).values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalise", ["cosine", "relative", "relative_parameters"])
def test_lengths_are_those_of_whole_gradients(normalise: Any) -> None:
    task, train, queries = case()
    one, other = (
        influence(curvature, normalise=normalise).fit(task, train)
        for curvature in (Whole(Dense(kind="fisher")), Dense(kind="fisher"))
    )
    expected = other.score(queries).values
    torch.testing.assert_close(one.score(queries).values, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(one.self_influence(), other.self_influence(), rtol=1e-8, atol=1e-12)


def test_vectors_are_solved_for_as_by_the_matrix() -> None:
    task, train, _ = case()
    span, dense = (
        influence(curvature).fit(task, train).curvatures[0]
        for curvature in (Whole(Dense(kind="fisher")), Dense(kind="fisher"))
    )
    assert isinstance(span, FittedSpan)
    vectors = torch.randn(3, span.span.rows.shape[1], dtype=torch.float64)
    expected = dense.solve(vectors)  # type: ignore[attr-defined]
    torch.testing.assert_close(span.solve(vectors), expected, rtol=1e-8, atol=1e-8)


def test_weights_of_outputs_are_kept_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 4).double()
    task = fb.Task(model, fb.losses.cross_entropy)
    train = (torch.randn(9, 12).double(), torch.arange(9) % 4)
    whole = fb.TRAK(dimension=None).fit(task, train)
    assert isinstance(whole.curvatures[0], FittedSpan)
    dense = fb.Influence(
        gradient="output",
        curvature=Dense(kind="fisher"),
        damping=0.01,
        checkpoints="mean",
        units="removal",
    )
    expected = dense.fit(task, train).score(train).values
    torch.testing.assert_close(whole.score(train).values, expected, rtol=1e-8, atol=1e-12)
    whole.save(tmp_path)
    again = fb.load(tmp_path, task, train)
    torch.testing.assert_close(again.score(train).values, expected, rtol=1e-8, atol=1e-12)
    some = whole.restricted(torch.tensor([1, 5])).score(train).values
    torch.testing.assert_close(some, expected[:, [1, 5]], rtol=1e-8, atol=1e-12)
