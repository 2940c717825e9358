from typing import Any

import pytest
import torch
from cases import CASES, BareParameter, Case, vectors
from oracles import gradients_by_vmap, gradients_one_at_a_time, rows
from torch import Tensor, nn

from forebear.capture import Capture
from forebear.data import Data
from forebear.errors import EvaluationModeWarning, NonFiniteError, TaskError
from forebear.gradients import materialise
from forebear.plan import make_plan
from forebear.task import Task


def captured(task: Task, batch: Any, data: Any = None) -> dict[str, Tensor]:
    """Per-example gradients `[b, *shape]` of each parameter through plan, capture and blocks."""
    plan = make_plan(task, Data(batch if data is None else data))
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, batch)
    found: dict[str, Tensor] = {}
    for name, block in plan.blocks.items():
        dense = materialise(gradients[name], block)
        examples = [block.split(matrix) for matrix in dense]
        found |= {p: torch.stack([e[p] for e in examples]) for p in block.parameters}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-8) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=rtol * max(scale, 1e-8), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_has_the_gradient_of_one_example_alone(case: Case) -> None:
    model, batch = case.model(), case.data()
    expected = gradients_one_at_a_time(model, case.loss, batch)
    assert_same(captured(Task(model, case.loss), batch), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fallback_takes_what_no_rule_sees_and_nothing_else(case: Case) -> None:
    plan = make_plan(Task(case.model(), case.loss), Data(case.data()))
    assert set(plan.fallback) == set(case.fallback)
    assert plan.coverage == 1.0


@pytest.mark.parametrize("name", ["mlp", "called twice", "embedding tied to head", "convnet"])
def test_values_are_the_losses_and_batching_does_not_change_a_gradient(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, batch = case.model(), case.data()
    task = Task(model, case.loss)
    with Capture(task, make_plan(task, Data(batch))) as capture:
        values, _ = capture.gradients(task.losses, batch)
    torch.testing.assert_close(values, case.loss(model, batch).detach())
    whole = captured(task, batch)
    for size in (1, 2):
        part = rows(batch, slice(3, 3 + size))
        expected = {name: g[3 : 3 + size] for name, g in whole.items()}
        assert_same(captured(task, part, data=batch), expected)


def test_both_oracles_agree() -> None:
    case = next(case for case in CASES if case.name == "convnet")
    one = gradients_one_at_a_time(case.model(), case.loss, case.data())
    assert_same(gradients_by_vmap(case.model(), case.loss, case.data()), one)


def test_another_function_of_the_same_plan() -> None:
    case = CASES[0]
    model, batch = case.model(), case.data()
    task = Task(model, case.loss)

    def margin(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0] - model(batch[0])[:, 1]  # two passes through every layer

    plan = make_plan(task, Data(batch))
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(margin, batch)
    expected = gradients_one_at_a_time(model, margin, batch)
    for name, block in plan.blocks.items():
        dense = materialise(gradients[name], block)
        for i, found in enumerate(dense):
            wanted = block.matrix({n: g[i] for n, g in expected.items()})
            torch.testing.assert_close(found, wanted)


def test_a_layer_that_is_not_reached_has_a_gradient_of_no_positions() -> None:
    case = next(case for case in CASES if case.name == "layer never called")
    task = Task(case.model(), case.loss)
    plan = make_plan(task, Data(case.data()))
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, case.data())
    assert set(plan.unchecked) == {"idle", "norm", "conv", "words.weight"}
    for name in plan.unchecked:
        (term,) = gradients[name]
        assert term.left.shape == (5, 0, plan.blocks[name].rows)
        assert not materialise([term], plan.blocks[name]).any()


@pytest.mark.parametrize("name", ["mlp", "convnet", "called twice", "embedding tied to head"])
def test_bfloat16_models_have_float32_gradients_near_those_of_autograd(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    batch = tuple(t.bfloat16() if t.is_floating_point() else t for t in case.data())
    model = case.model().bfloat16()
    found = captured(Task(model, case.loss), batch)
    expected = gradients_one_at_a_time(model, case.loss, batch)
    for parameter, value in expected.items():
        assert found[parameter].dtype == torch.float32
        assert (found[parameter] - value).norm() < 0.05 * value.norm()


def test_the_model_is_as_it_was_after_success_and_after_failure() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.double().train()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    batch = vectors()()
    task = Task(model, next(c for c in CASES if c.name == "mlp").loss)
    before = _state(model)
    with pytest.warns(EvaluationModeWarning, match="BatchNorm1d, Dropout"):
        plan = make_plan(task, Data(batch))
    assert _state(model) == before
    model.train(False)
    before = _state(model)

    def broken(model: nn.Module, batch: Any) -> Tensor:
        model(batch[0])
        raise KeyError("label")

    with pytest.raises(KeyError), Capture(task, plan) as capture:
        capture.gradients(broken, batch)
    assert _state(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_gradients_of_batch_norm_in_training_mode_are_those_of_evaluation_mode() -> None:
    case = next(case for case in CASES if case.name == "convnet")
    model, batch = case.model(), case.data()
    expected = gradients_one_at_a_time(model, case.loss, batch)
    model.train()
    with pytest.warns(EvaluationModeWarning, match="BatchNorm2d"):
        found = captured(Task(model, case.loss), batch)
    assert_same(found, expected)
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_between_two_batches_the_model_can_be_differentiated_as_usual() -> None:
    case = CASES[0]
    model, batch = case.model(), case.data()
    task = Task(model, case.loss)
    with Capture(task, make_plan(task, Data(batch))) as capture:
        capture.gradients(task.losses, batch)
        case.loss(model, batch).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_two_captures_of_one_model_do_not_disturb_each_other() -> None:
    case = CASES[0]
    task, batch = Task(case.model(), case.loss), case.data()
    plan = make_plan(task, Data(batch))
    with Capture(task, plan) as one:
        _, alone = one.gradients(task.losses, batch)
        with Capture(task, plan) as two:
            _, inner = two.gradients(task.losses, batch)
            _, outer = one.gradients(task.losses, batch)
    for name in plan.blocks:
        assert torch.equal(alone[name][0].left, inner[name][0].left)
        assert torch.equal(alone[name][0].left, outer[name][0].left)


@pytest.mark.parametrize("shape", ["mean", "column"])
def test_a_function_that_is_not_one_value_an_example_is_refused(shape: str) -> None:
    case = CASES[0]
    task, batch = Task(case.model(), case.loss), case.data()
    plan = make_plan(task, Data(batch))

    def wrong(model: nn.Module, batch: Any) -> Tensor:
        values = task.losses(model, batch)
        return values.mean() if shape == "mean" else values[:, None]

    with Capture(task, plan) as capture, pytest.raises(TaskError, match=r"shape \(5,\)"):
        capture.gradients(wrong, batch)


def test_nan_in_loss_or_gradient_names_the_rows() -> None:
    case = CASES[0]
    task, (x, y) = Task(case.model(), case.loss), case.data()
    plan = make_plan(task, Data((x, y)))
    broken = x.clone()
    broken[[1, 3], 0] = torch.nan

    def hidden(model: nn.Module, batch: Any) -> Tensor:
        # sqrt has an infinite slope at zero: the value is finite, its gradient is not
        logits = model(batch[0])
        return ((logits - logits.detach()).sum(1) + batch[1]).sqrt()

    with Capture(task, plan) as capture:
        with pytest.raises(NonFiniteError, match="loss is NaN or infinite for 2") as caught:
            capture.gradients(task.losses, (broken, y))
        assert caught.value.rows.tolist() == [1, 3]
        with pytest.raises(NonFiniteError, match="gradient of") as caught:
            capture.gradients(hidden, (x, torch.tensor([1, 1, 0, 1, 1])))
        assert caught.value.rows.tolist() == [2]


def test_an_input_overwritten_after_the_call_is_an_error() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        h = model[0](batch[0]) + 1
        out = model[1](h)
        h.zero_()
        return out.sum(1)

    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)]).double()
    batch = vectors()()
    with pytest.raises(TaskError, match="input of layer '1' was overwritten in place"):
        make_plan(Task(model, forward), Data(batch))
    model[1].weight.requires_grad_(False)  # the gradient of a bias does not need the input
    expected = gradients_one_at_a_time(model, forward, batch)
    assert_same(captured(Task(model, forward), batch), expected)


