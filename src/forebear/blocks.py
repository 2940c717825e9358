"""Blocks: the matrices of parameters that methods treat together, and who contributes to them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forebear.layers import MatrixRule, VectorRule, rule_for
from forebear.task import Task


@dataclass(frozen=True)
class Block:
    """A matrix `[rows, cols]` of parameters that methods treat together.

    A layer with a bias is one block whose last column is the bias. Vectors have one column.
    """

    name: str
    rows: int
    cols: int
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    rule: MatrixRule | None = None  # None: the parameters are flattened and concatenated

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.rows * self.cols

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The block `[rows, cols]` of tensors named and shaped like the parameters."""
        values = [tensors[name] for name in self.parameters]
        if self.rule is None:
            return torch.cat([value.reshape(-1) for value in values])[:, None]
        weight = self.rule.to_matrix(values[0])
        return torch.cat([weight, values[1][:, None]], 1) if len(values) > 1 else weight

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of `matrix`."""
        if self.rule is None:
            pieces = matrix.reshape(-1).split([shape.numel() for shape in self.shapes])
            named = zip(self.parameters, pieces, self.shapes, strict=True)
            return {name: piece.reshape(shape) for name, piece, shape in named}
        template = torch.empty(self.shapes[0], device="meta")
        cols = self.cols - (len(self.parameters) - 1)
        weight = self.rule.from_matrix(matrix[:, :cols], template).reshape(self.shapes[0])
        return dict(zip(self.parameters, [weight, matrix[:, -1]], strict=False))


Role = Literal["joint", "weight", "bias", "vector"]


@dataclass(frozen=True)
class Use:
    """One part that a module plays in a block: several modules may share tied parameters."""

    module: str
    block: str
    role: Role
    rule: MatrixRule | VectorRule
    local: tuple[str, ...]  # names of the parameters inside the module


@dataclass(frozen=True)
class Held:
    """Bytes that one example's pass holds in memory; they follow from shapes alone.

    Attributes:
        pass_: what autograd keeps for the way back, and inputs and output gradients of layers.
        factors: the gradients, factored.
        written: the same with heavy blocks written out.
    """

    pass_: int = 0
    factors: int = 0
    written: int = 0


@dataclass(frozen=True)
class Plan:
    """Which parameters are seen, by which rule, checked on a real batch.

    Attributes:
        blocks: by name, in the order of the model's parameters.
        uses: what each hooked module contributes.
        fallback: parameters without a rule, differentiated example by example.
        unseen: trainable parameters that no method sees.
        coverage: share of the trainable parameters in `blocks`.
        verified: the blocks were compared with autograd.
        unchecked: blocks whose gradient was zero on the examples of that comparison.
        heavy: blocks whose gradients take more memory factored than written out.
        held: what an example of a batch takes in memory.
    """

    blocks: dict[str, Block]
    uses: tuple[Use, ...]
    fallback: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    coverage: float = 1.0
    verified: bool = False
    unchecked: tuple[str, ...] = ()
    heavy: frozenset[str] = frozenset()
    held: Held = Held()


def candidate_blocks(task: Task) -> tuple[dict[str, Block], list[Use], list[str]]:
    """Blocks that rules claim to see, who contributes to them, and parameters without a rule."""
    wanted = task.selected_parameters()
    name_of = {id(p): name for name, p in wanted.items()}
    owners: dict[int, list[str]] = {}
    for module_name, module in task.model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module_name)
    blocks: dict[str, Block] = {}
    uses: list[Use] = []
    for module_name, module in task.model.named_modules():
        # Rules know these two; whatever else a module holds is left to the fallback.
        direct = module.named_parameters(recurse=False)
        local = {k: p for k, p in direct if id(p) in name_of and k in ("weight", "bias")}
        rule: Any = rule_for(module) if local else None
        if rule is None:
            continue
        tied = any(len(owners[id(p)]) > 1 for p in local.values())
        for block, role, keys in _blocks_of(module_name, local, rule, name_of, tied):
            known = blocks.setdefault(block.name, block)
            if (known.rows, known.cols) != (block.rows, block.cols):
                continue  # tied under different shapes: the check on a batch finds it incomplete
            uses.append(Use(module_name, block.name, role, rule, keys))
    seen = {name for block in blocks.values() for name in block.parameters}
    return blocks, uses, [name for name in wanted if name not in seen]


def _blocks_of(
    module: str, local: dict[str, nn.Parameter], rule: Any, name_of: dict[int, str], tied: bool
) -> Iterator[tuple[Block, Role, tuple[str, ...]]]:
    names = {key: name_of[id(p)] for key, p in local.items()}
    if hasattr(rule, "gradients"):
        if tied:  # each parameter may be shared with another module
            for key, p in local.items():
                yield Block(names[key], p.numel(), 1, (names[key],), (p.shape,)), "vector", (key,)
            return
        keys = tuple(local)
        shapes = tuple(p.shape for p in local.values())
        rows = sum(shape.numel() for shape in shapes)
        title = module or names[keys[0]]  # the model itself is the module with no name
        yield Block(title, rows, 1, tuple(names.values()), shapes), "vector", keys
        return
    weight, bias = local.get("weight"), local.get("bias")
    if weight is not None:
        # Without its values, which may be spread over processes.
        rows, cols = rule.to_matrix(torch.empty(weight.shape, device="meta")).shape
        if bias is not None and not tied:
            params, shapes = (names["weight"], names["bias"]), (weight.shape, bias.shape)
            joint = Block(module or names["weight"], rows, cols + 1, params, shapes, rule)
            yield joint, "joint", ("weight", "bias")
            return
        title = names["weight"]
        yield Block(title, rows, cols, (title,), (weight.shape,), rule), "weight", ("weight",)
    if bias is not None:
        title = names["bias"]
        yield Block(title, len(bias), 1, (title,), (bias.shape,)), "bias", ("bias",)
