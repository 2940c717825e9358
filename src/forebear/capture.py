"""Hooks that see what goes into a layer and the gradient of what comes out.

One forward and one backward pass give, for every layer call, the input `a` and the output gradient
`g`; from them a layer rule makes the per-example gradient in factored form. Weight gradients, a
third of a plain pass, are never computed: parameters need no gradient during the pass, and the
graph starts at the first captured layer instead.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forebear.blocks import Block, Plan, Use
from forebear.data import batch_length, map_tensors, require_finite
from forebear.differentiation import (
    HALF,
    Function,
    at_least_float32,
    layer_by_layer_attention,
    only_these_need_gradients,
    per_example_gradients,
)
from forebear.errors import TaskError
from forebear.layers import Factors, is_written, vector, written_out
from forebear.sharding import agreement
from forebear.task import Task, per_example

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
        self.g = g


class Capture:
    """Per-example gradients of the blocks of a plan, batch by batch.

    Use as a context manager: inside the block hooks are installed and the model is in evaluation
    mode; everything is restored at the end.

    Args:
        task: the model and what is differentiated.
        plan: blocks.
        writes: whether heavy blocks are written out, layer by layer. Inner products stay what they
            are; second moments of factors, which K-FAC takes, do not.

    Attributes:
        failed: blocks that could not be captured, while their plan is still being checked; with a
            checked plan the same is an error.
        half: blocks whose layers computed in float16 or bfloat16.
        positions: over which each block's gradient was summed, in the last batch, where it was not
            of one-hot rows.
        held: bytes that its factors took, or would have taken.
    """

    def __init__(self, task: Task, plan: Plan, *, writes: bool = False) -> None:
        self.task = task
        self.plan = plan
        self._heavy = plan.heavy if writes else frozenset()
        self.positions: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.failed: set[str] = set()
        self.half: set[str] = set()
        self._uses: dict[str, list[Use]] = {}
        for use in plan.uses:
            self._uses.setdefault(use.module, []).append(use)
        self._calls: list[_Call] = []
        self._size = 0
        self._active = False
        self._anchor = torch.zeros((), requires_grad=True, device=task.device)

    def __enter__(self) -> "Capture":
        with ExitStack() as stack:
            stack.enter_context(self.task.evaluation())
            stack.enter_context(layer_by_layer_attention())
            for name in self._uses:
                module = self.task.model.get_submodule(name)
                before = module.register_forward_pre_hook(self._expand, with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(self._record(name), with_kwargs=True)
                stack.callback(after.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def gradients(self, function: Function, batch: Any) -> tuple[Tensor, Gradients]:
        """Values `[b]` of `function` on the batch and the gradient of each, factored.

        A block that the values do not depend on has one term with no positions, `t = 0`.

        Raises:
            TaskError: the values are not `[b]`, or an input was overwritten before its use.
            NonFiniteError: a value or gradient is NaN or infinite; `rows` has the positions.
        """

        def again() -> None:
            with Capture(self.task, self.plan) as capture:
                # What the function remembers of its last batch must stay.
                capture._gradients(getattr(function, "forgetful", function), batch)

        kind = getattr(function, "__qualname__", type(function).__qualname__)
        return self.task.in_step(kind, lambda: self._gradients(function, batch), again)

    def _gradients(self, function: Function, batch: Any) -> tuple[Tensor, Gradients]:
        batch = map_tensors(lambda t: t.detach().to(self.task.device), batch)
        if self.plan.fallback and hasattr(function, "prepare"):
            # The fallback calls the function again, and it must draw the same.
            batch = function.prepare(self.task.model, batch)  # type: ignore[attr-defined]
        self._size = batch_length(batch)
        self._calls, self._active = [], True
        with agreement(self.task.model):
            try:
                with torch.enable_grad(), only_these_need_gradients(self.task.model, ()):
                    values = per_example(function(self.task.model, batch), self._size, "the loss")
            finally:
                self._active = False
            calls, self._calls = self._calls, []
            require_finite(values.detach(), "loss")
        if values.requires_grad and calls:
            self._backward(values.sum(), calls)
        values = values.detach()  # the graph would keep what calls hold
        gradients: Gradients = {name: [] for name in self.plan.blocks}
        self.positions, self.held = {}, {}
        for call in _used_up(calls):
            self._collect(call, gradients)
        if self.plan.fallback:
            # Again, one example at a time: what the function remembers of the batch must stay.
            again = getattr(function, "forgetful", function)
            one_by_one = per_example_gradients(self.task.model, self.plan.fallback, again, batch)
            for name, g in one_by_one.items():
                gradients[name] = [vector(g.flatten(1))]
        for name, terms in gradients.items():
            block = self.plan.blocks[name]
            gradients[name] = _merge(terms, block) or [self._zero(block)]
            for left, right in gradients[name]:
                require_finite(right, f"gradient of {name!r}")
                if left.is_floating_point():
                    require_finite(left, f"gradient of {name!r}")
        return values, gradients

    def _expand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An input shared by all examples (position ids `[1, t]`) would add up their gradients.
        if not self._active or self._size == 1:
            return None

        def widen(x: Any) -> Any:
            shared = isinstance(x, Tensor) and x.ndim > 1 and len(x) == 1
            return x.expand(self._size, *x.shape[1:]) if shared else x

        return tuple(widen(x) for x in args), {key: widen(x) for key, x in kwargs.items()}

    def _record(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            if not self._active or not torch.is_grad_enabled():
                return None
            a = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if a is None or not isinstance(output, Tensor):
                self._fail(name, "its input and output must be tensors")
                return None
            if not self._fits(name, a, output):
                first = f"first dimension {len(a) if a.ndim else 0} in"
                first += f" and {len(output) if output.ndim else 0} out for {self._size} examples"
                self._fail(name, f"{first}: examples must be the first dimension")
                return None
            call = _Call(name, a.detach(), a._version)
            if output.dtype in HALF:
                self.half.update(use.block for use in self._uses[name])
            if not output.requires_grad:
                output = _Anchor.apply(output, self._anchor)  # type: ignore[assignment]
            # A tensor hook set now sees the gradient at this value even when a later operation
            # overwrites the tensor in place.
            output.register_hook(call.receive)
            self._calls.append(call)
            return output

        return hook

    def _fits(self, name: str, a: Tensor, output: Tensor) -> bool:
        """Whether the first dimension is the examples, or examples times positions."""
        if not a.ndim or not output.ndim or len(a) != len(output) or not len(a):
            return False
        if len(a) == self._size:
            return True
        # `[b * t, ...]` is read as t positions of each example. That it is not t examples of each
        # position, the check of the plan has seen, unless it never met this layer.
        unseen = all(use.block in self.plan.unchecked for use in self._uses[name])
        return len(a) % self._size == 0 and not unseen

    def _fail(self, module: str, reason: str) -> None:
        if self.plan.verified:
            raise TaskError(f"layer {module!r} cannot be captured: {reason}; exclude it by layers=")
        self.failed.update(use.block for use in self._uses[module])

    def _backward(self, total: Tensor, calls: list[_Call]) -> None:
        for call in calls:  # a loss that differentiates inside has been here before
            call.g = None
        try:
            torch.autograd.backward(total, inputs=[self._anchor])
        except RuntimeError:
            # torch tells which operation found its input overwritten; say at which layer it was.
            for call in calls:
                self._require_kept(call)
            raise

    def _require_kept(self, call: _Call) -> None:
        uses = self._uses[call.module]
        if call.a._version != call.version and any(use.role != "bias" for use in uses):
            raise TaskError(
                f"the input of layer {call.module!r} was overwritten in place after the call: its "
                "gradient cannot be formed; use the out-of-place form of that operation"
            )

    def _collect(self, call: _Call, gradients: Gradients) -> None:
        if call.g is None:  # the loss does not depend on this call: its gradient is zero
            return
        self._require_kept(call)
        try:
            for use, factors in self._parts(call):
                self._add(factors, gradients[use.block], use.block)
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            # A subclass may share its parent's name and not its shapes.
            if self.plan.verified:
                raise
            self._fail(call.module, str(error))

    def _add(self, factors: Factors, terms: list[Factors], name: str) -> None:
        """One more term of a block's gradient; those of heavy blocks are added up, written out."""
        left, right = factors
        block = self.plan.blocks[name]
        if left.is_floating_point():
            self.positions[name] = self.positions.get(name, 0) + left.shape[1]
        self.held[name] = self.held.get(name, 0) + left.nbytes + right.nbytes
        heavy = name in self._heavy
        if not self.plan.verified:  # it is not known yet, and any form can be checked
            heavy = left.shape[1] * (block.rows + block.cols) > block.size
        if not heavy or block.rule is None or not left.is_floating_point():
            terms.append(factors)
            return
        rows = block.rows
        there = next((term.right for term in terms if is_written(term, rows)), None)
        if there is None:
            terms.append(written_out(left.mT @ right))
        else:
            there.baddbmm_(left.mT, right)

    def _parts(self, call: _Call) -> list[tuple[Use, Factors]]:
        layer: Any = self.task.model.get_submodule(call.module)
        assert call.g is not None
        a, g = at_least_float32(call.a), at_least_float32(call.g)
        factors: Factors | None = None
        named: dict[str, Tensor] = {}
        parts: list[tuple[Use, Factors]] = []
        for use in self._uses[call.module]:
            rule: Any = use.rule
            if use.role == "vector":
                named = named or rule.gradients(layer, a, g)
                flat = torch.cat([named[key].flatten(1) for key in use.local], 1)
                parts.append((use, vector(flat.view(self._size, -1, flat.shape[1]).sum(1))))
                continue
            if factors is None:
                factors = self._fold(rule.factors(layer, a, g, bias=use.role == "joint"))
            parts.append((use, vector(factors.left.sum(1)) if use.role == "bias" else factors))
        return parts

    def _fold(self, factors: Factors) -> Factors:
        """`[b * k, t, ...]` as `[b, k * t, ...]`."""
        if len(factors.left) == self._size:
            return factors
        return Factors(*(x.reshape(self._size, -1, *x.shape[2:]) for x in factors))

    def _zero(self, block: Block) -> Factors:
        parameter = self.task.model.get_parameter(block.parameters[0])
        # Not from the parameter itself, which may be spread over processes.
        like = at_least_float32(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
        rows = like.new_empty(self._size, 0, block.rows)
        return Factors(rows, like.new_empty(self._size, 0, block.cols))


def _used_up(calls: list[_Call]) -> Iterator[_Call]:
    """Calls in order; none is kept once it was seen, for together they are large."""
    calls.reverse()
    while calls:
        yield calls.pop()


def _merge(terms: list[Factors], block: Block) -> list[Factors]:
    """Terms of the same kind joined along t: several calls of a layer are one longer one."""
    if len(terms) < 2:
        return terms
    if block.rule is None:  # already written out
        return [vector(torch.stack([term.left[:, 0] for term in terms]).sum(0))]
    merged: list[Factors] = []
    for kind in (True, False):
        same = [term for term in terms if term.left.is_floating_point() == kind]
        if same:
            left = torch.cat([term.left for term in same], 1)
            merged.append(Factors(left, torch.cat([term.right for term in same], 1)))
    return merged
