"""What gradient methods for diffusion share: one kernel, a fixed ridge, and sweeps over ridges.

`score(q, z) = g_qᵀ (GᵀG / n + λI)⁻¹ g_z`, with features g that are means over levels of noise of
the gradient of a scalar. Methods differ in the scalar, and in what they multiply by.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.curvature import Damping, Dense, NonzeroRelative, Whole, as_damping
from forebear.curvature.dense import FittedDense
from forebear.curvature.solved import flat
from forebear.curvature.span import FittedSpan
from forebear.curvature.spectrum import FittedSpectrum
from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import TaskError
from forebear.gradients import Precision
from forebear.methods.fitted import require_same_columns
from forebear.methods.fitted_influence import FittedInfluence
from forebear.progress import track
from forebear.projections import Compression, compressed
from forebear.task import Task

RIDGE = NonzeroRelative(1.0)
"""The rule for λ where none is given: it looks at the features alone."""


def kernel(
    damping: float | Damping,
    dimension: int | None,
    projection: Compression,
    precision: Precision,
    layers: tuple[str, ...] | None,
    seed: int,
) -> dict[str, Any]:
    """What the methods have in common, as options of `Influence`.

    Args:
        damping: λ; a number is relative to the mean eigenvalue.
        dimension: of a projection; None compares whole gradients, exactly, which takes memory for
            all of them where they are fewer than parameters.
        projection: `"tensor_sketch"`, which acts on factors, `"gaussian"` or `"sjlt"`.
        precision: of the products of all pairs; the dual form, of fewer examples than parameters,
            has its own.
        layers: restrict the method to these layers.
        seed: of the projection.
    """
    return {
        "curvature": Whole(Dense(kind="fisher", precision=precision)),
        "projection": compressed(dimension, projection),
        "damping": damping,
        "units": "ranking",
        "layers": layers,
        "seed": seed,
    }


@torch.no_grad()
def training_residuals(task: Task, data: Data, batch_size: int) -> Tensor:
    """How far the model is from each training example, `[n]`, as DAS weighs it.

    Roots of the errors at every level of noise, divided by their length over the levels, averaged:
    between `1 / levels`, all error at one level, and `1 / √levels`, the same at all.

    Raises:
        NonFiniteError: a loss is NaN or infinite; with the ids.
    """
    parts = task.objective.parts
    found = torch.empty(len(data), dtype=torch.float64)
    steps = -(-len(data) // batch_size)
    with task.evaluation():
        for rows, batch in track(data.batches(batch_size), "training residuals", total=steps):
            moved = map_tensors(lambda t: t.to(task.device), batch)
            errors = torch.stack([part(task.model, moved) for part in parts], 1)  # [b, points]
            with naming(data, rows):
                require_finite(errors, "loss")
            roots = errors.double().clamp_min(0).sqrt()
            lengths = roots.norm(dim=1, keepdim=True).clamp_min(torch.finfo(roots.dtype).tiny)
            found[rows] = (roots / lengths).mean(1).cpu()
    return found


def ridge_sweep(
    fitted: FittedInfluence, queries: Any, dampings: Sequence[float | Damping]
) -> Iterator[Tensor]:
    """Scores `[q, n]` at each of many ridges, from one eigendecomposition.

    Gradients are taken once and written in the eigenvectors; a ridge is then one product of small
    matrices. Meant for studies that report the best ridge *beside* the one a rule gave: a ridge
    that was chosen by the measure it is judged by is not a result.

    Args:
        fitted: `Influence` with a dense curvature, such as `TRAK`, `DTRAK` or `DAS`, at one model
            and not normalised, or by the length of the step in parameters.
        queries: what is asked about.
        dampings: numbers are relative to the mean eigenvalue.

    Raises:
        TaskError: the method has no such curvature.
    """
    method = fitted.method
    normalised = method.normalise not in ("none", "relative_parameters")
    if len(fitted.moments) > 1 or normalised or method.correction != "none":
        raise TaskError(
            f"ridges of {method.name} cannot be swept over: it must use one model, and "
            "normalise='none' or 'relative_parameters'; call with_damping for each instead"
        )
    chosen = [as_damping(damping) for damping in dampings]
    data = Data.of(queries, collate=fitted.task.collate)
    require_same_columns(fitted.train, data)
    base = fitted.curvatures[0]
    if not isinstance(base, FittedDense | FittedSpectrum | FittedSpan):
        raise TaskError(
            f"{type(base).__name__} does not know its eigenvectors: use a method whose curvature "
            "is Whole, Dense or GramSpectrum"
        )
    axes = _axes(base, fitted.feature_plan)
    with fitted.task.at(fitted.query_moments[0]):
        stream = fitted.stream(0, data)
        asked = torch.cat(
            [axes(g) for _, _, g in stream.gradients(fitted.query_function, "queries")]
        )
    seen, shares = [], []
    for _, weights, gradients in fitted.training_pass("training set"):
        rows = axes(gradients[0])
        seen.append(rows)
        shares.append(weights.to(rows) if method.gradient == "output" else rows.new_ones(len(rows)))
    told = torch.cat(seen)  # [n, r]; everything of the training set lies in the span
    share = torch.cat(shares)
    for damping in chosen:
        inverse = base.with_damping(damping).inverse
        assert inverse is not None
        steps = told * inverse.to(told)
        lengths = steps.norm(dim=1) if method.normalise == "relative_parameters" else 1.0
        scores = asked @ steps.T * (share / lengths)
        yield fitted.finished(scores * fitted.scale, slice(0, len(fitted.train)))


def _axes(fit: FittedDense | FittedSpectrum | FittedSpan, plan: Plan) -> Callable[..., Tensor]:
    """From gradients to coordinates `[b, r]` along the eigenvectors."""
    if isinstance(fit, FittedSpan):
        return fit.coordinates
    if isinstance(fit, FittedSpectrum):
        vectors = fit.pairs.vectors.T  # [P, r]
    else:
        assert fit.source is not None
        vectors = fit.source.eigenpairs[1]
    return lambda gradients: torch.cat([g.to(vectors) @ vectors for g in flat(gradients, plan)])
