"""Linear models with a convex loss: least squares, ridge, logistic and multinomial regression.

The optimum is found by Newton's method, and everything that removal estimates need is in closed
form. Sum convention, as in `forebear.removal.problem`.
"""

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, NumericalWarning, TaskError
from forebear.removal.families import Family, Logistic, Softmax, Squared

SMALLEST_STEP = 1e-12
"""Newton iterations stop when a step is this much smaller than the parameters."""

MOST_STEPS = 100

SEPARATED = 1e-9
"""A mean loss below this has no curvature left to solve with: the labels are separated."""


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A linear model of `features` with parameters `[p, c]`, fitted or to be fitted.

    Attributes:
        features: `[n, p]` in float64; a column of ones is an intercept.
        targets: `[n, c]`, or labels `[n]` for `Softmax`.
        family: the loss.
        penalty: Λ of each column, `[p]`, in the sum convention: `½ Σ_j Λ_j ‖θ_j‖²`.
        weights: of the examples, `[n]`.
        parameters: `[p, c]`.
        ids: of the examples.
    """

    features: Tensor
    targets: Tensor
    family: Family
    penalty: Tensor
    weights: Tensor
    parameters: Tensor
    ids: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls,
        features: Tensor | np.ndarray,
        targets: Tensor | np.ndarray,
        *,
        family: str | Family | None = None,
        penalty: float | Tensor | np.ndarray = 0.0,
        intercept: bool = False,
        weights: Tensor | np.ndarray | None = None,
        ids: np.ndarray | None = None,
        parameters: Tensor | np.ndarray | None = None,
    ) -> "LinearModel":
        """A model with zero parameters, or those given; call `fitted` for the optimum.

        Args:
            features: `[n, p]`.
            targets: `[n]` or `[n, c]` numbers, or integer labels.
            family: `"squared"`, `"logistic"` or `"softmax"`; when left out, integer labels are a
                classification and numbers a regression.
            penalty: λ of all columns, or one a column, `[p]`; in the sum convention.
            intercept: put an unpenalised column of ones last.
            weights: of the examples; one each when left out.
            ids: of the examples; positions when left out.
            parameters: `[p, c]` or `[p]`, the intercept last.

        Raises:
            DataError: shapes do not fit, values are not finite, or weights or penalty negative.
        """
        x = _own(features).double()
        y = _own(targets)
        if x.ndim != 2 or len(x) == 0 or len(x) != len(y):
            raise DataError(
                f"features have shape {tuple(x.shape)} and there are {len(y)} targets: they must "
                "be [n, p] and one target a row"
            )
        chosen = _family(family, y)
        y, outputs = _targets(chosen, y)
        lam = torch.as_tensor(penalty, dtype=torch.float64).expand(x.shape[1]).clone()
        if intercept:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            lam = torch.cat([lam, lam.new_zeros(1)])
        w = x.new_ones(len(x)) if weights is None else torch.as_tensor(weights).double()
        if w.shape != (len(x),) or not bool((w >= 0).all()) or not bool(w.any()):
            raise DataError(f"weights {tuple(w.shape)} must be {len(x)} numbers >= 0, not all zero")
        if not bool((lam >= 0).all()):
            raise DataError(f"penalty {lam.min().item():.3g} is negative: it must be >= 0")
        for what, values in (("features", x), ("targets", y.double())):
            if not torch.isfinite(values).all():
                row = int(torch.nonzero(~torch.isfinite(values).reshape(len(x), -1).all(1))[0])
                raise DataError(f"{what} of row {row} are NaN or infinite: repair or drop the row")
        theta = (
            x.new_zeros(x.shape[1], outputs)
            if parameters is None
            else torch.as_tensor(parameters, dtype=torch.float64).reshape(x.shape[1], outputs)
        )
        names = np.arange(len(x)) if ids is None else np.asarray(ids)
        if len(names) != len(x) or len(np.unique(names)) != len(names):
            raise DataError(f"{len(names)} ids for {len(x)} rows: give one different id each")
        return cls(x, y, chosen, lam, w, theta, names)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def outputs(self) -> int:
        """Number of outputs c."""
        return self.parameters.shape[1]

    @property
    def size(self) -> int:
        """Number of parameters P = p·c, written out row by row."""
        return self.parameters.numel()

    @property
    def residuals(self) -> Tensor:
        """First derivatives of the losses in the outputs at the parameters, `[n, c]`."""
        return self._derivatives[0]

    @property
    def curvatures(self) -> Tensor:
        """Second derivatives, `[n, c, c]`."""
        return self._derivatives[1]

    @cached_property
    def predictions(self) -> Tensor:
        """Outputs `[n, c]`."""
        return self.features @ self.parameters

    def hessian(self) -> Tensor:
        """H at the parameters, `[P, P]`."""
        return self.hessian_at(self.curvatures[None])[0]

    def penalty_matrix(self) -> Tensor:
        """Λ and the gauge of a softmax, `[P, P]`."""
        return torch.diag(self.penalty.repeat_interleave(self.outputs)) + self._gauge

    def jacobian(self, rows: Tensor) -> Tensor:
        """`x_i ⊗ I`, `[u, c, P]`."""
        eye = torch.eye(self.outputs, dtype=self.features.dtype)
        return torch.einsum("up,ab->uapb", self.features[rows], eye).flatten(2)

    def pull(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """`Σ_k x_i ⊗ v_i`, `[m, P]`."""
        return (self.features[rows].mT @ cotangents).flatten(1)

    def gradient(self) -> Tensor:
        """`∇L`, `[P]`."""
        return self.gradients_at(self.parameters[None], None)[0]

    def objective_at(self, parameters: Tensor, kept: Tensor | None) -> Tensor:
        """L without some examples at parameters `[m, p, c]`, `[m]`; `kept` is `[m, n]` of 0, 1."""
        losses = self.weights * self.family.loss(outputs(self.features, parameters), self.targets)
        losses = losses if kept is None else losses * kept
        return losses.sum(1) + 0.5 * (self.penalty[:, None] * parameters.square()).sum((1, 2))

    def gradients_at(self, parameters: Tensor, kept: Tensor | None) -> Tensor:
        """Its gradient, `[m, P]`."""
        residuals = self.family.residual(outputs(self.features, parameters), self.targets)
        weights = self.weights if kept is None else self.weights * kept
        pulled = pulled_back(self.features, residuals * weights[..., None])
        return (pulled + self.penalty[:, None] * parameters).flatten(1)

    def curvatures_at(self, parameters: Tensor, kept: Tensor | None) -> Tensor:
        """Second derivatives in the outputs, `[m, n, c, c]`."""
        weights = self.weights if kept is None else self.weights * kept
        return self.family.curvature(outputs(self.features, parameters)) * weights[..., None, None]

    def hessian_at(self, curvatures: Tensor) -> Tensor:
        """`Σ_i x_i x_iᵀ ⊗ V_i + Λ` for `V` `[m, n, c, c]`, `[m, P, P]`."""
        p, c, x = self.features.shape[1], self.outputs, self.features
        blocks = x.new_empty(len(curvatures), p, c, p, c)
        for a in range(c):
            for b in range(a, c):
                moment = x.T @ (curvatures[..., a, b, None] * x)
                blocks[:, :, a, :, b] = moment
                blocks[:, :, b, :, a] = moment
        return blocks.reshape(-1, self.size, self.size) + self.penalty_matrix()

    def fitted(self, start: Tensor | None = None) -> "LinearModel":
        """The model at the optimum of its objective, by Newton's method from `start` `[p, c]`.

        Raises:
            TaskError: there is no optimum (separated labels without a penalty), or it is not
                unique (columns that others determine, without a penalty).
        """
        theta = self.parameters if start is None else start
        if bool((self.penalty == 0).any()) and not isinstance(self.family, Squared):
            self._require_both_labels()
        solved = minimise(self, theta[None], None)
        return replace(self, parameters=solved[0])

    @cached_property
    def _derivatives(self) -> tuple[Tensor, Tensor]:
        first = self.family.residual(self.predictions, self.targets)
        second = self.family.curvature(self.predictions)
        return self.weights[:, None] * first, self.weights[:, None, None] * second

    @cached_property
    def _gauge(self) -> Tensor:
        """Curvature of directions that shift all logits of an unpenalised column alike.

        A softmax does not see them and every gradient is orthogonal to them, so any positive
        curvature there leaves all results as they are and makes H invertible.
        """
        matrix = self.features.new_zeros(self.size, self.size)
        if isinstance(self.family, Softmax):
            scale = self.features.square().sum(0) + 1e-300
            free = torch.where(self.penalty == 0, scale, torch.zeros_like(scale))
            ones = torch.full((self.outputs, self.outputs), 1.0 / self.outputs, dtype=scale.dtype)
            matrix = torch.kron(torch.diag(free), ones)
        return matrix

    def _require_both_labels(self) -> None:
        used = self.targets[self.weights > 0]
        if len(used.unique(dim=0)) < 2:
            raise TaskError("all labels are the same and a column is unpenalised: no optimum")


def outputs(features: Tensor, parameters: Tensor) -> Tensor:
    """Outputs of `[n, p]` at many parameters `[m, p, c]`, `[m, n, c]`: one product for all."""
    m, p, c = parameters.shape
    together = features @ parameters.permute(1, 0, 2).reshape(p, m * c)
    return together.view(-1, m, c).permute(1, 0, 2)


def pulled_back(features: Tensor, cotangents: Tensor) -> Tensor:
    """`Σ_i x_i ⊗ v_i` for many `v` `[m, n, c]`, `[m, p, c]`: one product for all."""
    m, n, c = cotangents.shape
    together = features.T @ cotangents.permute(1, 0, 2).reshape(n, m * c)
    return together.view(-1, m, c).permute(1, 0, 2)


def minimise(model: LinearModel, start: Tensor, kept: Tensor | None) -> Tensor:
    """Optima without some examples, `[m, p, c]`, by damped Newton iterations from `start`.

    Raises:
        TaskError: an objective has no optimum; names the first set.
    """
    theta = start.clone()
    active = torch.arange(len(theta))
    for _ in range(MOST_STEPS):
        mine = None if kept is None else kept[active]
        here = theta[active]
        gradient = model.gradients_at(here, mine)
        step = _newton_step(model, here, mine, gradient, active)
        moved, loss = _line_search(model, here, mine, step, gradient)
        theta[active] = moved
        _require_not_separated(model, loss, mine, active)
        size = (moved - here).flatten(1).norm(dim=1)
        active = active[size > SMALLEST_STEP * (1 + moved.flatten(1).norm(dim=1))]
        if not len(active):
            return theta
    largest = theta[active[0]].norm().item()
    raise TaskError(
        f"Newton's method did not settle in {MOST_STEPS} steps for set {int(active[0])}: its "
        f"parameters have grown to {largest:.3g}; add a penalty, or scale the columns alike"
    )


def _newton_step(
    model: LinearModel, theta: Tensor, kept: Tensor | None, gradient: Tensor, active: Tensor
) -> Tensor:
    hessian = model.hessian_at(model.curvatures_at(theta, kept))
    factor, failed = torch.linalg.cholesky_ex(hessian)
    # A factor can exist and be rounding only: a pivot this small is none.
    pivots = factor.diagonal(dim1=1, dim2=2).square() / hessian.diagonal(dim1=1, dim2=2)
    bad = (failed > 0) | ~(pivots.min(1).values > 1e-13)
    if bad.any():
        first = int(torch.nonzero(bad)[0])
        lowest = torch.linalg.eigvalsh(hessian[first])[0].item()
        which = "the model" if kept is None else f"set {int(active[first])}"
        raise TaskError(
            f"the Hessian of {which} is singular (smallest eigenvalue {lowest:.3g}): labels may "
            "be separated or columns determined by others; add a penalty or drop columns"
        )
    return torch.cholesky_solve(gradient[..., None], factor)[..., 0]


def _line_search(
    model: LinearModel, theta: Tensor, kept: Tensor | None, step: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Halve steps that do not lower the objective; near the optimum rounding decides nothing."""
    before = model.objective_at(theta, kept)
    decrement = (step * gradient).sum(1)
    direction = step.view_as(theta)
    scale = torch.ones(len(theta), dtype=theta.dtype)
    moved = theta - direction
    after = model.objective_at(moved, kept)
    for _ in range(30):
        allowed = before - 1e-4 * scale * decrement + 1e-12 * (1 + before.abs())
        worse = ~(after <= allowed)
        if not worse.any():
            break
        scale = torch.where(worse, 0.5 * scale, scale)
        moved = theta - scale[:, None, None] * direction
        after = model.objective_at(moved, kept)
    return moved, after


