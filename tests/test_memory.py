"""What a batch holds: written out where that is smaller, and as many examples as fit."""

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear import record, stream
from forebear.blocks import Held
from forebear.capture import Capture
from forebear.curvature import Dense, Kronecker
from forebear.data import Data
from forebear.gradients import joined, materialise
from forebear.layers import is_written
from forebear.methods.influence import Influence
from forebear.methods.unit_points import UnitStream
from forebear.plan import graph_bytes, make_plan
from forebear.record import plain_pass_seconds
from forebear.stream import BATCH, Stream, fitting
from forebear.tasks.diffusion import Denoising, images

EMPIRICAL = Influence(curvature=Kronecker(targets="empirical"))
"""Drawn targets do depend on the batch."""


class Convolutions(nn.Module):
    """A denoiser whose first layer is called twice, with a vector block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.told = nn.Linear(1, 3)
        self.last = nn.Conv2d(3, 1, 1)

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        told = self.told(levels[:, None].to(noisy) / 1000)[:, :, None, None]
        x = torch.tanh(self.first(noisy) + told)
        x = torch.tanh(self.again(x)) + self.again(self.norm(x))
        return self.last(x)


def case(size: int = 6, count: int = 9) -> tuple[fb.Task, Data]:
    torch.manual_seed(0)
    model = Convolutions().double().eval()
    loss = Denoising(levels=(200, 500, 800), noise="shared")
    pixels = torch.randn(count, 1, size, size, dtype=torch.float64)
    return fb.Task(model, loss), Data.of(images(pixels))


def test_heavy_blocks_are_those_with_more_numbers_in_factors_than_in_the_gradient() -> None:
    task, data = case()
    plan = make_plan(task, data)
    # 36 positions, two calls for `again`, at each of three levels; `told` has one a level.
    assert plan.heavy == {"first", "again", "told", "last"}
    entries = {"first": 108 * (3 + 10), "again": 216 * (3 + 28), "last": 108 * (1 + 4), "told": 15}
    vectors = 3 * (6 + 1) if plan.held.factors else 0  # at each level; the other factor is a one
    assert abs(plan.held.factors - 8 * (sum(entries.values()) + vectors)) <= 8 * 3
    assert plan.held.written - 8 * (30 + 84 + 4 + 6) <= 8 * vectors


@pytest.mark.parametrize("kind", [Stream, UnitStream])
def test_written_gradients_are_those_of_factors(kind: type[Stream]) -> None:
    task, data = case()
    plan = make_plan(task, data)
    found = {}
    for writes in (False, True):
        each = kind(task, plan, data, 4, None, writes)
        found[writes] = joined([g for _, _, g in each.gradients(task.objective, "")])
    for name, block in plan.blocks.items():
        assert any(is_written(t, block.rows) for t in found[True][name]) == (name in plan.heavy)
        mine, theirs = (materialise(found[w][name], block) for w in (True, False))
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


class AtSomeLevels(Convolutions):
    """One layer is used at the noisiest level only."""

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        x = torch.tanh(self.first(noisy))
        return self.last(torch.tanh(self.again(x)) if levels[0] > 700 else x)


@pytest.mark.parametrize("levels", [(200, 800), (800, 200)])
def test_a_heavy_layer_may_be_missed_at_some_levels(levels: tuple[int, int]) -> None:
    _, data = case()
    torch.manual_seed(0)
    task = fb.Task(AtSomeLevels().double().eval(), Denoising(levels=levels))
    found = []
    for writes in (False, True):
        each = UnitStream(task, make_plan(task, data), data, 4, None, writes)
        found.append(joined([g for _, _, g in each.gradients(task.objective, "")]))
    assert "again" in each.plan.heavy
    for name, block in each.plan.blocks.items():
        one, other = (materialise(gradients[name], block) for gradients in found)
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_layers_are_forgotten_one_by_one() -> None:
    """What a call held is not kept by the values that are returned."""
    task, data = case()
    with Capture(task, make_plan(task, data), writes=True) as capture:
        values, _ = capture.gradients(task.objective, data.batch(slice(None)))
    assert values.grad_fn is None
    assert not capture._calls


@pytest.mark.parametrize("method", [fb.DAS(), fb.DTRAK(), fb.get("gradcos"), EMPIRICAL])
def test_scores_do_not_depend_on_what_fits(
    method: Influence, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data = case()
    fitted = method.fit(task, data)
    assert isinstance(fitted.training[0].data, Data)
    expected, own = fitted.score(data).values, fitted.self_influence()
    for room in (1, 40_000):
        monkeypatch.setattr(stream, "WORKING_BYTES", room)
        monkeypatch.setattr("forebear.methods.fitted_influence.WORKING_BYTES", room)
        again = method.fit(task, data)
        assert torch.allclose(again.score(data).values, expected, rtol=1e-7)
        assert torch.allclose(again.self_influence(), own, rtol=1e-7)


def test_only_methods_that_take_inner_products_write_out() -> None:
    task, data = case()
    for curvature, writes in ((Dense(kind="fisher"), True), (Kronecker(), False)):
        opened = Influence(curvature=curvature).fit(task, data).stream(0, data)
        assert isinstance(opened, Stream)
        assert opened.writes is writes


def test_as_many_examples_as_fit() -> None:
    assert fitting(0, BATCH) == BATCH  # nothing is known
    assert fitting(1, BATCH) == BATCH
    assert fitting(stream.WORKING_BYTES // 10, BATCH) == 10
    assert fitting(10 * stream.WORKING_BYTES, BATCH) == 1
    assert fitting(10 * stream.WORKING_BYTES, 100) == 100  # was asked for


def test_the_choice_follows_from_shapes() -> None:
    held = []
    for count in (5, 9):
        task, data = case(count=count)
        held.append(make_plan(task, data).held)
    assert held[0] == held[1] != Held()
    task, data = case(size=12)
    larger = make_plan(task, data).held
    assert larger.pass_ > 3 * held[0].pass_  # four times the positions
    assert larger.written == held[0].written


def test_bytes_of_a_plain_pass_are_those_that_autograd_keeps() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    task = fb.Task(model, lambda m, batch: m(batch[0])[:, 0].exp())
    # What goes into both layers, where the first is also what came out of the tanh; and the exp.
    assert graph_bytes(task, (torch.randn(5, 4).double(),)) == 8 * 5 * (4 + 8 + 1)


def test_a_plain_pass_is_measured_in_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = case()
    one = graph_bytes(task, data.batch(slice(0, 4))) // 4
    monkeypatch.setattr(stream, "WORKING_BYTES", 2 * 3 * one)
    sizes = []
    loss = Denoising.__call__

    def seen(self: Denoising, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        sizes.append(len(batch["image"]))
        return loss(self, model, batch)

    monkeypatch.setattr(Denoising, "__call__", seen)
    assert plain_pass_seconds(task, data) > 0
    assert sizes == [4, *(4 * [3, 3, 3])]
    sizes.clear()
    monkeypatch.setattr(record, "LONG", 0.0)
    plain_pass_seconds(task, data)
    assert sizes == [4, 3, 3, 3]
