"""Distances between curvatures, on matrices whose answers are known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import forebear as fb
from forebear.curvature import Dense, Identity, Kronecker
from forebear.data import Data
from forebear.metrics.curvature import (
    diagonal_blocks,
    eigenbasis_overlap,
    eigenvalue_overlap,
    joined_blocks,
    kronecker_error,
    matrix_of,
    off_block_energy,
    relative_residual,
    spectrum,
)
from forebear.plan import make_plan
from forebear.stream import Stream

RNG = np.random.default_rng(0)


def turned(values: list[float], seed: int) -> np.ndarray:
    """A matrix with given eigenvalues in a random basis."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return q @ np.diag(values) @ q.T


def test_residuals_are_relative_frobenius_norms() -> None:
    matrix = np.diag([3.0, 4.0])
    assert relative_residual(matrix, np.diag([3.0, 1.0])) == pytest.approx(3 / 5)
    assert relative_residual(torch.from_numpy(matrix), matrix) == 0
    whole = np.array([[1.0, 0, 2], [0, 1, 0], [2, 0, 1]])
    assert off_block_energy(whole, [2, 1]) == pytest.approx(math.sqrt(8 / 11))
    assert (diagonal_blocks(whole, [2, 1]) == np.eye(3)).all()
    assert (joined_blocks([whole[:2, :2], whole[2:, 2:]]) == np.eye(3)).all()


def test_overlaps_tell_eigenvalues_from_eigenvectors() -> None:
    values = [5.0, 3.0, 1.0, 0.5]
    one, other = turned(values, 1), turned(values, 2)
    assert eigenvalue_overlap(one, other) == pytest.approx(1, abs=1e-12)
    assert eigenvalue_overlap(one, 2 * one) == pytest.approx(0, abs=1e-12)
    assert eigenbasis_overlap(one, turned([50, 30, 10, 5], 1), 2) == pytest.approx(1)
    assert eigenbasis_overlap(one, other, 4) == pytest.approx(1)
    assert 0 < eigenbasis_overlap(one, other, 2) < 0.99
    assert eigenbasis_overlap(np.diag([4.0, 3, 2, 1]), np.diag([4.0, 1, 2, 3]), 2) == 0.5


def test_the_spectrum_counts_what_makes_inversion_hard() -> None:
    found = spectrum(turned([-2.0, 1e-9, 0.5, 4.0], 3), damping=2.5)
    assert (found.negative, found.tiny) == (1, 1)
    assert found.smallest == pytest.approx(-2)
    assert found.largest == pytest.approx(4)
    assert found.condition == pytest.approx(6.5 / 0.5)
    assert spectrum(np.diag([0.0, 1.0])).condition == math.inf


def test_the_parts_of_kfacs_error() -> None:
    """In the axes as a basis the projection keeps the diagonal."""
    blocks = np.array([[2.0, 1.0], [1.0, 3.0]])
    error = kronecker_error(blocks, np.diag([2.0, 3.0]), np.diag([2.0, 1.0]))
    assert (error.total, error.basis, error.eigenvalues) == (6, 2, 4)
    assert error.eigenvalue_share == pytest.approx(2 / 3)
    assert error.defect == 0
    assert kronecker_error(blocks, np.diag([2.0, 4.0]), np.diag([2.0, 1.0])).defect > 0.1
    assert math.isnan(kronecker_error(blocks, blocks, blocks).eigenvalue_share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_residual(np.eye(2), np.eye(3)), r"shapes \(2, 2\) and \(3, 3\)"),
        (lambda: relative_residual(np.zeros((2, 2)), np.eye(2)), "the matrix is zero"),
        (lambda: off_block_energy(np.eye(3), [1, 1]), "add up to 2, not to 3"),
        (lambda: eigenbasis_overlap(np.eye(2), np.eye(2), 3), "k is 3"),
        (lambda: spectrum(np.ones((2, 3))), "must be square"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, message: str) -> None:
    with pytest.raises(fb.errors.DataError, match=message):
        call()


def test_an_entry_that_is_not_finite_is_refused() -> None:
    with pytest.raises(fb.errors.NonFiniteError):
        spectrum(np.array([[np.nan, 0], [0, 1]]))


@pytest.mark.parametrize(
    "curvature",
    [
        Dense(kind="gauss_newton"),
        Dense(kind="fisher", blocks="layers"),
        Dense(kind="hessian", indefinite="keep"),
        Kronecker(targets="empirical"),
    ],
    ids=["cholesky", "blocks", "eigenvectors", "ekfac"],
)
def test_a_fitted_curvature_is_written_out_as_what_it_inverts(curvature: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = Data((torch.randn(30, 3).double(), torch.randint(2, (30,))))
    task = fb.Task(model, fb.losses.cross_entropy)
    stream = Stream(task, make_plan(task, data), data)
    fitted = curvature.fit(stream, task.loss, fb.Absolute(0.5), 0)
    matrix = matrix_of(fitted) + 0.5 * np.eye(26)
    rows = torch.randn(4, 26, dtype=torch.float64)
    assert np.allclose(rows, fitted.solve(rows).numpy() @ matrix, rtol=1e-9, atol=1e-9)


def test_a_curvature_without_solutions_is_refused() -> None:
    model = nn.Linear(3, 2).double()
    data = Data((torch.randn(5, 3).double(), torch.randint(2, (5,))))
    task = fb.Task(model, fb.losses.cross_entropy)
    stream = Stream(task, make_plan(task, data), data)
    fitted = Identity().fit(stream, task.loss, fb.Absolute(0.5), 0)
    with pytest.raises(fb.errors.TaskError, match="does not solve"):
        matrix_of(fitted)
