"""Who takes part in the study of final-model methods, and with which settings.

λ₀ is the mean squared entry of the training gradients, which is the mean eigenvalue of the
empirical Fisher matrix; dampings of the published comparison are multiples of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forebear import methods
from forebear.curvature import Absolute, Horizon
from forebear.data import Data
from forebear.task import Task

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Multiples of λ₀ that conjugate gradients are run with."""

WORK = 2e12
"""Outputs of all examples, times P², up to which an exact Gauss-Newton matrix is formed."""

OUTPUTS = 100
"""Outputs of one example that the exact matrix may have: each costs a backward pass."""


@dataclass(frozen=True)
class Further:
    """How the model is trained further, as far as methods may know it.

    Attributes:
        learning_rate: of plain SGD.
        batch_size: examples a step.
        steps_per_epoch: steps.
    """

    learning_rate: float
    batch_size: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Scale:
    """What settings may depend on.

    Attributes:
        mean_square: λ₀.
        examples: n.
        parameters: P.
        outputs: numbers that the model says of one example.
        steps: of stochastic gradient descent, for methods that are told how far.
        epochs: the same in passes over the data.
        further: how the model is trained further.
    """

    mean_square: float
    examples: int
    parameters: int
    outputs: int
    steps: int
    epochs: int
    further: Further

    @property
    def horizon(self) -> Horizon:
        """λ = 1 / (ηT)."""
        return Horizon(self.further.learning_rate, self.steps)

    @property
    def dense(self) -> bool:
        """Whether an exact Gauss-Newton matrix is affordable."""
        work = self.examples * self.outputs * self.parameters**2
        return work <= WORK and self.outputs <= OUTPUTS


Options = Callable[[Scale], dict[str, Any]]


@dataclass(frozen=True)
class Entrant:
    """One line of the study.

    Attributes:
        key: its name in tables.
        label: for people.
        method: registered name.
        options: of the method.
        follows: whether its settings follow the amount of further training.
        dense: whether it needs an exact Gauss-Newton matrix.
        small: whether it takes too long on a model with many outputs.
    """

    key: str
    label: str
    method: str
    options: Options = lambda scale: {}
    follows: bool = False
    dense: bool = False
    small: bool = False


def _damped(multiple: float, **more: Any) -> Options:
    return lambda scale: {"damping": Absolute(multiple * scale.mean_square), **more}


def _horizon(**more: Any) -> Options:
    return lambda scale: {"damping": scale.horizon, **more}


def _filter(**more: Any) -> Options:
    def options(scale: Scale) -> dict[str, Any]:
        exact = Horizon(scale.further.learning_rate, scale.steps, exact=True)
        return {"damping": exact, **more}

    return options


def _unrolled(scale: Scale) -> dict[str, Any]:
    return {
        "learning_rate": scale.further.learning_rate,
        "epochs": scale.epochs,
        "batch_size": scale.further.batch_size,
    }


GAUSS_NEWTON = {"curvature": "gauss_newton"}

