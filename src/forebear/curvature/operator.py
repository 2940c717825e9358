"""Curvature as an operator: products `C v` with many vectors at once, and no `[P, P]` inverse.

Vectors are the blocks of a plan one after the other, each written out row by row; C is the
curvature of the mean training loss. Gauss-Newton and Fisher matrices are `RᵀR / n` with few rows:
where R fits into memory it is kept, and a product is two matrix products for all vectors together.
Otherwise the data are gone through for every product: the Hessian and the Gauss-Newton matrix by
double backward passes (Pearlmutter 1994; Schraudolph 2002), the Fisher matrix by gradients that
stay factored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.double_backward import (
    GaussNewtonProducts,
    HessianProducts,
    State,
    random_vectors,
)
from forebear.curvature.moments import add_gram, symmetric
from forebear.curvature.outputs import MOST_OUTPUTS
from forebear.curvature.roots import root_gradients, rows_per_example
from forebear.curvature.solved import flat
from forebear.data import map_tensors
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import WORKSPACE, materialise, rows_of, squared_norms
from forebear.layers import Factors
from forebear.stream import Stream, summed
from forebear.types import require_choices

Kind = Literal["hessian", "gauss_newton", "fisher"]

KEPT_BYTES = 2**29
"""Rows of R, or the matrix they make, up to 512 MB are kept."""


class Operator(Protocol):
    """A symmetric matrix C `[P, P]` that is known by its products."""

    @property
    def plan(self) -> Plan:
        """Blocks of the vectors."""
        ...

    @property
    def size(self) -> int:
        """Number of parameters P."""
        ...

    @property
    def like(self) -> Tensor:
        """An empty tensor of the type and on the device of the products."""
        ...

    @property
    def mean_eigenvalue(self) -> float:
        """Trace over P: exact, unless P is large and only double backward passes know C."""
        ...

    def __call__(self, vectors: Tensor) -> Tensor:
        """`C v` for each row of `[m, P]`."""
        ...

    def on(self, examples: Tensor) -> Callable[[Tensor], Tensor]:
        """The same products with the curvature of the mean loss of some examples, by position."""
        ...


def curvature_operator(
    kind: Kind,
    stream: GradientStream,
    function: Function,
    *,
    seed: int = 0,
    by_example: bool = False,
) -> Operator:
    """The curvature of the mean of `function` over a stream, in the cheapest form that fits.

    Args:
        kind: `"gauss_newton"` from the model's outputs, `"fisher"` (second moment of the gradients
            as they are), or `"hessian"`.
        stream: the training set; projected gradients have a Fisher matrix only.
        function: the training loss `[b]`.
        seed: of the probes that estimate a trace.
        by_example: keep rows apart, so that `on` serves parts of the data without a pass.

    Raises:
        TaskError: the loss does not have the derivatives that `kind` asks for.
        UnknownNameError: there is no such kind.
    """
    require_choices(_Kind(kind))
    size = sum(block.size for block in stream.plan.blocks.values())
    if kind != "fisher" and not isinstance(stream, Stream):
        raise TaskError(
            f"the {kind} of projected gradients is not known: use kind='fisher', or no projection"
        )
    if kind == "hessian":
        assert isinstance(stream, Stream)
        return HessianProducts(stream, function, size, seed)
    rows = 1
    if kind == "gauss_newton":
        assert isinstance(stream, Stream)
        outputs = _outputs_per_example(stream)
        if outputs > MOST_OUTPUTS:  # a pass for each to write R out: more than products take
            return GaussNewtonProducts(stream, function, size, seed)
        rows = rows_per_example(stream)
    everywhere = rows * len(stream.data)
    entry = 8 if next(stream.task.model.parameters()).dtype == torch.float64 else 4
    if size <= everywhere and entry * size * size <= KEPT_BYTES and not by_example:
        return _kept_matrix(kind, stream, function, size)
    if entry * everywhere * size <= KEPT_BYTES:
        return _kept_rows(kind, stream, function, size, rows)
    if kind == "fisher":
        return FisherProducts(stream, function, size)
    assert isinstance(stream, Stream)
    return GaussNewtonProducts(stream, function, size, seed)


@dataclass(frozen=True)
class _Kind:
    kind: Kind


def power_iteration(operator: Operator, steps: int = 20, *, seed: int = 0) -> float:
    """Largest absolute eigenvalue, from below: a few random starts go the same steps together."""
    return largest_eigenvalue(operator, operator.like, operator.size, steps, seed)


def largest_eigenvalue(
    apply: Callable[[Tensor], Tensor], like: Tensor, size: int, steps: int = 20, seed: int = 0
) -> float:
    """As `power_iteration`, of any linear map of vectors `[m, size]`."""
    vectors = random_vectors(4, size, seed, like)
    largest = 0.0
    for _ in range(steps):
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
        vectors = apply(vectors)
        largest = vectors.norm(dim=1).max().item()
    return largest


@dataclass(frozen=True)
class KeptRows:
    """`C = RᵀR / n` with R in memory.

    Attributes:
        plan: blocks of the columns.
        rows: `[n, c, P]`, c rows for each example.
    """

    plan: Plan
    rows: Tensor

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return self.rows.shape[2]

    @property
    def like(self) -> Tensor:
        """Type and device."""
        return self.rows.new_empty(0)

    @property
    def mean_eigenvalue(self) -> float:
        """Mean square of the rows."""
        # A product, not squares: those would take as much memory as the rows.
        flat = self.rows.view(-1)
        return torch.dot(flat, flat).item() / len(self.rows) / self.size

    def __call__(self, vectors: Tensor) -> Tensor:
        """`C v` for each row of `[m, P]`."""
        rows = self.rows.flatten(0, 1)
        return (vectors @ rows.T).div_(len(self.rows)) @ rows

    def on(self, examples: Tensor) -> "KeptRows":
        """The rows of some examples."""
        return KeptRows(self.plan, self.rows[examples])


@dataclass(frozen=True)
class KeptMatrix:
    """C written out, where that is smaller than R."""

    plan: Plan
    matrix: Tensor

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return len(self.matrix)

    @property
    def like(self) -> Tensor:
        """Type and device."""
        return self.matrix.new_empty(0)

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the diagonal."""
        return self.matrix.diagonal().mean().item()

    def __call__(self, vectors: Tensor) -> Tensor:
        """`C v` for each row of `[m, P]`."""
        return vectors @ self.matrix

    def on(self, examples: Tensor) -> Callable[[Tensor], Tensor]:
        """Not kept."""
        raise TaskError("examples were added up: build the operator with by_example=True")


