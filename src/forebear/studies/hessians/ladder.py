"""Every curvature of the Hessian study as matrices, and scores from their eigenvectors.

One eigen-decomposition a matrix serves every damping.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.curvature import Absolute, Dense, Kronecker
from forebear.curvature.kronecker import FittedKronecker
from forebear.metrics.curvature import (
    diagonal_blocks,
    joined_blocks,
    kronecker_blocks,
    kronecker_error,
    off_block_energy,
    relative_residual,
)
from forebear.studies.hessians.subject import Subject
from forebear.task import Task
from forebear.tasks.classification import CrossEntropy

LADDER = {
    "hessian": "Hessian, absolute eigenvalues",
    "ggn": "Gauss-Newton",
    "block": "Gauss-Newton by layers",
    "ekfac": "EK-FAC, exact expectation",
    "kfac": "K-FAC, exact expectation",
}
"""From the exact matrix down; each step adds an approximation."""

OTHERS = {
    "ekfac_one": "EK-FAC, 1 target from the model",
    "kfac_one": "K-FAC, 1 target from the model",
    "ekfac_weighted": "EK-FAC, 1 weighted target",
    "fisher": "empirical Fisher",
    "identity": "identity",
}

NAMES = LADDER | OTHERS


class PlainDraws(CrossEntropy):
    """Cross-entropy whose labels are drawn from the model as they are, without weights."""

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Labels `[b]` from the softmax."""
        drawn = torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
        return drawn, outputs.new_ones(len(drawn))


FACTORS: Mapping[str, tuple[str, bool]] = {
    "exact": ("exact", False),
    "1 target from the model": ("sampled", True),
    "1 weighted target": ("sampled", False),
    "training labels": ("empirical", False),
}
"""Ways to estimate Kronecker factors: `targets`, and whether targets are drawn plainly."""


def fit_kronecker(subject: Subject, way: str, seed: int, *, corrected: bool) -> FittedKronecker:
    """K-FAC or EK-FAC with factors estimated in one of the `FACTORS` ways."""
    targets, plain = FACTORS[way]
    stream, loss = subject.stream, subject.task.loss
    if plain:
        task = Task(subject.task.model, PlainDraws())
        stream = type(stream)(task, stream.plan, stream.data, stream.batch_size)
    method = Kronecker(corrected=corrected, targets=targets, rank=None)  # type: ignore[arg-type]
    return method.fit(stream, loss, Absolute(1.0), seed)


def blocks_of(subject: Subject, kind: str, blocks: str = "all") -> list[np.ndarray]:
    """A dense curvature of the mean loss, whole or by layers."""
    method = Dense(kind=kind, blocks=blocks)  # type: ignore[arg-type]
    matrices = method.matrices(subject.stream, subject.task.loss)
    return [matrix.numpy() for matrix in matrices.values()]


def matrices_of(subject: Subject, seed: int) -> dict[str, list[np.ndarray]]:
    """The matrices of all `NAMES`, each as its diagonal blocks."""
    found = {
        "hessian": blocks_of(subject, "hessian"),
        "ggn": blocks_of(subject, "gauss_newton"),
        "block": blocks_of(subject, "gauss_newton", "layers"),
        "fisher": blocks_of(subject, "fisher"),
    }
    ways = {"": "exact", "_one": "1 target from the model", "_weighted": "1 weighted target"}
    for ending, way in ways.items():
        for name, corrected in (("ekfac", True), ("kfac", False)):
            if name + ending in NAMES:
                fitted = fit_kronecker(subject, way, seed, corrected=corrected)
                found[name + ending] = list(kronecker_blocks(fitted).values())
    found["identity"] = [np.zeros_like(block) for block in found["block"]]
    return {name: found[name] for name in NAMES}


