"""Moments and squares where an example has several gradients, one for each target."""

import torch
from torch import Tensor

from forebear.curvature.basis import Basis
from forebear.curvature.moments import FactorMoments, add_gram
from forebear.gradients import Precision
from forebear.layers import Factors


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
