"""forebear traces what a model did back to the training data that made it do so.

import forebear as fb

task = fb.Task(model, loss=fb.losses.cross_entropy)
fitted = fb.EKFAC(damping=0.1).fit(task, train)
scores = fitted.score(queries)      # [query, train]; positive = proponent
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Absolute": "curvature",
    "Arnoldi": "methods.low_rank",
    "CG": "methods.implicit",
    "Cascade": "methods.cascade",
    "Checkpoint": "task",
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
    "Influence": "methods.influence",
    "KFAC": "methods.kronecker",
    "LeaveOneOut": "methods.leave_one_out",
    "LiSSA": "methods.implicit",
    "Nystrom": "methods.low_rank",
    "NewtonStep": "methods.newton_step",
    "Objective": "tasks.objective",
    "Random": "methods.baselines",
    "Recipe": "training",
    "RelatIF": "methods.relatif",
    "Relative": "curvature",
    "RemovalEstimate": "removal",
    "Response": "training",
    "Scores": "types",
    "Similarity": "methods.baselines",
    "TRAK": "methods.trak",
    "Task": "task",
    "TopK": "types",
    "TracIn": "methods.gradient",
    "Unrolled": "methods.unrolled",
    "attribute": "pipeline",
    "damping_sweep": "methods.sweep",
    "evaluate": "pipeline",
    "explain": "adapters.scikit_learn",
    "get": "methods",
    "load": "pipeline",
    "progress": "progress",
}
_MODULES = {
    "methods": "methods",
    "losses": "tasks.losses",
    "metrics": "metrics",
    "errors": "errors",
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
