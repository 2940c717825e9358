"""Every method by name: one row a method. Reading `METHODS` shows all there is."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from forebear.errors import unknown_name


@dataclass(frozen=True)
class Entry:
    """One registered method.

    Attributes:
        label: the name for people.
        factory: `module:name` of what makes the configuration.
        family: what kind of reasoning it is.
        needs: what it must be given.
        cost: of fitting and scoring, in plain forward + backward passes over the training set.
        modalities: what it was made for.
        paper: where it comes from.
    """

    label: str
    factory: str
    family: str
    needs: str
    cost: str
    modalities: str
    paper: str


METHODS = {
    "random": Entry("Random", "baselines:Random", "baseline", "nothing", "none", "any", "—"),
    "similarity": Entry(
        "Similarity",
        "baselines:Similarity",
        "representation",
        "final model",
        "one forward pass",
        "any",
        "Hanawa et al. 2021",
    ),
    "pixels": Entry(
        "Pixel distance",
        "pixels:Pixels",
        "data only",
        "images",
        "no pass; one product of all pixels",
        "images",
        "—",
    ),
    "graddot": Entry(
        "GradDot",
        "gradient:GradDot",
        "gradient",
        "final model",
        "about 1.5 to 2",
        "any",
        "Charpiat et al. 2019",
    ),
    "gradcos": Entry(
        "GradCos",
        "gradient:GradCos",
        "gradient",
        "final model",
        "about 1.5 to 2",
        "any",
        "Charpiat et al. 2019",
    ),
    "tracin": Entry(
        "TracIn",
        "gradient:TracIn",
        "gradient",
        "checkpoints with learning rates",
        "about 2 a checkpoint",
        "any",
        "Pruthi et al. 2020",
    ),
    "exact": Entry(
        "Exact influence",
        "exact:Exact",
        "influence",
        "final model, up to 20,000 parameters",
        "P / 64 to P passes",
        "any",
        "Koh & Liang 2017",
    ),
    "newton_step": Entry(
        "Newton step",
        "newton_step:NewtonStep",
        "influence",
        "final model with a ready loss, up to 20,000 parameters",
        "2 c passes for c outputs, and n c P² operations",
        "any",
        "Rubinstein & Hopkins 2025",
    ),
    "kfac": Entry(
        "K-FAC",
        "kronecker:KFAC",
        "influence",
        "final model",
        "about 3, and 10 to 40 for 500 queries",
        "any",
        "Martens & Grosse 2015",
    ),
    "ekfac": Entry(
        "EK-FAC",
        "kronecker:EKFAC",
        "influence",
        "final model",
        "about 4, and 10 to 40 for 500 queries",
        "any",
        "Grosse et al. 2023",
    ),
    "cg": Entry(
        "Conjugate gradients",
        "implicit:CG",
        "influence",
        "final model",
        "about 2 for each output, or 4 an iteration and query where rows do not fit",
        "any",
        "Koh & Liang 2017",
    ),
    "lissa": Entry(
        "LiSSA",
        "implicit:LiSSA",
        "influence",
        "final model",
        "as cg, with hundreds to thousands of iterations",
        "any",
        "Agarwal et al. 2017",
    ),
    "ekfac_cg": Entry(
        "EK-FAC + CG",
        "implicit:EKFACCG",
        "influence",
        "final model",
        "ekfac, then as cg with fewer iterations",
        "any",
        "Martens 2010; George et al. 2018",
    ),
    "diagonal": Entry(
        "Diagonal influence",
        "diagonal:Diagonal",
        "influence",
        "final model",
        "about 3, and products with written-out queries",
        "any",
        "LeCun et al. 1989",
    ),
    "datainf": Entry(
        "DataInf",
        "datainf:DataInf",
        "influence",
        "final model",
        "about 2, and the square of the number of samples",
        "any",
        "Kwon et al. 2024",
    ),
    "arnoldi": Entry(
        "Arnoldi",
        "low_rank:Arnoldi",
        "influence",
        "final model",
        "a product with the curvature for each of 100 dimensions",
        "any",
        "Schioppa et al. 2022",
    ),
    "nystrom": Entry(
        "Nyström",
        "low_rank:Nystrom",
        "influence",
        "final model",
        "a product with the curvature for all random vectors together",
        "any",
        "Hataya & Yamada 2023",
    ),
    "relatif": Entry(
        "RelatIF",
        "relatif:RelatIF",
        "influence",
        "final model",
        "that of its curvature",
        "any",
        "Barshan et al. 2020",
    ),
    "further_training": Entry(
        "Further training",
        "further_training:FurtherTrained",
        "retraining",
        "final model",
        "3 n for each epoch and seed, all runs together",
        "any",
        "Wei et al. 2025",
    ),
    "leave_one_out": Entry(
        "Leave-one-out",
        "leave_one_out:LeaveOneOut",
        "retraining",
        "recipe",
        "3 n for each epoch and seed, all runs together",
        "any",
        "Cook 1977",
    ),
    "unrolled": Entry(
        "Unrolled",
        "unrolled:Unrolled",
        "unrolling",
        "final model",
        "about 4 for each epoch and query, or example",
        "any",
        "Wei et al. 2025",
    ),
    "trak": Entry(
        "TRAK",
        "trak:TRAK",
        "influence",
        "final model or several",
        "about 5 a checkpoint",
        "any with likelihoods",
        "Park et al. 2023",
    ),
    "dtrak": Entry(
        "D-TRAK",
        "dtrak:DTRAK",
        "influence",
        "final model",
        "about 3, and products of written-out gradients",
        "diffusion models",
        "Zheng et al. 2024",
    ),
    "das": Entry(
        "DAS",
        "das:DAS",
        "influence",
        "final model",
        "about 4, and products of written-out gradients",
        "diffusion models",
        "Lin et al. 2025",
    ),
    "journey_trak": Entry(
        "Journey-TRAK",
        "journey_trak:JourneyTRAK",
        "influence",
        "final model and how queries were sampled",
        "about 3, and the sampling of each query with gradients",
        "diffusion models",
        "Georgiev et al. 2023",
    ),
    "mucs": Entry(
        "MUCS",
        "mucs:MUCS",
        "unlearning",
        "final model",
        "a forward pass for each noise level; for each query so many again and its unlearning",
        "diffusion models",
        "Serrà et al. 2026",
    ),
    "concept_trak": Entry(
        "Concept-TRAK",
        "concept_trak:ConceptTRAK",
        "influence",
        "final model that is told conditions",
        "about 4, and the sampling of 256 noisy images for each query",
        "conditional diffusion models",
        "Park et al. 2025",
    ),
    "abu": Entry(
        "AbU",
        "abu:AbU",
        "unlearning",
        "final model, images; any loss",
        "about 10 to fit and 2 for all queries; forward passes for each query with steps",
        "images",
        "Wang et al. 2024, 2025",
    ),
    "nda": Entry(
        "NDA",
        "nda:NDA",
        "data only",
        "images",
        "no pass; for each query a product of all its patches with all training patches",
        "images",
        "Zhao et al. 2025",
    ),
}


def factory(name: str) -> Callable[..., Any]:
    """What makes the configuration of a method.

    Raises:
        UnknownNameError: with the nearest registered name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, attribute = METHODS[name].factory.split(":")
    return getattr(import_module(f"forebear.methods.{module}"), attribute)


def get(name: str, **options: Any) -> Any:
    """A method by its registered name: `get("ekfac", damping=0.1)`.

    Raises:
        UnknownNameError: the method or an option does not exist; with the nearest name.
    """
    make = factory(name)
    known = [option for option in inspect.signature(make).parameters if option != "name"]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
    return make(**options)


def table() -> list[dict[str, str]]:
    """Every method as a row: name, family, access needed, cost, modalities, paper."""
    rows = []
    for name, entry in METHODS.items():
        facts = asdict(entry)
        del facts["factory"]
        rows.append({"name": name, **facts})
    return rows


class _CallableModule(ModuleType):
    """`forebear.methods` is this package, and `forebear.methods()` is what a user types."""

    def __call__(self) -> list[dict[str, str]]:
        return table()


sys.modules[__name__].__class__ = _CallableModule
