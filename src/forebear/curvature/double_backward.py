"""Products with a curvature by double backward passes over the data, for many vectors at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.curvature.base import GradientStream
from forebear.data import map_tensors, naming, require_finite
from forebear.differentiation import Function, only_these_need_gradients
from forebear.errors import TaskError
from forebear.stream import Stream
from forebear.task import Checkpoint

CHUNK = 32  # vectors that a double backward pass carries at a time
TRACE_PROBES = 32
EXACT_TRACE = 256
PROBE = 4  # examples on which second derivatives are tried
REMEDY = "use curvature='fisher', which needs first derivatives only, or graddot"


def random_vectors(count: int, size: int, seed: int, like: Tensor) -> Tensor:
    """Gaussian vectors `[count, size]` that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(like)


class Differentiated(ABC):
    """Products by double backward passes over the data, for all vectors of a chunk at once."""

    def __init__(self, stream: Stream, function: Function, size: int, seed: int) -> None:
        self.stream, self.function, self.size, self.seed = stream, function, size, seed
        self.plan = stream.plan
        self._state = State(stream)
        model = stream.task.model
        blocks = self.plan.blocks.values()
        self.names = tuple(name for block in blocks for name in block.parameters)
        shapes = {name: model.get_parameter(name).shape for name in self.names}
        numbers, start = {}, 0
        for name, shape in shapes.items():
            numbers[name] = torch.arange(start, start + shape.numel()).view(shape)
            start += shape.numel()
        order = torch.cat([block.matrix(numbers).reshape(-1) for block in blocks])
        device = stream.task.device
        # Where the entries of the blocks are among those of the parameters, and the inverse.
        self.order, self.inverse = order.to(device), order.argsort().to(device)
        self._try()

    @abstractmethod
    def derivative(
        self, model: nn.Module, parameters: list[Tensor], batch: Any
    ) -> tuple[Tensor, "Linear"]:
        """What is differentiated along vectors first, and its derivative along them."""

    @abstractmethod
    def batch_products(self, model: nn.Module, parameters: list[Tensor], batch: Any) -> "Linear":
        """Products with the curvature of a batch's summed loss, in the parameters' order."""

    @property
    def like(self) -> Tensor:
        """Type and device."""
        first = self.stream.task.model.get_parameter(self.names[0])
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        return torch.empty(0, dtype=dtype, device=first.device)

    @property
    def mean_eigenvalue(self) -> float:
        """Trace over P; of many parameters it is Hutchinson's estimate, from random signs."""
        return self._mean

    @cached_property
    def _mean(self) -> float:
        if self.size <= EXACT_TRACE:
            eye = torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)
            return self(eye).diagonal().mean().item()
        signs = random_vectors(TRACE_PROBES, self.size, self.seed, self.like).sign()
        return (self(signs) * signs).sum(1).mean().item() / self.size

    def __call__(self, vectors: Tensor) -> Tensor:
        """`C v` for each row of `[m, P]`."""
        out = torch.zeros_like(vectors)
        for where, batch in self.stream.batches("curvature products"):
            out += self._product(vectors, batch, where)
        return out / len(self.stream.data)

    def on(self, examples: Tensor) -> Callable[[Tensor], Tensor]:
        """The mean over some examples."""

        def apply(vectors: Tensor) -> Tensor:
            batch = self.stream.data.batch(examples)
            return self._product(vectors, batch, examples) / len(examples)

        return apply

    def _product(self, vectors: Tensor, batch: Any, where: slice | Tensor) -> Tensor:
        parts = []
        with self._open(batch, where) as (model, parameters, moved):
            apply = self.batch_products(model, parameters, moved)
            dtype = parameters[0].dtype
            for chunk in vectors[:, self.inverse].to(dtype).split(CHUNK):
                parts.append(apply(chunk).detach())
        return torch.cat(parts)[:, self.order].to(vectors)

    @contextmanager
    def _open(
        self, batch: Any, where: slice | Tensor
    ) -> Iterator[tuple[nn.Module, list[Tensor], Any]]:
        task = self.stream.task
        # The fused attention kernels have no second derivative.
        with (
            task.evaluation(),
            self._state.restored(),
            naming(self.stream.data, where),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            only_these_need_gradients(task.model, self.names) as parameters,
        ):
            moved = map_tensors(lambda t: t.detach().to(task.device), batch)
            yield task.model, list(parameters), moved

    def _try(self) -> None:
        """Autograd leaves out what passes through a function without a derivative of its own.

        It says nothing, so its derivative along one direction is compared with differences.
        """
        some = slice(0, min(PROBE, len(self.stream.data)))
        try:
            with self._open(self.stream.data.batch(some), some) as (model, parameters, batch):
                self._compare(model, parameters, batch)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TaskError(f"the loss cannot be differentiated twice ({reason}): {REMEDY}") from (
                error
            )

    def _compare(self, model: nn.Module, parameters: list[Tensor], batch: Any) -> None:
        flat = torch.cat([p.detach().flatten() for p in parameters])
        values, push = self._seeded(model, parameters, batch)
        direction = random_vectors(1, self.size, self.seed, flat)[0]
        direction /= direction.norm()
        claimed = push(direction[None])[0].detach().flatten()
        rounding = torch.finfo(flat.dtype).eps
        if rounding > 1e-4:
            return  # differences of half-precision numbers say nothing
        # Between two points there may be kinks of the model, which smaller steps do not meet.
        for shrink in (1.0, 0.1, 0.01):
            step = shrink * rounding ** (1 / 3) * max(flat.norm().item(), 1.0)
            ends = []
            for sign in (1, -1):
                self._set(parameters, flat + sign * step * direction)
                ends.append(self._seeded(model, parameters, batch)[0].detach().flatten())
            self._set(parameters, flat)
            seen = (ends[0] - ends[1]) / (2 * step)
            noise = 100 * rounding * values.detach().norm() / step
            if (claimed - seen).norm() <= 0.1 * seen.norm() + noise:
                return
        raise TaskError(
            f"the loss cannot be differentiated twice: along a random direction autograd says "
            f"{claimed.norm().item():.3g} and differences say {seen.norm().item():.3g}; some "
            f"function of the model has a backward pass that cannot be differentiated: {REMEDY}"
        )

    def _seeded(
        self, model: nn.Module, parameters: list[Tensor], batch: Any
    ) -> tuple[Tensor, "Linear"]:
        with torch.random.fork_rng(devices=[]):  # a loss may draw noise
            torch.manual_seed(0)
            return self.derivative(model, parameters, batch)

    def _set(self, parameters: list[Tensor], values: Tensor) -> None:
        with torch.no_grad():
            pieces = values.split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))


