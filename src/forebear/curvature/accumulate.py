"""The passes of K-FAC and EK-FAC: moments and squares of a piece of the data.

An example may have several gradients, one for each target.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.basis import Basis
from forebear.curvature.moments import FactorMoments, add_gram
from forebear.curvature.outputs import AllTargets, DrawnTargets, gradients_of_each
from forebear.curvature.sampled import Sampled
from forebear.differentiation import Function
from forebear.gradients import Precision, cast, positions_of
from forebear.layers import Factors

MAX_DIMENSION = 8192
"""Sides longer than this get a diagonal second moment: their eigenvectors would not fit."""


@dataclass(frozen=True)
class Targets:
    """The targets at which gradients are taken.

    Attributes:
        kind: `"sampled"` from the model's prediction, `"exact"`: all of them, or `"empirical"`.
        draws: sampled for each example.
        function: the training loss.
        seed: of the draws.
    """

    kind: str
    draws: int
    function: Function
    seed: int

    def gradients(
        self, stream: GradientStream, piece: int, description: str
    ) -> Iterator[list[Gradients]]:
        """Batch by batch, the gradients at each target of an example."""
        if self.kind == "exact":
            return gradients_of_each(stream, AllTargets(stream), description)
        if self.draws > 1:
            drawn = DrawnTargets(stream, self.draws, self.seed, piece)
            return gradients_of_each(stream, drawn, description)
        function = self.function
        if self.kind == "sampled":
            function = Sampled(stream.task, self.seed, piece)
        return ([g] for _, _, g in stream.gradients(function, description))


class Kept:
    """Factors of the training set between two passes, while they fit into `room` bytes.

    In bfloat16 where squares are formed from them in that precision.
    """

    def __init__(self, room: int, precision: Precision) -> None:
        self.room = room
        self.precision = precision
        self.pieces: dict[int, list[list[Gradients]]] = {}

    def add(self, piece: int, several: list[Gradients]) -> None:
        """Keep a batch; when they do not fit, nothing."""
        if self.room < 0:
            return
        narrow = [self._narrow(gradients) for gradients in several]
        self.room -= _bytes(narrow)
        self.pieces.setdefault(piece, []).append(narrow)
        if self.room < 0:
            self.pieces.clear()

    def of(self, piece: int) -> list[list[Gradients]] | None:
        """The batches of a piece; None where they did not fit."""
        return self.pieces.get(piece)

    def _narrow(self, gradients: Gradients) -> Gradients:
        if self.precision == "float32":
            return gradients
        return {
            name: [cast(term, torch.bfloat16) for term in terms] if _flat(terms) else terms
            for name, terms in gradients.items()
        }


def moments_of(
    targets: Targets, reduce: bool, kept: Kept | None, stream: GradientStream, piece: int
) -> dict[str, Tensor]:
    """Sums of the factors' second moments over a piece, `FactorMoments.tensors` of every block.

    With the number of all positions of each block, those of padding included.
    """
    moments: dict[str, FactorMoments] = {}
    positions = dict.fromkeys(stream.plan.blocks, 0)
    for several in targets.gradients(stream, piece, "curvature factors"):
        if kept is not None:
            kept.add(piece, several)
        for name, block in stream.plan.blocks.items():
            terms = [gradients[name] for gradients in several]
            if name not in moments:
                moments[name] = FactorMoments.start(block, terms[0], MAX_DIMENSION)
            add_moments(moments[name], terms, reduce=reduce)
            positions[name] += positions_of(terms[0]) * len(terms[0][0].right)
    found: dict[str, Tensor] = {}
    for name, sums in moments.items():
        found |= sums.tensors(name) | {f"{name}/all_positions": torch.tensor(positions[name])}
    return found


def squares_of(
    targets: Targets,
    bases: dict[str, Basis],
    precision: Precision,
    kept: Kept | None,
    stream: GradientStream,
    piece: int,
) -> dict[str, Tensor]:
    """Squared gradients in a basis, summed over a piece, `[rows, cols]` of every block."""
    totals = {name: basis.empty() for name, basis in bases.items()}
    again: Iterable[list[Gradients]] | None = None if kept is None else kept.of(piece)
    if again is None:
        again = targets.gradients(stream, piece, "curvature eigenvalues")
    for several in again:
        for name, basis in bases.items():
            terms = [gradients[name] for gradients in several]
            add_squares(basis, totals[name], terms, precision)
    return totals


def add_moments(moments: FactorMoments, several: list[list[Factors]], *, reduce: bool) -> None:
    """Add a batch to the moments of a block.

    Args:
        moments: sums so far.
        several: terms of the block for each target; targets add up on the side of the gradients,
            and what went into the layer counts once.
        reduce: sum gradients and average inputs over positions first, the "reduce" setting of
            Eschenhagen et al. (2023); one-hot terms are left as they are.
    """
    if len(several) == 1 and not reduce:
        moments.add(several[0])
        return
    for terms in zip(*several, strict=True):  # the same term for each target
        if terms[0].left.is_floating_point():
            _add_floating(moments, terms, reduce=reduce)
        else:
            _add_one_hot(moments, terms)


def _add_floating(moments: FactorMoments, terms: tuple[Factors, ...], *, reduce: bool) -> None:
    lefts, right = torch.stack([term.left for term in terms]), terms[0].right  # [k, b, t, o]
    if right.shape[1] > 1:
        used = lefts.any(-1).any(0)  # [b, t]; a position without gradient is padding
        if reduce:
            count = used.sum(1, keepdim=True).clamp_min(1)
            right = torch.einsum("bti,bt->bi", right, used.to(right) / count)
            lefts = lefts.sum(2)
        else:
            right = right[used]
    flat_right = right.flatten(0, -2)
    add_gram(moments.left, lefts.flatten(0, -2))
    add_gram(moments.right, flat_right)
    moments.positions += len(flat_right)


def _add_one_hot(moments: FactorMoments, terms: tuple[Factors, ...]) -> None:
    rights = torch.stack([term.right for term in terms]).flatten(1, 2)  # [k, b * t, i]
    used = rights.any(-1).any(0)
    index = terms[0].left.flatten()[used]
    moments.left.index_add_(0, index, torch.ones_like(index, dtype=moments.left.dtype))
    add_gram(moments.right, rights[:, used].flatten(0, 1))
    moments.positions += int(used.sum())


def add_squares(
    basis: Basis, total: Tensor, several: list[list[Factors]], precision: Precision
) -> None:
    """Add the squared gradients in a basis, summed over targets and examples, to `total`."""
    terms = several[0]
    if len(several) == 1 or len(terms) > 1 or not _is_flat(terms[0]):
        for one in several:
            basis.add_squares(total, one, precision)
        return
    # Without positions the square of `left ⊗ right` is a product of squares, and targets differ on
    # the left only: one product serves them all.
    lefts = torch.stack([one[0].left[:, 0] for one in several])  # [k, b, rows]
    left, right = basis.rotate([Factors(lefts, terms[0].right[:, 0])])[0]
    total.addmm_(left.square().sum(0).T, right.square())


def _is_flat(term: Factors) -> bool:
    return term.left.is_floating_point() and term.left.shape[1] == 1


def _flat(terms: list[Factors]) -> bool:
    """Whether squares are formed from factors, which bfloat16 is good enough for."""
    return len(terms) == 1 and _is_flat(terms[0])


def _bytes(several: list[Gradients]) -> int:
    """Of all factors; those that are shared count once."""
    sides = {
        id(side): side.nbytes
        for gradients in several
        for terms in gradients.values()
        for term in terms
        for side in term
    }
    return sum(sides.values())