def _kept_rows(
    kind: Kind, stream: GradientStream, function: Function, size: int, copies: int
) -> KeptRows:
    kept: Tensor | None = None
    for where, k, gradients in _parts(kind, stream, function):
        start = where.start
        for written in flat(gradients, stream.plan):
            if kept is None:
                kept = written.new_empty(len(stream.data), copies, size)
            kept[start : start + len(written), k] = written
            start += len(written)
    assert kept is not None
    return KeptRows(stream.plan, kept)


def _kept_matrix(kind: Kind, stream: GradientStream, function: Function, size: int) -> KeptMatrix:
    total = summed(stream, partial(_added, kind, function, size), "curvature")["all"]
    return KeptMatrix(stream.plan, symmetric(total).div_(len(stream.data)))


def _added(
    kind: Kind, function: Function, size: int, stream: GradientStream, piece: int
) -> dict[str, Tensor]:
    """`RᵀR` of a piece, its upper half."""
    total: Tensor | None = None
    for _, _, gradients in _parts(kind, stream, function):
        for written in flat(gradients, stream.plan):
            total = written.new_zeros(size, size) if total is None else total
            add_gram(total, written)
    assert total is not None
    return {"all": total}


def _parts(
    kind: Kind, stream: GradientStream, function: Function
) -> Iterator[tuple[slice, int, Gradients]]:
    """Rows of R, factored: positions, number of the row of each example, gradients."""
    if kind == "fisher":
        for where, _, gradients in stream.gradients(function, "gradients"):
            yield where, 0, gradients
        return
    yield from root_gradients(stream)