@dataclass(frozen=True)
class Rotated:
    """Gradients in the eigenvectors of a curvature.

    Attributes:
        values: eigenvalues, absolute, `[P]`.
        train: `[n, P]`.
        queries: `[q, P]`.
    """

    values: np.ndarray
    train: np.ndarray
    queries: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[np.ndarray], train: np.ndarray, queries: np.ndarray) -> "Rotated":
        """Diagonalise each block."""
        parts, start = [], 0
        for block in blocks:
            where = slice(start, start + len(block))
            start += len(block)
            if not block.any():
                parts.append((np.zeros(len(block)), train[:, where], queries[:, where]))
                continue
            values, vectors = torch.linalg.eigh(torch.from_numpy(block))
            turned = vectors.numpy()
            absolute = values.abs().numpy()
            parts.append((absolute, train[:, where] @ turned, queries[:, where] @ turned))
        values, turned_train, turned_queries = zip(*parts, strict=True)
        return cls(
            np.concatenate(values),
            np.concatenate(turned_train, 1),
            np.concatenate(turned_queries, 1),
        )

    def scores(self, damping: float) -> np.ndarray:
        """Influence on the measurement, `[q, n]`; positive = proponent."""
        weighted = self.queries / (self.values + damping)
        return -(weighted @ self.train.T) / len(self.train)

    def self_influence(self, damping: float) -> np.ndarray:
        """`gᵀ (C + λI)⁻¹ g` of each example, `[n]`."""
        return np.square(self.train) @ (1 / (self.values + damping))


def residuals(matrices: Mapping[str, list[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """For each rung below the first, the step from the one above and the way from the Hessian."""
    whole = {name: joined_blocks(matrices[name]) for name in LADDER}
    steps = {}
    for above, name in pairwise(LADDER):
        steps[name] = (
            relative_residual(whole[above], whole[name]),
            relative_residual(whole["hessian"], whole[name]),
        )
    return steps


@dataclass(frozen=True)
class Share:
    """What K-FAC's error on one network is made of.

    Attributes:
        title: of the network.
        way: how the factors are estimated.
        kfac: `‖G − K‖ / ‖G‖` over the diagonal blocks G.
        ekfac: `‖G − E‖ / ‖G‖`, with G's own second moments in the same basis.
        share: `‖E − K‖² / ‖G − K‖²`.
        defect: by how much the two parts fail to add up, relative.
        trace: relative difference of the traces of E and G.
    """

    title: str
    way: str
    kfac: float
    ekfac: float
    share: float
    defect: float
    trace: float


@dataclass(frozen=True)
class Anatomy:
    """A network's exact matrices against each other.

    Attributes:
        title: of the network.
        residual: `‖H − G‖ / ‖H‖`.
        off_block: `‖G − blk(G)‖ / ‖G‖`.
        same_layer: `‖blk(H) − blk(G)‖ / ‖blk(H)‖`.
        lowest: eigenvalue of the Hessian.
    """

    title: str
    residual: float
    off_block: float
    same_layer: float
    lowest: float


def anatomy(subject: Subject, hessian: np.ndarray, ggn: np.ndarray) -> Anatomy:
    """Compare a network's Hessian with its Gauss-Newton matrix."""
    sizes = [block.size for block in subject.stream.plan.blocks.values()]
    own = diagonal_blocks(hessian, sizes)
    return Anatomy(
        subject.network.title,
        relative_residual(hessian, ggn),
        off_block_energy(ggn, sizes),
        relative_residual(own, diagonal_blocks(ggn, sizes)),
        float(torch.linalg.eigvalsh(torch.from_numpy(hessian))[0]),
    )


def shares(subject: Subject, blocks: Sequence[np.ndarray], seed: int) -> list[Share]:
    """K-FAC's error against the exact blocks, apart, for every way to estimate the factors."""
    whole = joined_blocks(blocks)
    found = []
    for way in FACTORS:
        fitted = fit_kronecker(subject, way, seed, corrected=False)
        corrected = joined_blocks(_projected(fitted, blocks))
        products = joined_blocks(kronecker_blocks(fitted))
        error, size = kronecker_error(whole, corrected, products), np.square(whole).sum()
        found.append(
            Share(
                subject.network.title,
                way,
                float((error.total / size) ** 0.5),
                float((error.basis / size) ** 0.5),
                error.eigenvalue_share,
                error.defect,
                abs(float(np.trace(corrected) / np.trace(whole)) - 1),
            )
        )
    return found


def _projected(fitted: FittedKronecker, blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The matrices diagonal in the Kronecker basis that are closest to the blocks."""
    found = []
    for block, matrix in zip(fitted.blocks.values(), blocks, strict=True):
        basis = block.basis
        assert basis.left_vectors is not None
        assert basis.right_vectors is not None
        left, right = basis.left_vectors.contiguous(), basis.right_vectors.contiguous()
        vectors = torch.kron(left, right).numpy()
        moments = np.einsum("pi,pi->i", vectors, matrix @ vectors)
        found.append((vectors * moments) @ vectors.T)
    return found
