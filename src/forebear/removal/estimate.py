"""Predict parameters and measurements after removing groups, with how far to trust it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.capture import Capture
from forebear.curvature.damping import Damping, as_damping
from forebear.curvature.solved import flat
from forebear.data import Data, map_tensors
from forebear.differentiation import Wrapped
from forebear.errors import DataError, NumericalWarning, TaskError, unknown_name
from forebear.plan import make_plan
from forebear.removal.bounds import Bound, distance_bound
from forebear.removal.estimators import ESTIMATORS, mask_of, shift
from forebear.removal.measures import measurement, needs_targets, predicted, slope
from forebear.removal.models import LinearModel, outputs
from forebear.removal.network import Network
from forebear.removal.problem import Factorised
from forebear.removal.reading import encode, is_readable, read
from forebear.stream import BATCH
from forebear.task import Task

STATIONARY = 1e-6
"""Gradient of the whole objective, relative to that of the group, that a linear model may have."""

LEFT_REGIME = 0.1
"""Estimated error, relative to the shift, from which on a warning says so."""


@dataclass(frozen=True, eq=False)
class Removed:
    """What removing each of m groups does, by one estimator.

    Attributes:
        groups: ids of the removed examples, one array a group.
        estimator: its name.
        shift: of the parameters, `[m, P]`.
        error: estimated size of the shift's error, `[m]`: the distance to a more accurate estimate,
            and no bound; NaN where there is none.
        bound: a proved bound, for linear models; None for others, or when it was not asked for.
        problem: the model.
        classes: of a classifier, in the order of its outputs.
    """

    groups: list[np.ndarray]
    estimator: str
    shift: Tensor
    error: Tensor
    bound: Bound | None
    problem: LinearModel | Network
    classes: np.ndarray | None = None

    @property
    def parameters(self) -> Tensor:
        """Without each group, `[m, P]`; of a linear model `[m, p, c]`, an intercept last."""
        if isinstance(self.problem, Network):
            return self.problem.vector() + self.shift
        return self.problem.parameters + self.shift.view(-1, *self.problem.parameters.shape)

    def effect(
        self, queries: Any, targets: Any = None, *, measure: str = "loss", linear: bool = False
    ) -> Tensor:
        """Measurement with each group less without it, `[m, q]`: positive = proponents.

        Args:
            queries: features `[q, p]` for a linear model; what the loss takes for a task.
            targets: of the queries, for a linear model; the predicted ones when left out, where
                the measurement allows it.
            measure: `"loss"` (minus the loss), `"prediction"` or `"margin"` of a linear model; a
                task has its own.
            linear: follow the measurement's gradient instead of measuring at the new parameters.
        """
        if isinstance(self.problem, Network):
            return _network_effect(self.problem, self.shift, queries, linear)
        model = self.problem
        x, y, z = queries_of(model, queries, targets, measure, self.classes)
        move = outputs(x, self.shift.view(-1, *model.parameters.shape))  # [m, q, c]
        if linear:
            return -(move * slope(model.family, z, y, measure)).sum(-1)
        now = measurement(model.family, z, y, measure)
        return now - measurement(model.family, z + move, y, measure)

    def output_bound(self, queries: Any) -> Tensor:
        """Proved bound on the error of each output after the removal, `[m, q, c]`.

        Raises:
            TaskError: there is no bound for this model, or it was not asked for.
        """
        if self.bound is None or not isinstance(self.problem, LinearModel):
            raise TaskError("no bound: it is for linear models, and needs remove(..., bound=True)")
        x, _, _ = queries_of(self.problem, queries, None, "prediction", self.classes)
        c = self.problem.outputs
        eye = torch.eye(c, dtype=x.dtype)
        directions = torch.einsum("qp,ab->qapb", x, eye).reshape(len(x) * c, -1)
        return self.bound.of_linear(directions).view(len(self.shift), len(x), c)


class RemovalEstimate:
    """Predicts what removing groups of training examples does to a model.

    Args:
        source: a fitted scikit-learn `LinearRegression`, `Ridge` or `LogisticRegression`; a
            `LinearModel` at its optimum; or a `Task` with a ready loss and up to 20,000 selected
            parameters, which is linearised: Gauss-Newton curvature, damped.
        train: its training set: features for scikit-learn, any dataset for a task.
        targets: for scikit-learn.
        sample_weight: for scikit-learn, as it was fitted.
        ids: of the examples; positions (or a pandas index) when left out.
        damping: λ of a task's curvature; a number is relative to the mean eigenvalue. With
            `Absolute(weight_decay)` the estimate is of the optimum that training aimed at.
        batch_size: examples at a time, for a task.

    Raises:
        TaskError: the curvature is singular or too large, or the estimator is of another kind.
        MismatchError: the estimator was not fitted to these data.
    """

    def __init__(
        self,
        source: Any,
        train: Any = None,
        targets: Any = None,
        *,
        sample_weight: Any = None,
        ids: Any = None,
        damping: float | Damping = 0.1,
        batch_size: int = BATCH,
    ) -> None:
        self.classes: np.ndarray | None = None
        self.problem: LinearModel | Network
        if isinstance(source, LinearModel):
            self.problem = source
        elif isinstance(source, Task):
            if train is None:
                raise DataError("a task needs its training set: pass train=")
            data = Data.of(train, ids=ids, collate=source.collate)
            plan = make_plan(source, data)
            self.problem = Network(source, data, plan, as_damping(damping), batch_size)
        elif is_readable(source) or not hasattr(source, "parameters"):
            if train is None or targets is None:
                raise DataError("an estimator needs the X and y it was fitted to: pass both")
            self.problem, self.classes = read(source, train, targets, sample_weight, ids)
        else:
            raise TaskError(f"{type(source).__name__} has no loss: wrap it in a Task")
        self.factorised = Factorised(self.problem)

    @property
    def ids(self) -> np.ndarray:
        """Of the training examples."""
        return self.problem.ids

    def leverages(self) -> Tensor:
        """How much of its own prediction each example decides, `tr(H⁻¹H_i)`, `[n]`."""
        return self.factorised.leverages

    def remove(
        self,
        groups: Any,
        estimator: str = "newton_step",
        *,
        check: bool = True,
        bound: bool = False,
    ) -> Removed:
        """Estimate the removal of one group of ids, or of several.

        Args:
            groups: ids, or a sequence of sequences of ids.
            estimator: `"influence"`, `"rescaled"`, `"rescaled_n"`, `"rescaled_d"`,
                `"newton_step"`, `"newton_step_2"` or `"exact"`; the last two for linear models.
            check: estimate the error by a more accurate estimator, and warn where it is large.
            bound: also prove a bound on the error; linear models only.

        Raises:
            DataError: a group is empty, is everything, or has unknown or repeated ids.
            TaskError: what is left has no curvature in some direction, or no optimum.
        """
        if estimator not in ESTIMATORS:
            raise unknown_name("estimator", estimator, ESTIMATORS)
        named = as_groups(groups)
        positions = [positions_of(group, self.ids) for group in named]
        size = self.problem.size
        found = torch.empty(len(named), size, dtype=torch.float64)
        error = torch.full((len(named),), torch.nan, dtype=torch.float64)
        norms = torch.empty(len(named), dtype=torch.float64)
        for k in sorted({len(group) for group in positions}):
            which = [i for i, group in enumerate(positions) if len(group) == k]
            sets = torch.stack([positions[i] for i in which])
            found[which] = shift(self.factorised, sets, estimator)
            if check:
                error[which] = self._error(sets, found[which], estimator)
                pulled = self.problem.pull(sets, self.problem.residuals[sets])
                norms[which] = pulled.norm(dim=1)
        if check:
            self._warn_off_optimum(norms)
            self._warn_of_regime(positions, found, error, estimator)
        proved = self._bound(positions, found) if bound else None
        return Removed(named, estimator, found, error, proved, self.problem, self.classes)

    def _error(self, sets: Tensor, found: Tensor, estimator: str) -> Tensor:
        """Distance to a more accurate estimate, `[m]`."""
        if estimator == "exact":
            return torch.zeros(len(sets), dtype=torch.float64)
        best = "newton_step_2" if isinstance(self.problem, LinearModel) else "newton_step"
        if estimator == "newton_step" and best == estimator:
            return torch.full((len(sets),), torch.nan, dtype=torch.float64)
        if estimator == "newton_step_2":  # as if each order were as much smaller as the last one
            first = shift(self.factorised, sets, "newton_step")
            gap = (found - first).norm(dim=1)
            return gap.square() / first.norm(dim=1).clamp_min(1e-300)
        return (shift(self.factorised, sets, best) - found).norm(dim=1)

    def _bound(self, positions: list[Tensor], found: Tensor) -> Bound:
        if not isinstance(self.problem, LinearModel):
            raise TaskError("bound=True needs a linear model: nothing is proved for a network")
        kept = torch.ones(len(positions), len(self.ids), dtype=torch.float64)
        for i, group in enumerate(positions):
            kept[i] = mask_of(group[None], len(self.ids))[0]
        return distance_bound(self.problem, found, kept)

    def _warn_off_optimum(self, norms: Tensor) -> None:
        """A gradient that is left over moves the parameters too, as the groups' `[m]` do."""
        left = self.problem.gradient().norm()
        linear = isinstance(self.problem, LinearModel)
        ratio = float(left / norms.min().clamp_min(1e-300))
        if ratio > (STATIONARY if linear else 1.0):
            remedy = "fit to the optimum first" if linear else "train on, or compare by retraining"
            warnings.warn(
                f"the model is not at its optimum: the gradient of its whole loss is {ratio:.2g} "
                f"times that of the group, and retraining would move it anyway; {remedy}",
                NumericalWarning,
                stacklevel=4,
            )

    def _warn_of_regime(
        self, positions: list[Tensor], found: Tensor, error: Tensor, estimator: str
    ) -> None:
        relative = torch.nan_to_num(error / found.norm(dim=1).clamp_min(1e-300))
        worst = int(relative.argmax())
        if relative[worst] <= LEFT_REGIME:
            return
        k, n = len(positions[worst]), len(self.ids)
        highest = float(self.leverages()[positions[worst]].max())
        better = {"newton_step": "newton_step_2 or exact", "newton_step_2": "exact"}
        warnings.warn(
            f"{estimator} is off by about {float(relative[worst]):.0%} of the shift for a group of "
            f"{k} of {n} (highest leverage {highest:.2g}): use "
            f"{better.get(estimator, 'newton_step')}",
            NumericalWarning,
            stacklevel=4,
        )