class FisherProducts:
    """Second moment of the gradients, which are computed anew for every product."""

    def __init__(self, stream: GradientStream, function: Function, size: int) -> None:
        self.stream, self.function, self.size = stream, function, size
        self.plan = stream.plan
        self._state = State(stream)

    @property
    def like(self) -> Tensor:
        """Type and device."""
        first = next(self.stream.task.model.parameters())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        return torch.empty(0, dtype=dtype, device=first.device)

    @property
    def mean_eigenvalue(self) -> float:
        """Mean square of the gradients' entries."""
        return self._mean

    @cached_property
    def _mean(self) -> float:
        total = 0.0
        for _, _, gradients in self.stream.gradients(self.function, "gradients"):
            for name, block in self.plan.blocks.items():
                total += squared_norms(gradients[name], block).sum().item()
        return total / len(self.stream.data) / self.size

    def __call__(self, vectors: Tensor) -> Tensor:
        """`C v` for each row of `[m, P]`."""
        out = torch.zeros_like(vectors)
        with self._state.restored():
            for _, _, gradients in self.stream.gradients(self.function, "curvature products"):
                self._add(out, vectors, gradients)
        return out / len(self.stream.data)

    def on(self, examples: Tensor) -> Callable[[Tensor], Tensor]:
        """The mean over some examples."""
        stream: Any = self.stream  # every stream can be asked for some examples

        def apply(vectors: Tensor) -> Tensor:
            out = torch.zeros_like(vectors)
            with self._state.restored():
                _, gradients = stream.at(examples, self.function)
            self._add(out, vectors, gradients)
            return out / len(examples)

        return apply

    def _add(self, out: Tensor, vectors: Tensor, gradients: Gradients) -> None:
        places, start = {}, 0
        for name, block in self.plan.blocks.items():
            places[name] = (block, slice(start, start + block.size))
            start += block.size
        parts = [
            _along(vectors[:, where], gradients[name], block)
            for name, (block, where) in places.items()
        ]
        weights = torch.stack(parts).sum(0)  # [m, b]
        for name, (block, where) in places.items():
            _add_back(out[:, where], weights, gradients[name], block)


def _along(vectors: Tensor, terms: list[Factors], block: Block) -> Tensor:
    """Products of vectors `[m, rows * cols]` with all gradients, `[m, b]`."""
    if not _without_positions(terms, block):
        parts = [vectors @ written.T for written in _written(terms, block)]
        return torch.cat(parts, 1)
    left, right = (side[:, 0] for side in terms[0])
    matrices = vectors.reshape(-1, block.rows, block.cols)
    step = max(1, WORKSPACE // (len(left) * block.rows))
    parts = []
    for some in matrices.split(step):
        turned = (some.flatten(0, 1) @ right.T).view(-1, block.rows, len(left))
        parts.append(torch.einsum("mob,bo->mb", turned, left))
    return torch.cat(parts)


def _add_back(out: Tensor, weights: Tensor, terms: list[Factors], block: Block) -> None:
    """Add the gradients, summed with weights `[m, b]`, to `out` `[m, rows * cols]`."""
    if not _without_positions(terms, block):
        start = 0
        for written in _written(terms, block):
            out += weights[:, start : start + len(written)] @ written
            start += len(written)
        return
    left, right = (side[:, 0] for side in terms[0])
    step = max(1, WORKSPACE // (len(left) * block.rows))
    for start in range(0, len(weights), step):
        some = slice(start, start + step)
        scaled = weights[some, None] * left.T  # [m, rows, b]
        out[some] += (scaled.flatten(0, 1) @ right).view(-1, block.size)


def _written(terms: list[Factors], block: Block) -> Iterator[Tensor]:
    """Gradients written out, some examples at a time, `[c, rows * cols]`."""
    step = max(1, WORKSPACE // block.size)
    for start in range(0, len(terms[0].right), step):
        yield materialise(rows_of(terms, slice(start, start + step)), block).flatten(1)


def _without_positions(terms: list[Factors], block: Block) -> bool:
    """Whether factors stay factored: with positions, or as vectors, they are no cheaper."""
    left = terms[0].left
    return len(terms) == 1 and block.cols > 1 and left.ndim == 3 and left.shape[1] == 1


def _outputs_per_example(stream: Stream) -> int:
    task = stream.task
    try:
        objective = task.objective
    except TaskError as error:
        raise TaskError(f"{error}; or choose curvature='hessian' or 'fisher'") from error
    batch = map_tensors(lambda t: t.to(task.device), stream.data.batch(slice(0, 1)))
    with task.evaluation(), torch.no_grad():
        return objective.outputs(task.model, batch).numel()
