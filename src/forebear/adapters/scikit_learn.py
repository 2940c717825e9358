"""Explain a scikit-learn model, or a torch model in a scikit-learn style, by its training rows.

Linear, ridge and logistic regression are explained in closed form; other models through a task and
a method by name. scikit-learn is never imported; pandas only where a DataFrame is asked for.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import methods
from forebear.data import Data
from forebear.errors import DataError, MissingDependencyError, TaskError, unknown_name
from forebear.methods.fitted import Fitted, version
from forebear.removal.estimate import RemovalEstimate, Removed, positions_of, queries_of
from forebear.removal.estimators import shift
from forebear.removal.families import Squared
from forebear.removal.measures import measurement
from forebear.removal.models import LinearModel, outputs
from forebear.removal.reading import READABLE, as_features, is_readable
from forebear.task import Task, state_hash
from forebear.tasks import losses
from forebear.types import Provenance, Scores, check_k

PAIRS = 2**24
"""Outputs of pairs of a query and a row that are held at a time (128 MB)."""

SINGLE = ("newton_step", "influence", "exact")


def explain(
    estimator: Any,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    method: str | None = None,
    ids: Any = None,
    **options: Any,
) -> "Explanation":
    """Explain a fitted model by the rows it was fitted to.

    Args:
        estimator: a fitted `LinearRegression`, `Ridge` or `LogisticRegression` of scikit-learn; a
            `Task`; or an estimator around a torch module, as skorch's, with it as `module_`.
        X: features it was fitted to, `[n, p]`: an array or a DataFrame, whose index gives the ids.
        y: targets or labels it was fitted to.
        sample_weight: as it was fitted; linear models only.
        method: for a linear model how single rows are removed: `"newton_step"` (the default, exact
            for least squares), `"influence"`, or `"exact"`, which refits for every row. For a torch
            model the name of any method, `"ekfac"` when left out.
        ids: one a row; positions (or the index) when left out.
        options: of the method of a torch model.

    Raises:
        MismatchError: a linear model was not fitted to these data.
        TaskError: the estimator is of another kind or not fitted; the message lists what is taken.
    """
    if is_readable(estimator):
        if options:
            raise unknown_name("option of explain", next(iter(options)), ["method", "ids"])
        removal = RemovalEstimate(estimator, X, y, sample_weight=sample_weight, ids=ids)
        return LinearExplanation(removal, y, method or "newton_step")
    task = _task_of(estimator)
    if sample_weight is not None:
        raise TaskError("sample weights of a torch model belong into its loss: leave them out here")
    data = Data.of((_tensor(X, task), _target_tensor(y)), ids=ids)
    return NetworkExplanation(methods.get(method or "ekfac", **options).fit(task, data), y)


class Explanation(ABC):
    """A fitted model with its training rows: asked what each row, or a group of rows, does."""

    ids: np.ndarray
    targets: np.ndarray

    @abstractmethod
    def scores(self, X_query: Any, y_query: Any = None, *, measure: str = "loss") -> Scores:
        """The measurement of each query with each row less without it, `[query, train]`.

        Args:
            X_query: features, `[q, p]`.
            y_query: targets or labels; a linear model's own predictions when left out, where the
                measurement allows it.
            measure: `"loss"` (minus the loss), `"prediction"` (the number, or the probability of
                the label) or `"margin"` (the log odds of the label).
        """

    @abstractmethod
    def self_influence(self) -> Tensor:
        """What each row does to its own measurement, `[n]`: wrong labels come first."""

    @abstractmethod
    def leverages(self) -> Tensor:
        """How much of its own prediction each row decides, `[n]`.

        Raises:
            TaskError: the model is too large for a dense curvature.
        """

    @abstractmethod
    def group(self, ids: Any, estimator: str = "newton_step", **options: Any) -> Removed:
        """What removing a group of rows, or each of several, does; as `RemovalEstimate.remove`."""

    @abstractmethod
    def _row(self, position: int) -> tuple[Any, Any]:
        """Features and target of a training row, as queries."""

    def top(
        self,
        query: Any,
        y_query: Any = None,
        *,
        k: int = 10,
        opponents: bool = False,
        measure: str = "loss",
    ) -> Any:
        """The rows that did most for one prediction, strongest first, as a pandas DataFrame.

        Args:
            query: features of one query, `[p]` or one row; or the id of a training row, which is
                then left out of its own list.
            y_query: the query's target or label.
            k: how many.
            opponents: the rows that did most against it instead.
            measure: as in `scores`.

        Returns:
            columns `id`, `score` and `target`.

        Raises:
            MissingDependencyError: pandas is not installed.
            DataError: the id is unknown, or `k` too large.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "a table of rows is a pandas DataFrame: pip install 'forebear[sklearn]', or use "
                "scores(...).top(k)"
            ) from error
        own = None
        if isinstance(query, str | int | np.integer):
            own = int(positions_of(np.asarray([query]), self.ids)[0])
            query, y_query = self._row(own)
        elif np.ndim(query) == 1:
            query = np.asarray(query)[None]
            y_query = y_query if y_query is None or np.ndim(y_query) else [y_query]
        check_k(k, len(self.ids) - (own is not None))
        values = self.scores(query, y_query, measure=measure).values
        if len(values) != 1:
            raise DataError(f"top() takes one query and got {len(values)}: use scores(...).top(k)")
        order = torch.argsort(values[0], descending=not opponents, stable=True)
        order = order[order != own] if own is not None else order
        chosen = order[:k].numpy()
        columns = {
            "id": self.ids[chosen],
            "score": values[0].numpy()[chosen],
            "target": self.targets[chosen],
        }
        return pandas.DataFrame(columns)