def as_groups(groups: Any) -> list[np.ndarray]:
    """One group of ids, or several, as a list of arrays.

    Raises:
        DataError: there is no group, or ids and groups are mixed.
    """
    if isinstance(groups, Tensor):
        groups = groups.tolist()
    if isinstance(groups, str | int | np.integer):
        groups = [groups]
    several = [isinstance(group, Sequence | np.ndarray) and not isinstance(group, str)
               for group in groups]  # fmt: skip
    if not len(groups):
        raise DataError("a removed set is empty: name at least one example")
    if any(several) and not all(several):
        raise DataError("groups mix ids and lists of ids: give one list, or a list of lists")
    return [np.asarray(group) for group in (groups if all(several) else [groups])]


def positions_of(group: np.ndarray, ids: np.ndarray) -> Tensor:
    """Where the ids of a group stand, `[k]`.

    Raises:
        DataError: it is empty, has an id twice or one that is not there, or holds everything.
    """
    if not len(group):
        raise DataError("a removed set is empty: name at least one example")
    order = np.argsort(ids, kind="stable")
    if (group.dtype.kind in "iu") != (ids.dtype.kind in "iu"):
        raise DataError(f"id {group[0]!r} is not of the kind of the training ids ({ids.dtype})")
    found = order[np.searchsorted(ids, group, sorter=order).clip(max=len(ids) - 1)]
    unknown = group[ids[found] != group]
    if len(unknown):
        raise DataError(
            f"id {unknown[0].item()!r} is not in the training set of {len(ids)} examples"
        )
    values, counts = np.unique(group, return_counts=True)
    if counts.max() > 1:
        raise DataError(f"id {values[counts.argmax()].item()!r} stands twice in a removed set")
    if len(group) >= len(ids):
        raise DataError(f"a removed set has all {len(ids)} examples: something must be left")
    return torch.as_tensor(found)


