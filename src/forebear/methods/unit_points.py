"""Gradients whose parts, one for each level of noise and draw, have unit length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.capture import Capture, Gradients
from forebear.data import Batch
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import squared_norms
from forebear.layers import Factors, is_written, vector, written_out
from forebear.stream import Stream


@dataclass(frozen=True)
class UnitStream(Stream):
    """A stream of means of unit gradients: no level of noise outweighs the others.

    The gradient of a function that is the mean of `parts` becomes `Σ_p g_p / ‖g_p‖ / parts`, in a
    pass for each part; together they run the model as often as the function itself does. Parts that
    have no gradient stay zero.
    """

    @property
    def held(self) -> int:
        """Bytes that an example takes: one part's pass, and the gradients of all."""
        held = self.plan.held
        # A measurement of the task's own is one part.
        parts = 1 if self.task.measure is not None else len(self.task.objective.parts)
        return 2 * held.pass_ // parts + 2 * (held.written if self.writes else held.factors)

    def taken(self, capture: Capture, function: Function, batch: Batch) -> tuple[Tensor, Gradients]:
        """Means over the parts of a function."""
        parts = getattr(function, "parts", None)
        if parts is None:
            raise TaskError(
                f"{getattr(function, '__name__', function)!r} has no parts to scale: use "
                "points='mean'"
            )
        blocks = self.plan.blocks
        values: list[Tensor] = []
        found: list[Gradients] = []
        sums: dict[str, Tensor] = {}  # of blocks that come written out
        for part in parts:
            value, gradients = capture.gradients(part, batch)
            squares = [squared_norms(gradients[name], block) for name, block in blocks.items()]
            lengths = torch.stack(squares).sum(0).sqrt()
            scale = torch.where(lengths > 0, 1 / lengths, 0.0) / len(parts)
            for name in [name for name in gradients if self._comes_written(gradients[name], name)]:
                matrices, by = gradients.pop(name)[0].right, scale[:, None, None]
                if name in sums:
                    sums[name].addcmul_(matrices, by)
                else:
                    sums[name] = matrices.mul_(by)
            found.append({name: times(terms, scale) for name, terms in gradients.items()})
            values.append(value)
        whole = added(found) | {name: [written_out(each)] for name, each in sums.items()}
        return torch.stack(values).mean(0), {name: whole[name] for name in blocks}

    def _comes_written(self, terms: list[Factors], name: str) -> bool:
        return len(terms) == 1 and is_written(terms[0], self.plan.blocks[name].rows)


def times(terms: list[Factors], scale: Tensor) -> list[Factors]:
    """Gradients times a number each `[b]`."""
    by = scale[:, None, None]
    return [
        Factors(left * by, right) if left.is_floating_point() else Factors(left, right * by)
        for left, right in terms
    ]


def added(several: list[Gradients]) -> Gradients:
    """Sums of gradients of the same examples: their factors one after the other."""
    whole: Gradients = {}
    for name in dict.fromkeys(name for gradients in several for name in gradients):
        terms = [term for gradients in several for term in gradients.get(name, ())]
        kinds = {
            kind: [term for term in terms if term.left.is_floating_point() == kind]
            for kind in (True, False)
        }
        whole[name] = [_joined(same) for same in kinds.values() if same]
    return whole


def _joined(terms: list[Factors]) -> Factors:
    if all(left.shape[1] == right.shape[2] == 1 for left, right in terms):  # written-out vectors
        return vector(torch.stack([(left * right)[:, 0] for left, right in terms]).sum(0))
    rights = [right.expand(*left.shape[:2], right.shape[2]) for left, right in terms]
    return Factors(torch.cat([left for left, _ in terms], 1), torch.cat(rights, 1))
