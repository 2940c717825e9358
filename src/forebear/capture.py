"""Hooks that see what goes into a layer and the gradient of what comes out.

One forward and one backward pass give, for every layer call, the input `a` and the output gradient
`g`; from them a layer rule makes the per-example gradient in factored form. Weight gradients, a
third of a plain pass, are never computed: parameters need no gradient while the hooks are in place,
and the graph starts at the first captured layer instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forebear.blocks import Plan, Role
from forebear.data import batch_length, map_tensors
from forebear.errors import NonFiniteError, TaskError
from forebear.layers import Factors
from forebear.task import Task, per_example

Function = Callable[[nn.Module, Any], Tensor]
"""`(model, batch) -> [b]`: what is differentiated."""

Gradients = dict[str, list[Factors]]
"""Per-example gradients of a batch: for each block, terms whose sum is its gradient."""


class _Anchor(torch.autograd.Function):
    """Identity that starts a graph at a tensor which does not require gradients.

    Marking the tensor dirty keeps it the same object, so nothing is copied and later in-place
    operations stay legal.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass
class _Call:
    module: str
    a: Tensor
    version: int
    g: Tensor | None = None

    def receive(self, g: Tensor) -> None:
        self.g = g if self.g is None else self.g + g


class Capture:
    """Per-example gradients of the blocks of a plan, batch by batch.

    Use as a context manager: hooks are installed, the model is in evaluation mode and its
    parameters need no gradient inside the block; everything is restored at the end.
    """

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task = task
        self.plan = plan
        self._modules = {name: task.model.get_submodule(name) for name in _module_names(plan)}
        self._calls: list[_Call] = []
        self._size = 0
        self._active = False
        self._anchor = torch.zeros((), requires_grad=True, device=task.device)

    def __enter__(self) -> "Capture":
        self._frozen = [p for p in self.task.model.parameters() if p.requires_grad]
        self._evaluation = self.task.evaluation()
        self._evaluation.__enter__()
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._handles = []
        for name, module in self._modules.items():
            before = module.register_forward_pre_hook(self._expand, with_kwargs=True)
            after = module.register_forward_hook(self._record(name), with_kwargs=True)
            self._handles += [before, after]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._evaluation.__exit__(*error)

    def gradients(self, function: Function, batch: Any) -> tuple[Tensor, Gradients]:
        """Values `[b]` of `function` on the batch and the gradient of each, factored.

        Raises:
            TaskError: the values are not `[b]`, or an input was overwritten before its use.
            NonFiniteError: a value or gradient is NaN or infinite; `rows` has the positions.
        """
        batch = map_tensors(lambda t: t.to(self.task.device), batch)
        self._size = batch_length(batch)
        self._calls, self._active = [], True
        try:
            with torch.enable_grad():
                values = per_example(function(self.task.model, batch), self._size, "the loss")
        finally:
            self._active = False
        _require_finite(values.detach(), "loss")
        if values.requires_grad and self._modules:
            torch.autograd.backward(values.sum(), inputs=[self._anchor])
        gradients: Gradients = {name: [] for name in self.plan.blocks}
        calls, self._calls = self._calls, []
        for call in calls:
            self._collect(call, gradients)
        if self.plan.fallback:
            one_by_one = per_example_gradients(self.task.model, self.plan.fallback, function, batch)
            for name, g in one_by_one.items():
                gradients[name] = [_vector(g.flatten(1))]
        for name, terms in gradients.items():
            gradients[name] = _merge(terms)
            for term in gradients[name]:
                _require_finite_terms(term, name)
        return values.detach(), gradients

    def _expand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An input shared by all examples (position ids `[1, t]`) would add up their gradients.
        if not self._active or self._size == 1:
            return None

        def widen(x: Any) -> Any:
            shared = isinstance(x, Tensor) and x.ndim > 1 and len(x) == 1
            return x.expand(self._size, *x.shape[1:]) if shared else x

        return tuple(widen(x) for x in args), {key: widen(x) for key, x in kwargs.items()}

    def _record(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            a = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if len(a) != self._size or len(output) != self._size:
                if self.plan.verified:
                    raise TaskError(
                        f"layer {name!r} was called with first dimension {len(a)} for a batch of "
                        f"{self._size} examples: examples must be its first dimension"
                    )
                return None
            call = _Call(name, a.detach(), a._version)
            if not output.requires_grad:
                output = _Anchor.apply(output, self._anchor)  # type: ignore[assignment]
            # A tensor hook set now sees the gradient at this value even when a later operation
            # overwrites the tensor in place.
            output.register_hook(call.receive)
            self._calls.append(call)
            return output

        return hook

    def _collect(self, call: _Call, gradients: Gradients) -> None:
        if call.g is None:  # the loss does not depend on this call: its gradient is zero
            return
        if call.a._version != call.version:
            raise TaskError(
                f"the input of layer {call.module!r} was overwritten in place after the call: its "
                "gradient cannot be formed; use the out-of-place form of that operation"
            )
        layer = self._modules[call.module]
        a, g = _at_least_float32(call.a), _at_least_float32(call.g)
        factors: Factors | None = None
        for use in self.plan.uses:
            if use.module != call.module:
                continue
            rule: Any = use.rule
            if use.role == "vector":
                named = rule.gradients(layer, a, g)
                parts = [named[local].reshape(self._size, -1) for local in use.local]
                gradients[use.block].append(_vector(torch.cat(parts, 1)))
                continue
            factors = factors or rule.factors(layer, a, g)
            gradients[use.block].append(_play(factors, use.role))


def per_example_gradients(
    model: nn.Module, names: tuple[str, ...], function: Function, batch: Any
) -> dict[str, Tensor]:
    """Gradients `[b, *shape]` of `function` for parameters that no rule knows.

    Uses `vmap`, and one example at a time where the model does something `vmap` cannot.
    """
    wrapped = _Wrapped(model, function)
    parameters = dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name].detach() for name in names}

    def value(chosen: dict[str, Tensor], example: Any) -> Tensor:
        one = map_tensors(lambda t: t[None], example)
        return torch.func.functional_call(wrapped, chosen, (one,))[0]

    try:
        grads = torch.func.vmap(torch.func.grad(value), (None, 0))(chosen, batch)
    except RuntimeError:
        loop = [
            torch.func.grad(value)(chosen, map_tensors(lambda t, i=i: t[i], batch))
            for i in range(batch_length(batch))
        ]
        grads = {name: torch.stack([g[name] for g in loop]) for name in chosen}
    return {name.removeprefix("model."): _at_least_float32(g) for name, g in grads.items()}


