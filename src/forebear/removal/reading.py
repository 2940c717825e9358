"""scikit-learn's linear models read as `LinearModel`s, without importing scikit-learn."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, MismatchError, NumericalWarning, TaskError
from forebear.removal.families import Family, Logistic, Softmax, Squared
from forebear.removal.models import LinearModel
from forebear.removal.problem import Factorised

READABLE = ("LinearRegression", "Ridge", "LogisticRegression")
"""Classes that are read, by name; their subclasses are not, as they may do something else."""

CLOSED_FORM_SLACK = 1e-6
LOGISTIC_SLACK = 0.1
"""Distance from the optimum that is taken for a solver's, in standard errors of a parameter."""


def is_readable(estimator: Any) -> bool:
    """Whether this is one of the linear models that are read in closed form."""
    kind = type(estimator)
    return kind.__name__ in READABLE and kind.__module__.partition(".")[0] == "sklearn"


def read(
    estimator: Any, x: Any, y: Any, sample_weight: Any = None, ids: Any = None
) -> tuple[LinearModel, np.ndarray | None]:
    """A fitted scikit-learn estimator as a model at its optimum, and its classes.

    The optimum is polished by Newton's method, as solvers stop early: single examples move the
    parameters by less than their usual tolerance.

    Args:
        estimator: a fitted `LinearRegression`, `Ridge` or `LogisticRegression`.
        x: features as they were fitted, `[n, p]`.
        y: targets or labels as they were fitted.
        sample_weight: as it was fitted.
        ids: one a row; positions (or the index of a pandas object) when left out.

    Raises:
        TaskError: it is another kind of estimator, or not fitted, or has a penalty that is not
            quadratic.
        MismatchError: it was not fitted to these data.
    """
    if not is_readable(estimator):
        raise TaskError(
            f"{type(estimator).__name__} cannot be explained in closed form: use one of "
            f"{', '.join(READABLE)} of scikit-learn, or give a torch model with a Task"
        )
    if not hasattr(estimator, "coef_"):
        raise TaskError(f"{type(estimator).__name__} is not fitted: call fit(X, y) first")
    ids = _index_of(x) if ids is None else ids
    features, weights = as_features(x), _weights(sample_weight, len(x))
    if features.shape[1] != np.shape(estimator.coef_)[-1]:
        raise MismatchError(
            f"X has {features.shape[1]} columns and the estimator was fitted to "
            f"{np.shape(estimator.coef_)[-1]}: pass the data it was fitted to"
        )
    logistic = type(estimator).__name__ == "LogisticRegression"
    reader = _logistic if logistic else _least_squares
    family, targets, penalty, last, weights, classes = reader(estimator, y, weights)
    lam = np.full(features.shape[1], penalty)
    theta = np.atleast_2d(estimator.coef_).T
    if estimator.fit_intercept:
        features = np.concatenate([features, np.ones((len(features), 1))], 1)
        lam = np.append(lam, last)
        intercept = np.broadcast_to(np.atleast_1d(estimator.intercept_), (theta.shape[1],))
        theta = np.concatenate([theta, intercept[None]])
    if isinstance(family, Softmax):  # in every column that a softmax does not see, the mean is free
        theta = theta - theta.mean(1, keepdims=True)
    model = LinearModel.of(
        features, targets, family=family, penalty=lam, weights=weights, ids=ids, parameters=theta
    )
    return _polished(model, type(estimator).__name__, logistic), classes


def as_features(x: Any) -> np.ndarray:
    """Features as a dense float64 array `[n, p]`.

    Raises:
        DataError: they are sparse, or not numbers in two dimensions.
    """
    if hasattr(x, "toarray"):
        raise DataError("X is sparse: pass X.toarray(), or fewer columns")
    try:
        values = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"X does not hold numbers only ({error}): encode it first") from error
    if values.ndim != 2:
        raise DataError(f"X has shape {values.shape}: it must be [rows, columns]")
    return values


def encode(labels: Any, classes: np.ndarray) -> Tensor:
    """Labels as positions in the estimator's classes, `[n]`.

    Raises:
        DataError: a label is none of them.
    """
    values = np.asarray(labels).reshape(-1)
    position = np.searchsorted(classes, values).clip(max=len(classes) - 1)
    unknown = values[classes[position] != values]
    if len(unknown):
        raise DataError(
            f"label {unknown[0].item()!r} is none of the estimator's classes {classes.tolist()}"
        )
    return torch.as_tensor(position)


Read = tuple[Family, Any, float, float, np.ndarray, np.ndarray | None]


