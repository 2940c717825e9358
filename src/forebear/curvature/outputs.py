"""The curvature of the loss in the model's outputs, and gradients of all that it asks for.

The Gauss-Newton matrix is `(1/n) Σ J_nᵀ R_n R_nᵀ J_n` with J the Jacobian of the outputs and
`R Rᵀ` the Hessian of the loss in them. Every column of R is one backward pass; the forward pass is
shared.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from forebear.capture import Capture, Gradients, _merge
from forebear.curvature.base import GradientStream
from forebear.curvature.sampled import generator_of
from forebear.data import batch_length, map_tensors, naming, require_finite
from forebear.differentiation import only_these_need_gradients, per_example_gradients
from forebear.errors import TaskError
from forebear.layers import Factors, vector
from forebear.sharding import agreement
from forebear.stream import Stream
from forebear.tasks.classification import CrossEntropy
from forebear.tasks.objective import Objective
from forebear.tasks.regression import SquaredError

MOST_OUTPUTS = 1000
"""Outputs of an example beyond which a backward pass for each is refused."""

ROWS = 16
"""Backward passes that a batch of the usual size is made for; more make the batches smaller."""


class Cotangents(Protocol):
    """Gradients at the model's outputs, to be pulled back to the parameters one by one."""

    count: int

    def of(self, outputs: Tensor, batch: Any) -> Iterator[Tensor]:
        """`count` tensors shaped like `outputs`, which is detached."""
        ...


class AllTargets:
    """The exact expectation over targets: columns of a root of the Hessian in the outputs.

    For softmax with probabilities p these second moments are those of `√p_c (e_c − p)` for all
    classes c ("type-2"), from one column less; for squared error they are the unit vectors.

    Raises:
        TaskError: an example has more than `MOST_OUTPUTS` outputs.
    """

    def __init__(self, stream: GradientStream) -> None:
        self.objective = stream.task.objective
        outputs = outputs_per_example(stream)
        if outputs > MOST_OUTPUTS:
            raise TaskError(
                f"the exact Gauss-Newton matrix needs a pass for each of {outputs} outputs of an "
                "example: use ekfac or kfac with targets='sampled', or kind='fisher'"
            )
        self.softmax = _computes(self.objective, CrossEntropy)
        self.squared = _computes(self.objective, SquaredError)
        self.count = max(outputs - 1, 1) if self.softmax else outputs

    def of(self, outputs: Tensor, batch: Any) -> Iterator[Tensor]:
        """Columns of the root, each `[b, *outputs]`."""
        if self.softmax:
            yield from _softmax_columns(outputs)
            return
        if self.squared:
            for k in range(self.count):
                column = torch.zeros_like(outputs)
                column[:, k] = 1
                yield column
            return
        for column in root_of_output_hessian(self.objective, outputs, batch).unbind(2):
            yield column.view_as(outputs)


class DrawnTargets:
    """Several targets drawn for each example of a piece; together they count as much as one."""

    def __init__(self, stream: GradientStream, draws: int, seed: int, piece: int = 0) -> None:
        self.objective = stream.task.objective
        self.count = draws
        self.generator = generator_of(stream.task, seed, piece)

    def of(self, outputs: Tensor, batch: Any) -> Iterator[Tensor]:
        """The gradient at the outputs for each draw."""
        for _ in range(self.count):
            targets, weights = self.objective.sample(outputs, batch, self.generator)
            with torch.enable_grad():
                leaf = outputs.detach().requires_grad_()
                loss = self.objective.loss_at(leaf, batch, targets, weights)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            yield gradient / math.sqrt(self.count)