def queries_of(
    model: LinearModel, queries: Any, targets: Any, measure: str, classes: np.ndarray | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features `[q, p]`, targets and outputs `[q, c]` of queries to a linear model.

    Raises:
        DataError: they have another number of columns, or lack targets that the measurement needs.
    """
    x = torch.tensor(np.asarray(queries, dtype=np.float64))
    x = x[None] if x.ndim == 1 else x
    p = model.features.shape[1]
    if x.shape[1] == p - 1 and bool((model.features[:, -1] == 1).all()):
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    if x.shape[1] != p:
        raise DataError(f"queries have {x.shape[1]} columns and the model has {p}, ones included")
    z = x @ model.parameters
    if targets is None:
        if needs_targets(model.family, measure):
            raise DataError(f"measure={measure!r} needs the targets of the queries: pass them")
        return x, predicted(model.family, z), z
    given = np.array(targets)
    values = encode(given, classes) if classes is not None else torch.as_tensor(given)
    values = values[None] if values.ndim == 0 else values
    if len(values) != len(x):
        raise DataError(f"{len(values)} targets were given for {len(x)} queries: give one each")
    return x, values if model.targets.ndim == 1 else values.double().reshape(len(x), -1), z


def _network_effect(model: Network, shift: Tensor, queries: Any, linear: bool) -> Tensor:
    """Change of a task's measurement at parameters moved by `[m, P]`, `[m, q]`."""
    task, data = model.task, Data.of(queries, collate=model.task.collate)
    rows = []
    if linear:
        with Capture(task, model.plan) as capture:
            for _, batch in data.batches(model.batch_size):
                _, gradients = capture.gradients(task.measurements, batch)
                rows.append(-torch.cat(list(flat(gradients, model.plan))).cpu().double() @ shift.T)
        return torch.cat(rows).T
    moved = [model.named(vector) for vector in model.vector() + shift]
    wrapped = Wrapped(task.model, task.measurements)
    with task.evaluation(), torch.no_grad():
        for _, batch in data.batches(model.batch_size):
            here = map_tensors(lambda t: t.to(task.device), batch)
            now = task.measurements(task.model, here)
            after = [
                torch.func.functional_call(
                    wrapped, {f"model.{k}": v.to(now) for k, v in named.items()}, (here,)
                )
                for named in moved
            ]
            rows.append((now - torch.stack(after)).cpu().double())
    return torch.cat(rows, 1)