class _Wrapped(nn.Module):
    """Makes `function(model, batch)` a module call, so that its parameters can be swapped."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


def _module_names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(use.module for use in plan.uses))


def _play(factors: Factors, role: Role) -> Factors:
    left, right = factors
    if role == "joint":
        ones = right.new_ones(*right.shape[:2], 1)
        return Factors(left, torch.cat([right, ones], 2))
    if role == "bias":
        return _vector(left.sum(1))
    return factors


def _vector(gradient: Tensor) -> Factors:
    """A gradient `[b, p]` as a block with one column."""
    return Factors(gradient[:, None], gradient.new_ones(len(gradient), 1, 1))


def _merge(terms: list[Factors]) -> list[Factors]:
    """Terms of the same kind joined along t: several calls of a layer are one longer one."""
    if len(terms) < 2:
        return terms
    merged: list[Factors] = []
    for kind in (True, False):
        same = [term for term in terms if term.left.is_floating_point() == kind]
        if same:
            left = torch.cat([term.left for term in same], 1)
            merged.append(Factors(left, torch.cat([term.right for term in same], 1)))
    return merged


def _at_least_float32(x: Tensor) -> Tensor:
    half = x.is_floating_point() and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


def _require_finite(values: Tensor, what: str) -> None:
    bad = torch.nonzero(~torch.isfinite(values.reshape(len(values), -1)).all(1))[:, 0]
    if len(bad):
        error = NonFiniteError(f"the {what} is NaN or infinite for {len(bad)} examples")
        error.rows = bad  # type: ignore[attr-defined]
        raise error


def _require_finite_terms(term: Factors, block: str) -> None:
    for side in term:
        # One sum is finite unless an entry is not; only then is every row looked at.
        if side.is_floating_point() and not torch.isfinite(side.sum()):
            _require_finite(side, f"gradient of {block!r}")
