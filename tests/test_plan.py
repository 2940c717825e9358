import sys
from typing import Any

import pytest
import torch
from cases import CASES, BareParameter, Net, vectors
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import CoverageWarning, NonFiniteError, TaskError
from forebear.plan import make_plan
from forebear.task import Task
from forebear.tasks import losses


def case(name: str) -> tuple[Task, Data]:
    found = next(case for case in CASES if case.name == name)
    return Task(found.model(), found.loss), Data(found.data())


def test_blocks_stand_in_the_order_of_the_parameters() -> None:
    plan = make_plan(*case("bare parameter"))
    assert list(plan.blocks) == ["scale", "head"]
    assert plan.verified


def test_coverage_is_the_share_of_trainable_parameters_in_blocks() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = Data(vectors()())
    whole, last = 6 * 8 + 8 + 8 * 3 + 3, 8 * 3 + 3
    plan = make_plan(Task(model, losses.cross_entropy, layers="2"), data)
    assert plan.coverage == last / whole
    model[0].weight.requires_grad_(False)
    plan = make_plan(Task(model, losses.cross_entropy, layers="2"), data)
    assert plan.coverage == last / (whole - 6 * 8)


def test_a_parameter_too_large_for_the_fallback_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = case("bare parameter")
    monkeypatch.setattr(sys.modules["forebear.plan"], "FALLBACK_LIMIT", 5)
    with pytest.warns(CoverageWarning, match=r"coverage is 77\.8%: no rule sees scale "):
        plan = make_plan(task, data)
    assert plan.coverage == 21 / 27
    assert plan.unseen == ("scale",)
    assert list(plan.blocks) == ["head"]


def test_nothing_left_to_attribute_to_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["forebear.plan"], "FALLBACK_LIMIT", 1)
    model = BareParameter().double()
    model.head.requires_grad_(False)
    task = Task(model, losses.cross_entropy)
    with pytest.warns(CoverageWarning), pytest.raises(TaskError, match="no trainable parameter"):
        make_plan(task, Data(vectors()()))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_examples_than_the_check_looks_at(size: int) -> None:
    found = next(case for case in CASES if case.name == "positions [t], t = probe")
    data = Data(tuple(column[:size] for column in found.data()))
    plan = make_plan(Task(found.model(), found.loss), data)
    assert set(plan.fallback) == set(found.fallback)


def test_a_confident_model_is_still_checked() -> None:
    # Gradients of 1e-12 and less are no reason to believe a wrong rule.
    found = next(case for case in CASES if case.name == "subclass with another forward")

    def faint(model: nn.Module, batch: Any) -> Tensor:
        return 1e-12 * losses.cross_entropy(model, batch)

    plan = make_plan(Task(found.model(), faint), Data(found.data()))
    assert set(plan.fallback) == set(found.fallback)


def test_a_gradient_that_is_zero_but_for_rounding_needs_no_fallback() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(x + self.shift(x).sum(-1, keepdim=True)).log_softmax(-1)

    model = Net(forward, shift=nn.Linear(6, 4), head=nn.Linear(6, 3))
    with torch.no_grad():  # rows of the head sum to nearly nothing: so does the shift's gradient
        model.head.weight -= model.head.weight.mean(1, keepdim=True)
    x, y = vectors()()
    plan = make_plan(Task(model, losses.cross_entropy), Data((x.float(), y)))
    assert plan.fallback == ()


def test_the_check_sees_the_same_noise_twice() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return losses.cross_entropy(model, (x + torch.randn_like(x), y))

    task, data = case("mlp")
    plan = make_plan(Task(task.model, noisy), data)
    assert plan.fallback == ()


def scalar(model: nn.Module, batch: Any) -> Tensor:
    return losses.cross_entropy(model, batch).mean()


def column(model: nn.Module, batch: Any) -> Tensor:
    return losses.cross_entropy(model, batch)[:, None]


def mixed(model: nn.Module, batch: Any) -> Tensor:
    values = losses.cross_entropy(model, batch)
    return values - values.mean()


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    features = model(batch[0])
    return -(features @ features.T).log_softmax(1).diagonal()


def detached(model: nn.Module, batch: Any) -> Tensor:
    return losses.cross_entropy(model, batch).detach()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (scalar, r"returned \(\) for a batch of 4"),
        (column, r"returned \(4, 1\) for a batch of 4"),
        (mixed, "depends on its batch"),
        (contrastive, "depends on its batch"),
        (detached, "does not depend on any selected parameter"),
    ],
)
def test_losses_that_cannot_be_attributed(loss: Any, message: str) -> None:
    task, data = case("mlp")
    with pytest.raises(TaskError, match=message):
        make_plan(Task(task.model, loss), data)


def test_batch_norm_without_statistics_mixes_examples() -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3)).double().eval()
    with pytest.raises(TaskError, match="fails on the first alone"):
        make_plan(Task(model, losses.cross_entropy), Data(vectors()()))


def test_nan_among_the_first_examples_names_their_ids() -> None:
    task, _ = case("mlp")
    x, y = vectors()()
    x[2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"ids c\)"):
        make_plan(task, Data((x, y), ids=list("abcde")))
