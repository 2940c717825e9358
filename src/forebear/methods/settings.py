"""Configurations as JSON and back, without pickle."""

from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from forebear.descriptions import Described, describe
from forebear.errors import FormatError

PARTS = {
    "Influence": "forebear.methods.influence",
    "NewtonInfluence": "forebear.methods.newton_step",
    "DASInfluence": "forebear.methods.das",
    "JourneyInfluence": "forebear.methods.journey_trak",
    "ConceptInfluence": "forebear.methods.concept_trak",
    "Similarity": "forebear.methods.baselines",
    "Random": "forebear.methods.baselines",
    "Pixels": "forebear.methods.pixels",
    "MUCS": "forebear.methods.mucs",
    "NDA": "forebear.methods.nda",
    "Unlearning": "forebear.methods.abu",
    "Discrete": "forebear.tasks.schedules",
    "Continuous": "forebear.tasks.schedules",
    "Sampler": "forebear.tasks.sampling",
    "FurtherTrained": "forebear.methods.further_training",
    "LeaveOneOut": "forebear.methods.leave_one_out",
    "Unrolled": "forebear.methods.unrolled",
    "Recipe": "forebear.training",
    "DenoisingTraining": "forebear.tasks.diffusion",
    "Identity": "forebear.curvature",
    "Kronecker": "forebear.curvature",
    "Dense": "forebear.curvature",
    "Whole": "forebear.curvature",
    "GramSpectrum": "forebear.curvature",
    "Diagonal": "forebear.curvature",
    "DataInf": "forebear.curvature",
    "Arnoldi": "forebear.curvature",
    "Nystrom": "forebear.curvature",
    "ConjugateGradients": "forebear.curvature",
    "LiSSA": "forebear.curvature",
    "Relative": "forebear.curvature",
    "NonzeroRelative": "forebear.curvature",
    "Absolute": "forebear.curvature",
    "Horizon": "forebear.curvature",
    "EffectiveDimension": "forebear.curvature",
    "Gaussian": "forebear.projections",
    "TensorSketch": "forebear.projections",
    "SJLT": "forebear.projections",
    "TwoSided": "forebear.projections",
}
"""Classes a saved configuration may name, and where they are; nothing else is ever imported."""


def settings_of(method: Any) -> dict[str, Any]:
    """A configuration as nested dicts, each with the class name of its part.

    Functions and objects of your own are `{"about": ...}`, their description.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Described):
            return {"about": value.about}
        if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
            return {"type": type(value).__name__, **parts}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, str | int | float | bool | None):
            return value
        about = describe(value)
        return about if isinstance(about, str) else {"about": about}

    return plain(method)


def method_of(settings: dict[str, Any]) -> Any:
    """The configuration that `settings_of` described.

    Raises:
        FormatError: it names a class or a field that this version does not have.
    """

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(made(item) for item in value)
        if not isinstance(value, dict):
            return value
        if value.keys() == {"about"}:
            return Described(value["about"])
        kind = value.get("type")
        if kind not in PARTS:
            raise FormatError(
                f"the saved settings name a part {kind!r} that this version does not have: pass "
                "the configuration itself with method="
            )
        parts = {key: made(part) for key, part in value.items() if key != "type"}
        try:
            return getattr(import_module(PARTS[kind]), kind)(**parts)
        except TypeError as error:
            raise FormatError(f"the saved settings do not fit this version: {error}") from error

    return made(settings)