class LinearExplanation(Explanation):
    """A linear model in closed form.

    For least squares a Newton step is the exact refit, and scores are exact leave-one-out. For
    logistic regression it is close to it; `method="exact"` refits without every row.
    """

    def __init__(self, removal: RemovalEstimate, y: Any, method: str) -> None:
        if method not in SINGLE:
            raise unknown_name("method of a linear model", method, SINGLE)
        assert isinstance(removal.problem, LinearModel)
        self.removal = removal
        self.model = removal.problem
        self.ids = removal.ids
        self.targets = np.asarray(y)
        self.method = method

    @cached_property
    def shifts(self) -> Tensor:
        """How leaving out each row moves the parameters, `[n, P]`."""
        rows = torch.arange(len(self.ids))[:, None]
        return shift(self.removal.factorised, rows, _SINGLE_ESTIMATOR[self.method])

    @property
    def is_exact(self) -> bool:
        """Whether scores are exact leave-one-out."""
        squared = isinstance(self.model.family, Squared) and self.method == "newton_step"
        return squared or self.method == "exact"

    def scores(self, X_query: Any, y_query: Any = None, *, measure: str = "loss") -> Scores:
        """The measurement of each query with each row less without it, `[query, train]`.

        Measured at the parameters without the row, not along a gradient: exact leave-one-out where
        `is_exact`.
        """
        x, y, z = queries_of(self.model, X_query, y_query, measure, self.removal.classes)
        shifts = self.shifts.view(len(self.ids), *self.model.parameters.shape)  # [n, p, c]
        now = measurement(self.model.family, z, y, measure)
        values = x.new_empty(len(x), len(self.ids))
        step = max(1, PAIRS // (len(x) * self.model.outputs))
        for start in range(0, len(self.ids), step):
            rows = slice(start, start + step)
            moved = z + outputs(x, shifts[rows])  # [b, q, c]
            values[:, rows] = (now - measurement(self.model.family, moved, y, measure)).T
        if not torch.isfinite(values).all():
            raise DataError("queries hold values that are NaN or infinite: repair or drop them")
        return Scores(
            values=values,
            query_ids=np.arange(len(x)),
            train_ids=self.ids,
            provenance=self._provenance(x, y, measure),
        )

    def self_influence(self) -> Tensor:
        """How much more each row's loss is without it, `[n]`."""
        shifts = self.shifts.view(len(self.ids), *self.model.parameters.shape)
        moved = self.model.predictions + torch.einsum("np,npc->nc", self.model.features, shifts)
        family, y = self.model.family, self.model.targets
        return family.loss(moved, y) - family.loss(self.model.predictions, y)

    def leverages(self) -> Tensor:
        """How much of its own prediction each row decides, `[n]`."""
        return self.removal.leverages()

    def group(self, ids: Any, estimator: str = "newton_step", **options: Any) -> Removed:
        """What removing a group of rows, or each of several, does; as `RemovalEstimate.remove`."""
        return self.removal.remove(ids, estimator, **options)

    def _row(self, position: int) -> tuple[Any, Any]:
        return self.model.features[position : position + 1].numpy(), self.targets[[position]]

    def _provenance(self, x: Tensor, y: Tensor, measure: str) -> Provenance:
        data = Data.of((self.model.features, self.model.targets, self.model.weights))
        return Provenance(
            method="leave_one_out" if self.is_exact else self.method,
            settings={
                "family": self.model.family.name,
                "measure": measure,
                "rows_removed_by": self.method,
                "penalty": self.model.penalty.tolist(),
            },
            units="removal",
            coverage=1.0,
            model=state_hash({"parameters": self.model.parameters}),
            train=data.fingerprint,
            queries=Data.of((x, y)).fingerprint,
            version=version(),
        )


class NetworkExplanation(Explanation):
    """A torch model, explained by a fitted method of the library."""

    def __init__(self, fitted: Fitted, y: Any) -> None:
        self.fitted = fitted
        self.ids = fitted.train.ids
        self.targets = np.asarray(y)

    def scores(self, X_query: Any, y_query: Any = None, *, measure: str = "loss") -> Scores:
        """Scores of the method, in its own units; the measurement is the task's.

        Raises:
            DataError: targets are missing, or another measurement was asked for.
        """
        if y_query is None:
            raise DataError("queries of a torch model need their targets: pass y_query")
        if measure != "loss":
            raise DataError(
                f"measure={measure!r} is for linear models: give a Task with measure= instead"
            )
        x = _tensor(X_query, self.fitted.task)
        return self.fitted.score((x, _target_tensor(y_query)))

    def self_influence(self) -> Tensor:
        """The method's self-influence, `[n]`."""
        return self.fitted.self_influence()

    def leverages(self) -> Tensor:
        """`tr(H⁻¹H_i)` with the damped Gauss-Newton matrix, `[n]`; up to 20,000 parameters."""
        return self._removal().leverages()

    def group(self, ids: Any, estimator: str = "newton_step", **options: Any) -> Removed:
        """What removing a group does, with the damped Gauss-Newton matrix; up to 20,000 parameters.

        `damping` is among the options; the method's own is used when it is left out.
        """
        return self._removal(options.pop("damping", None)).remove(ids, estimator, **options)

    def _removal(self, damping: Any = None) -> RemovalEstimate:
        own = getattr(self.fitted.method, "damping", 0.1)
        return RemovalEstimate(
            self.fitted.task,
            self.fitted.train,
            damping=own if damping is None else damping,
            batch_size=self.fitted.batch_size,
        )

    def _row(self, position: int) -> tuple[Any, Any]:
        x, y = self.fitted.train.batch(slice(position, position + 1))
        return x, y


_SINGLE_ESTIMATOR = {"newton_step": "rescaled", "influence": "influence", "exact": "exact"}


def _task_of(estimator: Any) -> Task:
    if isinstance(estimator, Task):
        return estimator
    module = getattr(estimator, "module_", None)
    taken = f"{', '.join(READABLE)} of scikit-learn, a Task, or an estimator with a torch module_"
    if not isinstance(module, torch.nn.Module):
        raise TaskError(f"{type(estimator).__name__} cannot be explained: give {taken}")
    criterion = getattr(estimator, "criterion_", None)
    known = {"CrossEntropyLoss": losses.cross_entropy, "MSELoss": losses.squared_error}
    loss = known.get(type(criterion).__name__)
    if loss is None:
        raise TaskError(
            f"the criterion {type(criterion).__name__} has no ready loss ({', '.join(known)}): "
            "make the Task yourself and pass it in place of the estimator"
        )
    return Task(module, loss)


def _tensor(x: Any, task: Task) -> Tensor:
    """Features in the type of the model."""
    if isinstance(x, Tensor):
        return x
    dtype = next(task.model.parameters()).dtype
    return torch.as_tensor(as_features(x)).to(dtype)


def _target_tensor(y: Any) -> Tensor:
    """Labels as integers, numbers as they are."""
    values = y if isinstance(y, Tensor) else torch.as_tensor(np.asarray(y))
    return values.long() if values.dtype in (torch.int32, torch.int16, torch.uint8) else values
