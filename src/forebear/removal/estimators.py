"""Parameters after removing examples, without retraining.

For a removed set T of k of n examples, with `G_T` and `H_T` the sums of their gradients and
Hessians at the optimum and `H` the Hessian of the whole objective (sum convention, penalty
included), the shift of the parameters is, by

- influence: `H⁻¹ G_T` (Cook & Weisberg 1980; Koh & Liang 2017);
- rescaled influence: `Σ_{i∈T} (H − H_i)⁻¹ g_i` (Rubinstein & Hopkins 2025);
- rescaled_n: that times `n / (n − k)`; rescaled_d: the same sum with H as if k − 1 average
  examples were gone, its penalty kept;
- newton_step: `(H − H_T)⁻¹ G_T` (Pregibon 1981);
- newton_step_2: the Newton step less half the third-order term along it;
- exact: the optimum itself, for linear models.

Influence and rescaled influence are sums over the members of T; the size-corrected ones are for a
given k. Every function takes all sets at once, `[m, k]`.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from forebear.errors import NumericalWarning, TaskError, unknown_name
from forebear.removal.models import (
    LinearModel,
    minimise,
    outputs,
    pulled_back,
    warn_of_labels_unseen,
)
from forebear.removal.problem import WORKSPACE, Factorised, as_sets, kernels

Estimator = Literal[
    "influence",
    "rescaled",
    "rescaled_n",
    "rescaled_d",
    "newton_step",
    "newton_step_2",
    "exact",
]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

LEVERAGE_MARGIN = 1e-8
"""How near a leverage may come to one before it is held there with a warning."""

CHORD_STEPS = 60
CONTRACTION = 0.5
"""A fixed Hessian is kept while each step is at most this much of the one before."""


def shift(factorised: Factorised, groups: Tensor, estimator: str) -> Tensor:
    """How removing each of the sets `[m, k]` moves the parameters, `[m, P]`.

    Raises:
        DataError: a set is empty, everything, or has duplicates or unknown positions.
        TaskError: what is left has no curvature in some direction, or no optimum, or the model is
            not linear and its third derivatives were asked for.
        UnknownNameError: there is no such estimator.
    """
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", str(estimator), ESTIMATORS)
    sets = as_sets(groups, len(factorised.problem.ids))
    if estimator == "influence":
        return influence(factorised, sets)
    if estimator == "rescaled":
        return rescaled(factorised, sets)
    if estimator == "rescaled_n":
        n, k = len(factorised.problem.ids), sets.shape[1]
        return rescaled(factorised, sets) * (n / (n - k))
    if estimator == "rescaled_d":
        return rescaled_d(factorised, sets)
    parts = [
        _by_newton(factorised, sets[rows], estimator)
        for rows in _chunks(factorised, sets, estimator)
    ]
    return torch.cat(parts)


def influence(factorised: Factorised, sets: Tensor) -> Tensor:
    """`H⁻¹ G_T`, `[m, P]`."""
    return factorised.solve(_pulled(factorised, sets, factorised.problem.residuals))


def rescaled(factorised: Factorised, sets: Tensor) -> Tensor:
    """`Σ_{i∈T} (H − H_i)⁻¹ g_i`, `[m, P]`."""
    used, where = sets.unique(return_inverse=True)
    problem = factorised.problem
    cotangents = corrected_residuals(
        problem.residuals[used], problem.curvatures[used], factorised.kernels[used]
    )
    return factorised.solve(_pulled(factorised, sets, cotangents, where))


def rescaled_d(factorised: Factorised, sets: Tensor) -> Tensor:
    """`Σ_{i∈T} (H_k − H_i)⁻¹ g_i` with H_k as if k − 1 average examples were gone, `[m, P]`."""
    n, k = len(factorised.problem.ids), sets.shape[1]
    problem = factorised.problem
    share = 1 - (k - 1) / (n - 1)
    fixed = problem.penalty_matrix()
    smaller = share * (factorised.hessian - fixed) + fixed
    factor, failed = torch.linalg.cholesky_ex(smaller)
    if failed:
        raise TaskError(_singular(smaller, f"the Hessian of {n - k + 1} of {n} examples"))
    used, where = sets.unique(return_inverse=True)
    reach = factorised.kernels[used] if k == 1 else kernels(problem, factor, used)
    cotangents = corrected_residuals(problem.residuals[used], problem.curvatures[used], reach)
    return torch.cholesky_solve(_pulled(factorised, sets, cotangents, where).T, factor).T


def corrected_residuals(residuals: Tensor, curvatures: Tensor, kernels: Tensor) -> Tensor:
    """`(I − V_i K_i)⁻¹ r_i`, `[u, c]`: `J_iᵀ` of it, solved with H, is `(H − H_i)⁻¹ g_i`.

    With one output this is `r_i / (1 − h_i)`. With `V = S Sᵀ` it is
    `r + S (I − SᵀKS)⁻¹ SᵀK r`, whose middle is symmetric: its eigenvalues are leverages.
    """
    values, vectors = torch.linalg.eigh(curvatures)
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    middle = roots.mT @ kernels @ roots
    leverages, basis = torch.linalg.eigh(0.5 * (middle + middle.mT))
    left = 1 - leverages
    too_near = (left < LEVERAGE_MARGIN).any(-1)
    if too_near.any():
        warnings.warn(
            f"{int(too_near.sum())} examples have a leverage within {LEVERAGE_MARGIN:g} of one: "
            "without them the model is not determined; their effects are cut off, add a penalty",
            NumericalWarning,
            stacklevel=4,
        )
    left = left.clamp_min(LEVERAGE_MARGIN)
    pushed = basis.mT @ (roots.mT @ (kernels @ residuals[..., None]))
    return residuals + (roots @ (basis @ (pushed / left[..., None])))[..., 0]


@dataclass(frozen=True)
class Without:
    """`(H − H_T)⁻¹` for many sets: by Woodbury where that is smaller, or factorised anew.

    `factor` is `[m, k·c, k·c]` of `I − R_T H⁻¹ R_Tᵀ` with `H_T = R_Tᵀ R_T`, and `solved`
    `H⁻¹ R_Tᵀ`; without `solved` it is the `[m, P, P]` factor of `H − H_T`.
    """

    factorised: Factorised
    factor: Tensor
    rows: Tensor | None = None
    solved: Tensor | None = None

    @classmethod
    def of(cls, factorised: Factorised, sets: Tensor) -> "Without":
        """Factorise for sets `[m, k]`.

        Raises:
            TaskError: H − H_T is not positive definite; names its smallest eigenvalue.
        """
        problem = factorised.problem
        rows = _root_rows(factorised, sets)  # [m, k·c, P]
        if rows.shape[1] <= problem.size:
            solved = factorised.solve(rows)
            system = -(solved @ rows.mT)
            system = 0.5 * (system + system.mT)
            system.diagonal(dim1=1, dim2=2).add_(1)
        else:
            solved, system = None, factorised.hessian - rows.mT @ rows
        factor, failed = torch.linalg.cholesky_ex(system)
        # Where an example alone determines a direction, 1 − h is rounding: a pivot, but no number.
        pivots = factor.diagonal(dim1=1, dim2=2).square() / system.diagonal(dim1=1, dim2=2).abs()
        bad = (failed > 0) | ~(pivots.min(1).values > 1e-12)
        if solved is not None:
            bad |= ~(factor.diagonal(dim1=1, dim2=2).square().min(1).values > 1e-12)
        if bad.any():
            first = int(torch.nonzero(bad)[0])
            left = factorised.hessian - rows[first].T @ rows[first]
            raise TaskError(_singular(left, f"the Hessian without set {first}"))
        return cls(factorised, factor, rows if solved is not None else None, solved)

    def solve(self, vectors: Tensor) -> Tensor:
        """`(H − H_T)⁻¹ v` for one vector a set, `[m, P]`."""
        if self.solved is None or self.rows is None:
            return torch.cholesky_solve(vectors[..., None], self.factor)[..., 0]
        plain = self.factorised.solve(vectors)
        inner = torch.cholesky_solve(self.rows @ plain[..., None], self.factor)
        return plain + (self.solved.mT @ inner)[..., 0]


def _by_newton(factorised: Factorised, sets: Tensor, estimator: str) -> Tensor:
    without = Without.of(factorised, sets)
    gradients = _pulled(factorised, sets, factorised.problem.residuals)
    step = without.solve(gradients)
    if estimator == "newton_step":
        return step
    model = factorised.problem
    if not isinstance(model, LinearModel):
        raise TaskError(
            f"{estimator} needs a linear model: its third derivatives, or refitting, are not "
            "available for a network; use newton_step, or retrain with a Recipe"
        )
    kept = mask_of(sets, len(model.ids))
    if estimator == "newton_step_2":
        return step - 0.5 * without.solve(_third_order(model, step, kept))
    warn_of_labels_unseen(model, kept)
    return _exact(model, without, step, kept)


def _third_order(model: LinearModel, step: Tensor, kept: Tensor) -> Tensor:
    """`Σ_{i∉T} ℓ'''_i(J_i s, J_i s) J_i` along steps `[m, P]`, `[m, P]`."""
    along = outputs(model.features, step.view(-1, *model.parameters.shape))  # [m, n, c]
    third = model.family.third(model.predictions, along)
    third = third * (model.weights * kept)[..., None]
    return pulled_back(model.features, third).flatten(1)


def _exact(model: LinearModel, without: Without, step: Tensor, kept: Tensor) -> Tensor:
    """Optima less the parameters, `[m, P]`: from the Newton step on, with its Hessian kept.

    Near the optimum steps with a kept Hessian shrink by about the size of the shift each time, and
    cost P times less than new ones; where they do not, Newton's method takes over.
    """
    start = model.parameters
    theta = start + step.view(-1, *start.shape)
    tolerance = 1e-12 * (1 + start.norm())
    last = torch.full((len(theta),), torch.inf, dtype=theta.dtype)
    settled = torch.zeros(len(theta), dtype=torch.bool)
    for _ in range(CHORD_STEPS):
        move = without.solve(model.gradients_at(theta, kept))
        size = move.norm(dim=1)
        shrinking = size <= CONTRACTION * last
        settled |= size < tolerance
        theta = torch.where(
            (settled | shrinking)[:, None, None], theta - move.view_as(theta), theta
        )
        if bool((settled | ~shrinking).all()):
            break
        last = torch.minimum(last, size)
    rest = torch.nonzero(~settled)[:, 0]
    if len(rest):
        theta[rest] = minimise(model, theta[rest], kept[rest])
    return (theta - start).flatten(1)


def mask_of(sets: Tensor, size: int) -> Tensor:
    """Zero for removed examples and one for the rest, `[m, n]`."""
    kept = torch.ones(len(sets), size, dtype=torch.float64)
    return kept.scatter_(1, sets, 0.0)


def _pulled(
    factorised: Factorised, sets: Tensor, cotangents: Tensor, where: Tensor | None = None
) -> Tensor:
    """`Σ_{i∈T} J_iᵀ v_i`, `[m, P]`, in bounded memory; `where` are the sets' rows of `v`."""
    problem = factorised.problem
    out = cotangents.new_empty(len(sets), problem.size)
    step = max(1, WORKSPACE // (sets.shape[1] * max(1, problem.size // cotangents.shape[1])))
    for start in range(0, len(sets), step):
        part = slice(start, start + step)
        picked = cotangents[sets[part] if where is None else where[part]]
        out[part] = problem.pull(sets[part], picked)
    return out


def _root_rows(factorised: Factorised, sets: Tensor) -> Tensor:
    """`R_T` with `R_Tᵀ R_T = H_T`, `[m, k·c, P]`."""
    problem = factorised.problem
    m, k = sets.shape
    values, vectors = torch.linalg.eigh(problem.curvatures[sets])  # [m, k, c, c]
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    jacobian = problem.jacobian(sets.flatten()).view(m, k, -1, problem.size)
    return (roots.mT @ jacobian).flatten(1, 2)


def _chunks(factorised: Factorised, sets: Tensor, estimator: str) -> list[slice]:
    """As many sets at a time as fit into the workspace."""
    problem = factorised.problem
    n, c = problem.residuals.shape
    columns = sets.shape[1] * c
    each = columns * problem.size * 3 + min(columns, problem.size) ** 2
    each = each if columns <= problem.size else each + problem.size**2
    each = each if estimator == "newton_step" else each + 4 * n * c
    step = max(1, WORKSPACE // each)
    return [slice(start, start + step) for start in range(0, len(sets), step)]


def _singular(matrix: Tensor, what: str) -> str:
    lowest = torch.linalg.eigvalsh(matrix)[0].item()
    return (
        f"{what} is singular or indefinite: its smallest eigenvalue is {lowest:.3g}; add a penalty "
        "or damping, or remove fewer examples"
    )