def _require_not_separated(
    model: LinearModel, loss: Tensor, kept: Tensor | None, active: Tensor
) -> None:
    if isinstance(model.family, Squared):
        return
    weight = model.weights.sum() if kept is None else (model.weights * kept).sum(1)
    separated = loss < SEPARATED * weight
    if separated.any():
        first = int(torch.nonzero(separated)[0])
        which = "the labels" if kept is None else f"the labels left by set {int(active[first])}"
        raise TaskError(
            f"{which} are separated by the features (mean loss {float(loss[first]):.2g} and "
            "falling): there is no optimum without a penalty; add one"
        )


def warn_of_labels_unseen(model: LinearModel, kept: Tensor) -> None:
    """Warn when a removed set holds every example of a class."""
    if isinstance(model.family, Squared):
        return
    labels = model.targets.reshape(len(model), -1)[:, 0].long()
    counts = kept @ torch.nn.functional.one_hot(labels).to(kept)
    if (counts == 0).any():
        which = int(torch.nonzero((counts == 0).any(1))[0])
        warnings.warn(
            f"removed set {which} holds every example of a class: refitting would drop the class",
            NumericalWarning,
            stacklevel=4,
        )


def _own(values: Tensor | np.ndarray) -> Tensor:
    """A tensor; of an array a copy, as those of pandas may not be written to."""
    return values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _family(family: str | Family | None, y: Tensor) -> Family:
    known: dict[str, Family] = {
        "squared": Squared(),
        "logistic": Logistic(),
        "softmax": Softmax(),
    }
    if isinstance(family, str):
        if family not in known:
            raise DataError(f"family is {family!r}: choose {', '.join(known)}")
        return known[family]
    if family is not None:
        return family
    if y.is_floating_point():
        return Squared()
    return Logistic() if int(y.max()) <= 1 else Softmax()


def _targets(family: Family, y: Tensor) -> tuple[Tensor, int]:
    """Targets in the family's form, and the number of outputs."""
    if isinstance(family, Softmax):
        if y.ndim != 1 or y.is_floating_point() or int(y.min()) < 0:
            raise DataError(f"labels are {y.dtype} {tuple(y.shape)}: give integers 0, 1, … [n]")
        return y.long(), int(y.max()) + 1
    y = y.double().reshape(len(y), -1)
    if isinstance(family, Logistic) and not bool(((y == 0) | (y == 1)).all()):
        raise DataError("labels of a logistic regression are 0 and 1: encode them first")
    return y, y.shape[1]