def test_a_layer_that_changes_how_it_is_called_is_an_error_and_not_a_wrong_number() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        x, hot = batch
        if hot.all():  # only then the second layer is called, with an input of its own
            return model[0](x).sum(1) + model[1](x[0, :1].expand(2 * len(x), 6)).sum()
        return model[0](x).sum(1)

    model = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    x = torch.randn(6, 6).double()
    task, hot = Task(model, forward), torch.tensor([0, 0, 0, 0, 1, 1])
    plan = make_plan(task, Data((x, hot)))
    with Capture(task, plan) as capture, pytest.raises(TaskError, match="layer '1'"):
        capture.gradients(task.losses, (x[4:], hot[4:]))


def test_inputs_that_require_gradients_change_nothing() -> None:
    case = CASES[0]
    model, (x, y) = case.model(), case.data()
    expected = gradients_one_at_a_time(model, case.loss, (x, y))
    assert_same(captured(Task(model, case.loss), (x.requires_grad_(), y)), expected)


def test_a_loss_that_differentiates_inside_goes_to_the_fallback() -> None:
    def penalty(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    case = CASES[0]
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), case.data()
    assert_same(
        captured(Task(model, penalty), batch), gradients_one_at_a_time(model, penalty, batch)
    )


def test_batches_may_hold_numbers_and_names_beside_tensors() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return batch["scale"] * model(batch["x"]).square().sum(1) * len(batch["name"])

    model = BareParameter().double()
    batch = {"x": vectors()()[0], "scale": torch.tensor(2.0), "name": "ab"}
    task = Task(model, loss)
    plan = make_plan(task, Data([{"x": x} for x in batch["x"]], collate=lambda rows: {
        **batch, "x": torch.stack([row["x"] for row in rows])}))  # fmt: skip
    assert plan.fallback == ("scale",)
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(loss, batch)
    expected = [
        torch.autograd.grad(4 * model(x[None]).square().sum(), model.scale)[0] for x in batch["x"]
    ]
    torch.testing.assert_close(gradients["scale"][0].left[:, 0], torch.stack(expected))


def _state(model: nn.Module) -> list[Any]:
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [modes, hooks, [p.requires_grad for p in model.parameters()]]