ENTRANTS = (
    Entrant("unrolled", "Trajectory derivative", "unrolled", _unrolled, follows=True, small=True),
    Entrant("filter", "GN, filter f_T", "exact", _filter(**GAUSS_NEWTON), follows=True, dense=True),
    Entrant(
        "horizon", "GN, λ = 1/(ηT)", "exact", _horizon(**GAUSS_NEWTON), follows=True, dense=True
    ),
    Entrant(
        "layers_horizon",
        "GN by layer, λ = 1/(ηT)",
        "exact",
        _horizon(blocks="layers", **GAUSS_NEWTON),
        follows=True,
        dense=True,
    ),
    Entrant("cg_horizon", "CG, λ = 1/(ηT)", "cg", _horizon(), follows=True),
    Entrant("ekfac_horizon", "EK-FAC, λ = 1/(ηT)", "ekfac", _horizon(), follows=True),
    Entrant(
        "ekfac_exact_horizon",
        "EK-FAC, all targets, λ = 1/(ηT)",
        "ekfac",
        _horizon(targets="exact"),
        follows=True,
        dense=True,
    ),
    Entrant("graddot", "GradDot", "graddot"),
    Entrant("gradcos", "GradCos", "gradcos"),
    Entrant("datainf", "DataInf", "datainf", lambda scale: {"damping": 0.1}),
    *(
        Entrant(
            f"cg_{multiple:g}",
            f"CG, λ = {multiple:g} λ₀",
            "cg",
            _damped(multiple),
            small=multiple < 10,
        )
        for multiple in GRID
    ),
    Entrant("gn_100", "GN, λ = 100 λ₀", "exact", _damped(100, **GAUSS_NEWTON), dense=True),
    Entrant("gn_large", "GN, λ → ∞", "exact", _damped(1e6, **GAUSS_NEWTON), dense=True),
    Entrant("lissa_100", "LiSSA, λ = 100 λ₀", "lissa", _damped(100), small=True),
    Entrant("newton_step", "Newton step, λ = 100 λ₀", "newton_step", _damped(100), dense=True),
    Entrant("ekfac_cg", "EK-FAC + CG, λ = 100 λ₀", "ekfac_cg", _damped(100)),
    Entrant("arnoldi", "Arnoldi, λ = 100 λ₀", "arnoldi", _damped(100)),
    Entrant("nystrom", "Nyström, λ = 100 λ₀", "nystrom", _damped(100)),
    Entrant("ekfac", "EK-FAC", "ekfac", lambda scale: {"damping": 0.1}),
    Entrant("kfac", "K-FAC", "kfac", lambda scale: {"damping": 0.1}),
    Entrant("diagonal", "Diagonal", "diagonal", lambda scale: {"damping": 0.1}),
    Entrant("relatif", "RelatIF", "relatif"),
    Entrant("trak", "TRAK", "trak", lambda scale: {"dimension": 128}),
    Entrant("similarity", "Similarity", "similarity"),
    Entrant("random", "Random", "random"),
)


@dataclass(frozen=True)
class Field:
    """What all entrants are scored on.

    Attributes:
        task: the final model, in double precision.
        train: the training set.
        queries: what is asked.
        left_out: positions of the examples that the gold standard leaves out, `[m]`.
        epochs: amounts of further training.
        further: how it is done.
        fits: what was fitted, by method and all its options but the damping.
    """

    task: Task
    train: Data
    queries: Data
    left_out: Tensor
    epochs: tuple[int, ...]
    further: Further
    fits: dict[str, Any] = field(default_factory=dict, repr=False)

    def scales(self) -> list[Scale]:
        """What settings may depend on, one for each amount."""
        parameters = sum(p.numel() for p in self.task.selected_parameters().values())
        norms = methods.get("graddot").fit(self.task, self.train).self_influence()
        return [
            Scale(
                mean_square=float(norms.mean()) / parameters,
                examples=len(self.train),
                parameters=parameters,
                outputs=self._outputs(),
                steps=epochs * self.further.steps_per_epoch,
                epochs=epochs,
                further=self.further,
            )
            for epochs in self.epochs
        ]

    def _outputs(self) -> int:
        with torch.no_grad():
            one = self.train.batch(slice(0, 1))
            return self.task.objective.outputs(self.task.model, one).numel()

    def scores(self, entrant: Entrant, scales: list[Scale]) -> Tensor:
        """Scores of the examples left out, `[amounts, q, m]`.

        Raises:
            ForebearError: the method refuses this task.
        """
        needed = scales if entrant.follows else scales[:1]
        each = []
        for scale in needed:
            fitted = self._fitted(entrant, entrant.options(scale))
            values = fitted.score(self.queries).values
            each.append(values[:, self.left_out].double())
        return torch.stack(each * (len(scales) // len(needed)))

    def _fitted(self, entrant: Entrant, options: dict[str, Any]) -> Any:
        """Fitted anew, or with other damping where that is all that differs from before."""
        rest = {key: value for key, value in options.items() if key != "damping"}
        name = repr((entrant.method, rest))
        if name in self.fits and "damping" in options and hasattr(self.fits[name], "with_damping"):
            return self.fits[name].with_damping(options["damping"])
        fitted = methods.get(entrant.method, **options).fit(self.task, self.train)
        self.fits[name] = fitted
        return fitted


def absent(entrant: Entrant, scale: Scale) -> str | None:
    """Why an entrant cannot take part; None when it can."""
    if entrant.method not in methods.METHODS:
        return f"this version has no method {entrant.method!r}"
    if entrant.dense and not scale.dense:
        return (
            f"an exact Gauss-Newton matrix of {scale.examples} × {scale.outputs} outputs is not "
            "formed here"
        )
    if entrant.small and not scale.dense:
        return f"it would take too long with {scale.examples} × {scale.outputs} outputs"
    return None