Linear = Callable[[Tensor], Tensor]
"""Products with vectors `[m, P]`."""


class HessianProducts(Differentiated):
    """The Hessian of the mean loss."""

    def derivative(
        self, model: nn.Module, parameters: list[Tensor], batch: Any
    ) -> tuple[Tensor, Linear]:
        """The summed loss's gradient."""
        losses = self.function(model, batch)
        require_finite(losses.detach(), "loss")
        slope = _flat_gradients(losses.sum(), parameters)
        _require_graph(slope, "the gradient of the loss does not depend on the parameters")
        return slope, lambda vectors: _pull(slope, parameters, vectors)

    def batch_products(self, model: nn.Module, parameters: list[Tensor], batch: Any) -> Linear:
        """The gradient of the gradient along vectors, which is symmetric."""
        return self.derivative(model, parameters, batch)[1]


class GaussNewtonProducts(Differentiated):
    """`(1/n) Σ Jᵀ H J`, with J the Jacobian of the outputs and H the loss's Hessian in them."""

    def derivative(
        self, model: nn.Module, parameters: list[Tensor], batch: Any
    ) -> tuple[Tensor, Linear]:
        """The outputs."""
        outputs = self.stream.task.objective.outputs(model, batch)
        require_finite(outputs.detach(), "model's output")
        weights = torch.zeros_like(outputs).requires_grad_()
        back = _flat_gradients(outputs, parameters, weights)  # Jᵀ weights, linear in them
        _require_graph(back, "the model's outputs do not depend on the parameters")
        return outputs, lambda vectors: _pull(back, [weights], vectors)

    def batch_products(self, model: nn.Module, parameters: list[Tensor], batch: Any) -> Linear:
        """To the outputs, through the loss, and back."""
        outputs, push = self.derivative(model, parameters, batch)
        point = outputs.detach().requires_grad_()
        loss = self.stream.task.objective.loss(point, batch).sum()
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        _require_graph(slope, "the loss is linear in the model's outputs")

        def apply(vectors: Tensor) -> Tensor:
            along = push(vectors).view(-1, *outputs.shape)
            bent = _pull(slope, [point], along).view(-1, *outputs.shape)
            return _pull(outputs, parameters, bent)

        return apply


def _require_graph(slope: Tensor, what: str) -> None:
    if not slope.requires_grad:
        raise TaskError(f"{what}: there is no second derivative to speak of; {REMEDY}")


def _flat_gradients(
    outputs: Tensor, parameters: list[Tensor], weights: Tensor | None = None
) -> Tensor:
    """`Σ weights ∂outputs`, `[P]`, with its graph."""
    found = torch.autograd.grad(outputs, parameters, weights, create_graph=True, allow_unused=True)
    return torch.cat([_dense(g, p).flatten() for g, p in zip(found, parameters, strict=True)])


def _pull(outputs: Tensor, inputs: list[Tensor], vectors: Tensor) -> Tensor:
    """`vᵀ ∂outputs/∂inputs` for each of `[m, *outputs]`, `[m, sum of sizes]`."""
    try:
        found = torch.autograd.grad(
            outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation that vmap does not know
        each = [
            torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True)
            for v in vectors
        ]
        rows = [
            torch.cat([_dense(g, x).flatten() for g, x in zip(one, inputs, strict=True)])
            for one in each
        ]
        return torch.stack(rows)
    flat = [
        x.new_zeros(len(vectors), x.numel()) if g is None else g.flatten(1)
        for g, x in zip(found, inputs, strict=True)
    ]
    return torch.cat(flat, 1)


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


class State:
    """The weights at which an operator was built, where a task has several."""

    def __init__(self, stream: GradientStream) -> None:
        self.task = stream.task
        self.weights: dict[str, Tensor] | None = None
        if self.task.checkpoints:
            state = self.task.model.state_dict()
            self.weights = {name: value.detach().clone() for name, value in state.items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The model with those weights inside the block."""
        now = self.task.model.state_dict()
        weights = self.weights
        if weights is None or all(torch.equal(now[name], w) for name, w in weights.items()):
            yield
            return
        with self.task.at(Checkpoint(weights)):
            yield