def _least_squares(estimator: Any, y: Any, weights: np.ndarray) -> Read:
    name = type(estimator).__name__
    if getattr(estimator, "positive", False):
        raise TaskError(f"{name}(positive=True) has no closed form: fit it without the constraint")
    penalty = np.unique(np.asarray(getattr(estimator, "alpha", 0.0), dtype=float))
    if len(penalty) > 1:
        raise TaskError(f"{name} has an alpha for each target: explain one target at a time")
    targets = np.asarray(y, dtype=np.float64)
    return Squared(), targets, float(penalty[0]), 0.0, weights, None


def _logistic(estimator: Any, y: Any, weights: np.ndarray) -> Read:
    if _is_not_quadratic(estimator):
        raise TaskError(
            f"LogisticRegression with l1_ratio={estimator.l1_ratio} has a penalty with kinks: fit "
            "it with l1_ratio=0"
        )
    if estimator.solver == "liblinear" and len(estimator.classes_) > 2:
        raise TaskError("liblinear fits one model a class: use solver='lbfgs'")
    classes = estimator.classes_
    labels = encode(y, classes)
    unpenalised = getattr(estimator, "penalty", None) is None
    penalty = 0.0 if unpenalised else 1.0 / float(estimator.C)
    if estimator.class_weight is not None:
        weights = weights * _class_weights(estimator, y, labels, weights)
    # liblinear penalises the intercept as the weight of a column of constants.
    last = 0.0
    if estimator.solver == "liblinear":
        last = penalty / float(estimator.intercept_scaling) ** 2
    binary = np.atleast_2d(estimator.coef_).shape[0] == 1
    return (Logistic() if binary else Softmax()), labels, penalty, last, weights, classes


def _is_not_quadratic(estimator: Any) -> bool:
    if getattr(estimator, "penalty", "deprecated") in ("l1", "elasticnet"):
        return True
    return getattr(estimator, "penalty", "") == "deprecated" and bool(estimator.l1_ratio)


def _class_weights(estimator: Any, y: Any, labels: Tensor, weights: np.ndarray) -> np.ndarray:
    """Of each example; `"balanced"` is that of the whole training set and stays when rows go."""
    given = estimator.class_weight
    if given == "balanced":
        # As scikit-learn: counts of rows, weighted with sample weights where those are given.
        counts = np.bincount(labels.numpy(), weights=weights, minlength=len(estimator.classes_))
        each = counts.sum() / (len(counts) * counts)
    else:
        each = np.array([given.get(label, 1.0) for label in estimator.classes_.tolist()])
    return each[labels.numpy()]


def _polished(model: LinearModel, name: str, logistic: bool) -> LinearModel:
    """The optimum near the estimator's parameters, if it is near."""
    factorised = Factorised(model)
    gradient = model.gradient()
    # Newton decrement: the distance to the optimum in units in which a standard error is one.
    step = factorised.solve(gradient)
    distance = float((gradient @ step).clamp_min(0).sqrt())
    scale = 1.0
    if not logistic:  # of a regression the noise gives the unit
        scale = float((model.residuals.square().sum() / len(model)).sqrt()) or 1.0
        scale = max(scale, 1e-9 * float(model.targets.norm() / len(model) ** 0.5))
    allowed = LOGISTIC_SLACK if logistic else CLOSED_FORM_SLACK
    if distance > allowed * scale * model.size**0.5:
        raise MismatchError(
            f"these data do not have their optimum at the estimator's parameters: it is "
            f"{distance / scale:.3g} standard errors away. {name} was fitted to other data, "
            "weights or scaling, or its solver stopped early: pass what it was fitted to, or raise "
            "max_iter and lower tol"
        )
    best = model.fitted()
    r = model.residuals
    single = float(torch.einsum("na,nab,nb->n", r, factorised.kernels, r).max().clamp_min(0).sqrt())
    if distance > max(single, 1e-9):
        warnings.warn(
            f"{name} stopped {distance:.2g} standard errors from its optimum, which is more than "
            f"any single example moves it ({single:.2g}): effects are those at the optimum; fit "
            "with a smaller tol",
            NumericalWarning,
            stacklevel=4,
        )
    return best


def _weights(sample_weight: Any, size: int) -> np.ndarray:
    return np.ones(size) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)


def _index_of(x: Any) -> np.ndarray | None:
    """The labels of a pandas index, when they can serve as ids."""
    index = getattr(x, "index", None)
    if index is None or callable(index) or not getattr(index, "is_unique", False):
        return None
    values = np.asarray(index)
    return values if values.dtype.kind in "iu" else values.astype(str)
