"""Deciding which parameters a method sees, and checking it against autograd on a real batch."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from forebear.blocks import Block, Held, Plan, Use, candidate_blocks
from forebear.capture import Capture
from forebear.data import Data, map_tensors, naming
from forebear.differentiation import dense_gradients, only_these_need_gradients
from forebear.errors import CoverageWarning, TaskError
from forebear.gradients import materialise
from forebear.layers import Factors
from forebear.sharding import is_sharded, shards_of_gradients, whole
from forebear.task import Task

PROBE = 4  # examples in the check: enough to mix them up, cheap enough to forget
FALLBACK_LIMIT = 2**22  # parameters without a rule are written out for every example of a batch
TOLERANCE = 2e-3  # of the gradient's norm; a wrong rule is off by much more
HALF_TOLERANCE = 0.05  # for float16 and bfloat16, where autograd itself rounds so much
NOISE = 1e-6  # of the whole gradient's norm: gradients that are zero but for rounding


def make_plan(task: Task, data: Data) -> Plan:
    """The plan for a task: every block is compared with autograd on the first examples.

    A block whose per-example gradients differ from autograd's (a layer used functionally, a
    subclass that computes something else) goes to the general fallback, one too large for that is
    named in a `CoverageWarning`: nothing is skipped in silence.

    Raises:
        TaskError: the loss is not `[b]`, or an example's loss depends on its batch; or a parameter
            without a rule is sharded over processes.
        NonFiniteError: the loss or gradient of one of the first examples is NaN or infinite.
    """
    rows = torch.arange(PROBE) % len(data)
    batch = map_tensors(lambda t: t.detach().to(task.device), data.batch(rows))
    blocks, uses, without_rule = candidate_blocks(task)
    # Only with different weights does a sum over examples show that two of them were mixed up.
    weights = torch.arange(1.0, PROBE + 1, device=task.device)
    with Capture(task, Plan(blocks, tuple(uses))) as capture:
        _require_independent(task, batch)
        # Losses that draw noise (diffusion) must draw the same in both passes.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with naming(data, rows):
                _, gradients = capture.gradients(task.losses, batch)
            torch.manual_seed(0)
            truth = _autograd(task, batch, weights)
            kept = graph_bytes(task, batch)
    noise = NOISE * sum(whole(g.double().square().sum()) for g in truth.values()) ** 0.5
    wrong = capture.failed | {
        name
        for name, block in blocks.items()
        if not _agrees(
            block, gradients[name], truth, weights, float(noise), half=name in capture.half
        )
    }
    leftover = [p for name in wrong for p in blocks[name].parameters] + without_rule
    unchecked = tuple(
        name
        for name, block in blocks.items()
        if name not in wrong and not any(whole(truth[p]).any() for p in block.parameters)
    )
    plan = _complete(task, blocks, uses, wrong, leftover, unchecked)
    return _weighed(plan, capture, kept // PROBE, task.model)


def _weighed(plan: Plan, capture: Capture, graph: int, model: nn.Module) -> Plan:
    """The plan with what an example takes, of whose pass autograd keeps `graph` bytes."""
    heavy, factors, written, outputs = set(), 0, 0, 0
    for name, block in plan.blocks.items():
        entry = model.get_parameter(block.parameters[0]).element_size()
        size, positions = max(entry, 4) * block.size, capture.positions.get(name, 0)
        each = capture.held.get(name, PROBE * size) // PROBE
        if block.rule is not None and positions * (block.rows + block.cols) > block.size:
            heavy.add(name)
        factors += each
        written += size if name in heavy else each
        outputs += max(entry, 4) * positions * block.rows  # their gradients
    held = Held(graph + outputs, factors, written)
    return replace(plan, heavy=frozenset(heavy), held=held)


def graph_bytes(task: Task, batch: Any) -> int:
    """Bytes that autograd keeps for the way back of a plain pass, beside the parameters.

    They depend on shapes only. The model should be in evaluation mode. None are counted of a
    sharded one, whose weights come and go.
    """
    if is_sharded(task.model):
        return 0
    own = {p.untyped_storage().data_ptr() for p in task.model.parameters()}
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with torch.enable_grad(), hooks:
        values = task.losses(task.model, batch)
    del values
    return sum(sizes.values())


def _complete(
    task: Task,
    blocks: dict[str, Block],
    uses: list[Use],
    wrong: set[str],
    leftover: list[str],
    unchecked: tuple[str, ...],
) -> Plan:
    parameters = task.selected_parameters()
    leftover = [name for name in parameters if name in leftover]
    unseen = [name for name in leftover if parameters[name].numel() > FALLBACK_LIMIT]
    fallback = [name for name in leftover if name not in unseen]
    if fallback and is_sharded(task.model):
        raise TaskError(
            f"no layer rule sees {', '.join(fallback)}, and what is differentiated example by "
            "example must not be sharded over processes: exclude it with layers=, or add a layer "
            "rule"
        )
    kept = {name: block for name, block in blocks.items() if name not in wrong}
    for name in fallback:
        shape = parameters[name].shape
        kept[name] = Block(name, shape.numel(), 1, (name,), (shape,))
    place = {name: i for i, name in enumerate(parameters)}
    kept = dict(sorted(kept.items(), key=lambda item: place[item[1].parameters[0]]))
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    coverage = sum(block.size for block in kept.values()) / trainable
    if unseen:
        warnings.warn(
            f"coverage is {coverage:.1%}: no rule sees {', '.join(unseen)} and each is too large "
            "to be differentiated example by example; exclude them with layers=, or add a layer "
            "rule",
            CoverageWarning,
            stacklevel=4,
        )
    if not kept:
        raise TaskError("no trainable parameter is left to attribute to: see the coverage warning")
    return Plan(
        blocks=kept,
        uses=tuple(use for use in uses if use.block in kept and use.block not in wrong),
        fallback=tuple(fallback),
        unseen=tuple(unseen),
        coverage=coverage,
        verified=True,
        unchecked=unchecked,
    )


def _autograd(task: Task, batch: Any, weights: Tensor) -> dict[str, Tensor]:
    names = tuple(task.selected_parameters())
    these = only_these_need_gradients(task.model, names, shards=True)
    with torch.enable_grad(), these as parameters:
        losses = task.losses(task.model, batch)
        if not losses.requires_grad:
            raise TaskError(
                "the loss does not depend on any selected parameter: is it computed under "
                "torch.no_grad() or from detached outputs?"
            )
        total = (weights.to(losses.dtype) * losses).sum()
        differentiate = shards_of_gradients if is_sharded(task.model) else dense_gradients
        grads = differentiate(total, parameters)
    return dict(zip(names, grads, strict=True))


def _agrees(
    block: Block,
    terms: list[Factors],
    truth: dict[str, Tensor],
    weights: Tensor,
    noise: float,
    *,
    half: bool,
) -> bool:
    # Of a sharded model only one block at a time is whole.
    expected = block.matrix({p: whole(truth[p]) for p in block.parameters}).double()
    got = torch.einsum("b,brc->rc", weights.double(), materialise(terms, block).double())
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    return bool((got - expected).norm() <= tolerance * expected.norm() + noise)


def _require_independent(task: Task, batch: Any) -> None:
    """Per-example attribution has no meaning when examples influence each other's loss."""
    # Not under no_grad: a loss may differentiate inside.
    together, again = (task.losses(task.model, batch).detach() for _ in range(2))
    if not torch.equal(together, again):
        return  # the loss draws its own noise, so this check cannot tell
    first = map_tensors(lambda t: t[:1] if t.ndim else t, batch)
    try:
        alone = task.losses(task.model, first).detach()[0]
    except Exception as error:
        raise TaskError(
            f"the loss works on {len(together)} examples and fails on the first alone ({error}): "
            "it must not depend on the batch"
        ) from error
    if not torch.allclose(alone, together[0], rtol=0.02, atol=1e-3):
        raise TaskError(
            f"the loss of an example depends on its batch: {alone.item():.6g} alone, "
            f"{together[0].item():.6g} among {len(together)}; return each example's own loss"
        )
