"""One tree of exceptions and warnings; each names the thing, the value and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Any


class ForebearError(Exception):
    """Whatever forebear refuses to do."""


class TaskError(ForebearError):
    """The model, loss or layer selection of a task does not fit together."""


class DataError(ForebearError):
    """A dataset is empty, has duplicate ids or rows that are not what they should be.

    `rows` has the positions in the batch, where single examples are to blame.
    """

    rows: Any = None


class NonFiniteError(ForebearError):
    """A loss, gradient or score is NaN or infinite; `rows` has the positions in the batch."""

    rows: Any = None


class MismatchError(ForebearError):
    """Two things that were made from different models, data or settings were mixed."""


class UnknownNameError(ForebearError):
    """A method, option, layer or metric that does not exist; the message has the nearest name."""


class FormatError(ForebearError):
    """A file or folder cannot be read: it is missing, damaged or from a newer version."""


class MissingDependencyError(ForebearError):
    """An optional package or data file is not installed."""


class ForebearWarning(UserWarning):
    """Something a person should know before trusting a result."""


class CoverageWarning(ForebearWarning):
    """A method does not see all the trainable parameters."""


class EvaluationModeWarning(ForebearWarning):
    """A model in training mode was scored in evaluation mode."""


class NumericalWarning(ForebearWarning):
    """A number is less certain than it looks: zero gradients, indefinite curvature, few samples."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An error for `name` that suggests the nearest of the `known` names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
