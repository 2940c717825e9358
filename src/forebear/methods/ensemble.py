"""Several methods' scores as one: what they agree on."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from forebear.descriptions import same
from forebear.errors import DataError, MismatchError, NumericalWarning, unknown_name
from forebear.methods.fitted import version
from forebear.types import UNSIGNED, Provenance, Scores


def combine(
    scores: Sequence[Scores],
    how: Literal["z", "rank"] = "z",
    weights: Sequence[float] | None = None,
) -> Scores:
    """A weighted mean of standardised scores of the same queries and examples.

    Each member is standardised over the training examples of a query, so that its scale and offset
    play no part. Positive = more of a proponent than the average example.

    Args:
        scores: of different methods, models or seeds, two or more.
        how: `"z"` takes scores less their mean, over their standard deviation. `"rank"` does the
            same with their ranks, ties averaged: it forgets how much the strongest examples stand
            out, which sums over many examples live on.
        weights: one for each member, above zero; equal when left out.

    Raises:
        MismatchError: members are about other queries or training examples.
        DataError: there are fewer than two, or weights do not fit.
    """
    members = list(scores)
    if len(members) < 2:
        raise DataError(f"{len(members)} scores were given: combine two or more")
    if how not in ("z", "rank"):
        raise unknown_name("way to combine", str(how), ("z", "rank"))
    shares = _shares(weights, len(members))
    for other in members[1:]:
        _require_same(members[0], other)
    total = torch.zeros(members[0].values.shape, dtype=torch.float64)
    for member, share in zip(members, shares, strict=True):
        values = member.values.double()
        total += share * _standardised(_ranks(values) if how == "rank" else values, member)
    return Scores(
        values=total.to(members[0].values.dtype),
        query_ids=members[0].query_ids,
        train_ids=members[0].train_ids,
        provenance=_provenance(members, how, shares),
    )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise DataError(f"{len(given)} weights were given for {count} scores: give one each")
    if not all(np.isfinite(weight) and weight > 0 for weight in given):
        raise DataError(f"weights are {given}: they must be finite and above zero")
    return [weight / sum(given) for weight in given]


def _require_same(one: Scores, other: Scores) -> None:
    names = one.provenance.method, other.provenance.method
    for what in ("query_ids", "train_ids"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if not np.array_equal(mine, theirs):
            raise MismatchError(
                f"{what} of {names[0]} and {names[1]} differ: score the same queries against the "
                "same training examples, in the same order"
            )
    for what in ("train", "queries"):
        mine, theirs = getattr(one.provenance, what), getattr(other.provenance, what)
        if mine and theirs:
            one.provenance.require_same(other.provenance, (what,))


def _standardised(values: Tensor, member: Scores) -> Tensor:
    """`[q, n]` of mean 0 and variance 1 in each row; rows that are constant are zero."""
    centred = values - values.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    # Of a constant row rounding alone is left.
    size = values.abs().amax(1, keepdim=True)
    flat = spread <= 1e-12 * size.clamp_min(torch.finfo(values.dtype).tiny)
    if flat.any():
        warnings.warn(
            f"{member.provenance.method} gives all examples the same score for {int(flat.sum())} "
            "queries: it has no part in theirs",
            NumericalWarning,
            stacklevel=3,
        )
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, spread))


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # large, and rarely needed

    return torch.from_numpy(rankdata(values.numpy(), axis=1))


def _provenance(members: list[Scores], how: str, shares: list[float]) -> Provenance:
    abouts = [member.provenance for member in members]
    seen = [about.coverage for about in abouts if about.coverage is not None]
    models = {about.model for about in abouts if about.model}
    parts: list[dict[str, Any]] = [
        {
            "method": about.method,
            "settings": dict(about.settings),
            "weight": share,
            "loss": about.loss,
            "measure": about.measure,
        }
        for about, share in zip(abouts, shares, strict=True)
    ]
    unsigned = any(about.sign == UNSIGNED for about in abouts)
    return Provenance(
        method="combine",
        settings={"how": how, "members": parts},
        coverage=min(seen) if seen else None,
        model=models.pop() if len(models) == 1 else "",
        train=abouts[0].train,
        queries=abouts[0].queries,
        version=version(),
        sign=UNSIGNED if unsigned else abouts[0].sign,
        loss=_shared([about.loss for about in abouts]),
        measure=_shared([about.measure for about in abouts]),
    )


def _shared(descriptions: list[Any]) -> Any:
    """What all members have; None where they differ, which is no mistake: each says its own."""
    first, *others = descriptions
    return first if all(same(first, other) for other in others) else None
