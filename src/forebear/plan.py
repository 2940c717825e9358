"""Deciding which parameters a method sees, and checking it against autograd on a real batch."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from forebear.blocks import Block, Plan, Use, candidate_blocks
from forebear.capture import Capture
from forebear.data import Data, batch_length, map_tensors
from forebear.errors import CoverageWarning, TaskError
from forebear.gradients import materialise
from forebear.task import Task

PROBE = 4  # examples in the check: enough to mix them up, cheap enough to forget
FALLBACK_LIMIT = 2**22  # parameters without a rule are written out for every example of a batch
TOLERANCE = 2e-3  # of the gradient's norm; a wrong rule is off by much more


def make_plan(task: Task, data: Data) -> Plan:
    """The plan for a task: every block is compared with autograd on the first examples.

    A block whose summed per-example gradients differ from autograd's (a layer used functionally,
    a subclass that computes something else) goes to the general fallback, one too large for that
    is named in a `CoverageWarning`: nothing is skipped in silence.

    Raises:
        TaskError: the loss is not `[b]`, or an example's loss depends on its batch.
    """
    batch = data.batch(slice(0, min(PROBE, len(data))))
    batch = map_tensors(lambda t: t.to(task.device), batch)
    blocks, uses, without_rule = candidate_blocks(task)
    plan = Plan(blocks, tuple(uses))
    with task.evaluation():
        _require_independent(task, batch)
        truth = _autograd(task, batch)
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, batch)
    wrong = {name for name, block in blocks.items() if not _agrees(block, gradients[name], truth)}
    leftover = [p for name in wrong for p in blocks[name].parameters] + without_rule
    return _complete(task, blocks, uses, wrong, leftover)


def _complete(
    task: Task, blocks: dict[str, Block], uses: list[Use], wrong: set[str], leftover: list[str]
) -> Plan:
    parameters = task.selected_parameters()
    leftover = [name for name in parameters if name in leftover]
    unseen = [name for name in leftover if parameters[name].numel() > FALLBACK_LIMIT]
    fallback = [name for name in leftover if name not in unseen]
    kept = {name: block for name, block in blocks.items() if name not in wrong}
    for name in fallback:
        shape = parameters[name].shape
        kept[name] = Block(name, shape.numel(), 1, (name,), (shape,))
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    coverage = sum(block.size for block in kept.values()) / trainable
    if unseen:
        warnings.warn(
            f"coverage is {coverage:.1%}: no rule sees {', '.join(unseen)} and each is too large to "
            "be differentiated example by example; exclude them with layers=, or add a layer rule",
            CoverageWarning,
            stacklevel=4,
        )
    if not kept:
        raise TaskError("no trainable parameter is left to attribute to: see the coverage warning")
    return Plan(
        blocks=kept,
        uses=tuple(use for use in uses if use.block in kept),
        fallback=tuple(fallback),
        unseen=tuple(unseen),
        coverage=coverage,
        verified=True,
    )


def _autograd(task: Task, batch: Any) -> dict[str, torch.Tensor]:
    names = list(task.selected_parameters())
    with torch.enable_grad(), _only_these_need_gradients(task.model, names) as parameters:
        total = task.losses(task.model, batch).sum()
        if not total.requires_grad:
            raise TaskError(
                "the loss does not depend on any selected parameter: is it computed under "
                "torch.no_grad() or from detached outputs?"
            )
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, grads, strict=True)
    }


def _agrees(block: Block, terms: list[Any], truth: dict[str, torch.Tensor]) -> bool:
    expected = block.matrix(truth).double()
    if not terms:
        return not expected.any()
    got = materialise(terms, block).double().sum(0)
    half = next(iter(truth.values())).dtype in (torch.float16, torch.bfloat16)
    tolerance = 0.05 if half else TOLERANCE
    return bool((got - expected).norm() <= tolerance * expected.norm() + 1e-7)


def _require_independent(task: Task, batch: Any) -> None:
    """Per-example attribution has no meaning when examples influence each other's loss."""
    if batch_length(batch) < 2:
        task.losses(task.model, batch)
        return
    with torch.no_grad():
        together, again = (task.losses(task.model, batch) for _ in range(2))
        if not torch.equal(together, again):
            return  # the loss draws its own noise, so this check cannot tell
        alone = task.losses(task.model, map_tensors(lambda t: t[:1] if t.ndim else t, batch))[0]
    if not torch.allclose(alone, together[0], rtol=0.02, atol=1e-3):
        raise TaskError(
            f"the loss of an example depends on its batch: {alone.item():.6g} alone, "
            f"{together[0].item():.6g} among {len(together)}; return each example's own loss"
        )


@contextmanager
def _only_these_need_gradients(model: nn.Module, names: list[str]) -> Iterator[list[nn.Parameter]]:
    before = {p: p.requires_grad for p in model.parameters()}
    named = dict(model.named_parameters())
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield [named[name].requires_grad_(True) for name in names]
    finally:
        for parameter, needs in before.items():
            parameter.requires_grad_(needs)