def gradients_of_each(
    stream: GradientStream, cotangents: Cotangents, description: str
) -> Iterator[list[Gradients]]:
    """Batch by batch, the gradients for every cotangent; right factors are shared among them.

    A stream that is not of whole gradients (projected ones) is run over once for each.
    """
    if not isinstance(stream, Stream):
        for k in range(cotangents.count):
            for _, _, gradients in stream.gradients(_Pulled(stream, cotangents, k), description):
                yield [gradients]
        return
    size = max(1, stream.step * ROWS // max(cotangents.count, ROWS))
    stream = replace(stream, batch_size=size)
    capture = _SharedForward(stream.task, stream.plan)
    with capture:
        for rows, batch in stream.batches(description):
            with naming(stream.data, rows):
                yield capture.each(cotangents, batch)


class _SharedForward(Capture):
    """Gradients of several linear functions of the same outputs."""

    def each(self, cotangents: Cotangents, batch: Any) -> list[Gradients]:
        """The factored gradients of `⟨cotangent, outputs⟩` for each cotangent."""

        def again() -> None:
            capture = _SharedForward(self.task, self.plan)
            with capture:
                capture._each(cotangents, batch)

        kind = "gradients of each output"
        return self.task.in_step(kind, lambda: self._each(cotangents, batch), again)

    def _each(self, cotangents: Cotangents, batch: Any) -> list[Gradients]:
        model, objective = self.task.model, self.task.objective
        batch = map_tensors(lambda t: t.detach().to(self.task.device), batch)
        self._size = batch_length(batch)
        self._calls, self._active = [], True
        with agreement(model):
            try:
                with torch.enable_grad(), only_these_need_gradients(model, ()):
                    outputs = objective.outputs(model, batch)
            finally:
                self._active = False
            calls, self._calls = self._calls, []
            require_finite(outputs.detach(), "model's output")
        found: list[Gradients] = []
        for cotangent in cotangents.of(outputs.detach(), batch):
            for call in calls:
                call.g = None
            if outputs.requires_grad and calls:
                self._pull(outputs, cotangent, calls)
            gradients: Gradients = {name: [] for name in self.plan.blocks}
            for call in calls:
                self._collect(call, gradients)
            if self.plan.fallback:
                gradients |= self._one_by_one(cotangent, batch)
            for name, block in self.plan.blocks.items():
                gradients[name] = _merge(gradients[name], block) or [self._zero(block)]
                for term in gradients[name]:
                    require_finite(term.right, f"gradient of {name!r}")
                    if term.left.is_floating_point():
                        require_finite(term.left, f"gradient of {name!r}")
            found.append(_shared(found[0], gradients) if found else gradients)
        return found

    def _pull(self, outputs: Tensor, cotangent: Tensor, calls: list[Any]) -> None:
        try:
            torch.autograd.backward(outputs, cotangent, inputs=[self._anchor], retain_graph=True)
        except RuntimeError:
            for call in calls:
                self._require_kept(call)
            raise

    def _one_by_one(self, cotangent: Tensor, batch: Any) -> Gradients:
        objective = self.task.objective

        def function(model: nn.Module, both: Any) -> Tensor:
            return (objective.outputs(model, both[0]) * both[1]).flatten(1).sum(1)

        both = (batch, cotangent)
        found = per_example_gradients(self.task.model, self.plan.fallback, function, both)
        return {name: [vector(g.flatten(1))] for name, g in found.items()}


class _Pulled:
    """One of the cotangents as a function to differentiate."""

    def __init__(self, stream: GradientStream, cotangents: Cotangents, k: int) -> None:
        self.objective = stream.task.objective
        self.cotangents = cotangents
        self.k = k

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = self.objective.outputs(model, batch)
        each = self.cotangents.of(outputs.detach(), batch)
        cotangent = next(c for k, c in enumerate(each) if k == self.k)
        return (outputs * cotangent).flatten(1).sum(1)


def _shared(first: Gradients, later: Gradients) -> Gradients:
    """`later` with the right factors of `first`: what went into a layer is the same."""

    def one(kept: Factors, term: Factors) -> Factors:
        same = term.left.is_floating_point() and kept.right.shape == term.right.shape
        return Factors(term.left, kept.right) if same else term

    return {
        name: [one(kept, term) for kept, term in zip(first[name], terms, strict=True)]
        for name, terms in later.items()
    }


def _softmax_columns(logits: Tensor) -> Iterator[Tensor]:
    """c − 1 columns of a root of `diag(p) − p pᵀ`, each `[b, c]`.

    It is `D (I − s sᵀ) D` with s = √p, a unit vector, and D = diag(s). The reflection that takes s
    to the first axis has the other axes' images orthogonal to s: they are a root of `I − s sᵀ`.
    """
    s = logits.softmax(-1).sqrt()
    if s.shape[1] == 1:
        yield torch.zeros_like(s)
        return
    axis = s.clone()
    axis[:, 0] += 1
    scaled = s * axis / (1 + s[:, :1])
    for k in range(1, s.shape[1]):
        column = -scaled * s[:, k : k + 1]
        column[:, k] += s[:, k]
        yield column


def _computes(objective: Objective, kind: type[Objective]) -> bool:
    """Whether an objective has the loss and the flat outputs of a ready one."""
    own = type(objective)
    return own.loss is kind.loss and own.outputs is kind.outputs


def outputs_per_example(stream: GradientStream) -> int:
    """How many numbers the model says about one example."""
    batch = stream.data.batch(slice(0, 1))
    batch = map_tensors(lambda t: t.to(stream.task.device), batch)
    model, objective = stream.task.model, stream.task.objective

    def count() -> int:
        with stream.task.evaluation(), torch.no_grad():
            return objective.outputs(model, batch).numel()

    return stream.task.in_step("outputs", count, count)


def root_of_output_hessian(objective: Any, outputs: Tensor, batch: Any) -> Tensor:
    """`R` `[b, c, c]` with `R Rᵀ` the Hessian of the loss in the outputs."""

    def loss(output: Tensor, example: Any) -> Tensor:
        return objective.loss(output[None], map_tensors(lambda t: t[None], example))[0]

    hessian = torch.func.vmap(torch.func.hessian(loss))(outputs, batch)
    size = outputs[0].numel()
    values, vectors = torch.linalg.eigh(hessian.reshape(-1, size, size))
    return vectors * values.clamp_min(0).sqrt()[:, None]
