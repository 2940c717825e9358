"""Metrics: pure functions of arrays, one value a query unless they say otherwise.

`METRICS` says where each is; arrays may be numpy or torch, results are numpy.
"""

from importlib import import_module
from typing import Any

METRICS = {
    "bootstrap_interval": "forebear.metrics.bootstrap:bootstrap_interval",
    "cosine_similarity": "forebear.metrics.cosine:cosine_similarity",
    "found_in_first": "forebear.metrics.mislabel:found_in_first",
    "lds": "forebear.metrics.subset_prediction:lds",
    "loo_correlation": "forebear.metrics.leave_one_out:loo_correlation",
    "map_at": "forebear.metrics.retrieval:map_at",
    "mislabel_auc": "forebear.metrics.mislabel:mislabel_auc",
    "mrr": "forebear.metrics.retrieval:mrr",
    "noise_ceiling": "forebear.metrics.ceiling:noise_ceiling",
    "pixel_distance": "forebear.metrics.images:pixel_distance",
    "precision_at": "forebear.metrics.retrieval:precision_at",
    "recall_at": "forebear.metrics.retrieval:recall_at",
    "removal_curve": "forebear.metrics.removal:removal_curve",
    "removal_shift": "forebear.metrics.counterfactual:removal_shift",
    "split_half_reliability": "forebear.metrics.reliability:split_half_reliability",
    "ssim": "forebear.metrics.images:ssim",
}


def __getattr__(name: str) -> Any:
    if name not in METRICS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = METRICS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *METRICS])
