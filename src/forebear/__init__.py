"""forebear traces what a model did back to the training data that made it do so.

import forebear as fb

task = fb.Task(model, loss=fb.losses.cross_entropy)
fitted = fb.EKFAC(damping=0.1).fit(task, train)
scores = fitted.score(queries)      # [query, train]; positive = proponent
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AbU": "methods.abu",
    "Absolute": "curvature",
    "Arnoldi": "methods.low_rank",
    "CG": "methods.implicit",
    "Cascade": "methods.cascade",
    "Checkpoint": "task",
    "ConceptTRAK": "methods.concept_trak",
    "Counterfactual": "generated",
    "DAS": "methods.das",
    "DTRAK": "methods.dtrak",
    "Data": "data",
    "DataInf": "methods.datainf",
    "Diagonal": "methods.diagonal",
    "EKFAC": "methods.kronecker",
    "EKFACCG": "methods.implicit",
    "EffectiveDimension": "curvature",
    "Exact": "methods.exact",
    "ForebearError": "errors",
    "FurtherTraining": "training",
    "GradCos": "methods.gradient",
    "GradDot": "methods.gradient",
    "GroundTruth": "training",
    "Horizon": "curvature",
    "InProcess": "executors",
    "Influence": "methods.influence",
    "JourneyTRAK": "methods.journey_trak",
    "KFAC": "methods.kronecker",
    "LeaveOneOut": "methods.leave_one_out",
    "LiSSA": "methods.implicit",
    "MUCS": "methods.mucs",
    "NDA": "methods.nda",
    "Nystrom": "methods.low_rank",
    "NewtonStep": "methods.newton_step",
    "NonzeroRelative": "curvature",
    "Objective": "tasks.objective",
    "Pixels": "methods.pixels",
    "Processes": "executors.processes",
    "Random": "methods.baselines",
    "Ray": "executors.ray",
    "Recipe": "training",
    "RelatIF": "methods.relatif",
    "Relative": "curvature",
    "RemovalEstimate": "removal",
    "Response": "training",
    "ScoreBlocks": "methods.blocks",
    "Scores": "types",
    "Similarity": "methods.baselines",
    "Store": "store",
    "TRAK": "methods.trak",
    "Task": "task",
    "TopK": "types",
    "Torchrun": "executors.torchrun",
    "TracIn": "methods.gradient",
    "Unrolled": "methods.unrolled",
    "attribute": "pipeline",
    "attribute_images": "generated",
    "build_store": "methods.features",
    "combine": "methods.ensemble",
    "damping_sweep": "methods.sweep",
    "evaluate": "pipeline",
    "explain": "adapters.scikit_learn",
    "fit_store": "methods.stored",
    "get": "methods",
    "load": "pipeline",
    "load_fitted": "methods.stored",
    "progress": "progress",
    "query_features": "methods.features",
}
_MODULES = {
    "diffusers": "adapters.diffusers",
    "methods": "methods",
    "losses": "tasks.losses",
    "metrics": "metrics",
    "errors": "errors",
    "index": "index",
}

__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import forebear` is instant."""
    if name in _PUBLIC:
        value = getattr(import_module(f"forebear.{_PUBLIC[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"forebear.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'forebear' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
