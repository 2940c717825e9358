"""Tasks: what is selected, what is restored, and what is refused."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import forebear as fb
from forebear.errors import (
    DataError,
    EvaluationModeWarning,
    FormatError,
    MissingDependencyError,
    TaskError,
    UnknownNameError,
)
from forebear.task import Task, state_hash

LOSS = fb.losses.cross_entropy
X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1])


class Layered(nn.Module):
    """Two blocks of layers and a head, named as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block["norm"](block["mlp"](x))  # type: ignore[index]
        return self.head(self.drop(x))


def model() -> Layered:
    torch.manual_seed(0)
    return Layered().eval()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, {"h.0.mlp", "h.0.norm", "h.1.mlp", "h.1.norm", "head"}),
        ("head", {"head"}),
        (["head"], {"head"}),
        ("h.*.mlp", {"h.0.mlp", "h.1.mlp"}),
        ("h.1", {"h.1.mlp", "h.1.norm"}),
        (["h.0.norm", "h.?.mlp"], {"h.0.norm", "h.0.mlp", "h.1.mlp"}),
        ("h*", {"h.0.mlp", "h.0.norm", "h.1.mlp", "h.1.norm", "head"}),
    ],
)
def test_layers_are_names_or_patterns(layers: Any, expected: set[str]) -> None:
    task = Task(model(), LOSS, layers=layers)
    selected = task.selected_parameters()
    assert set(selected) == {f"{name}.{of}" for name in expected for of in ("weight", "bias")}


def test_frozen_parameters_are_not_selected() -> None:
    frozen = model()
    frozen.head.weight.requires_grad_(False)
    assert set(Task(frozen, LOSS, layers="head").selected_parameters()) == {"head.bias"}


@pytest.mark.parametrize(
    ("layers", "nearest"), [("haed", "head"), (["head", "h.0.mpl"], r"h\.0\.mlp")]
)
def test_an_unknown_layer_comes_with_the_nearest_name(layers: Any, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown layer .* did you mean '{nearest}'"):
        Task(model(), LOSS, layers=layers)


def test_no_layers_at_all_is_refused() -> None:
    with pytest.raises(TaskError, match="layers"):
        Task(model(), LOSS, layers=[])


def test_selected_layers_that_are_frozen_are_refused() -> None:
    frozen = model()
    frozen.head.requires_grad_(False)
    with pytest.raises(TaskError, match=r"layers=\('head',\) select no trainable parameter"):
        Task(frozen, LOSS, layers="head")


class Shared(nn.Module):
    """One layer under two names, and a matrix tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("second", {"first.weight", "first.bias"}), ("head", {"first.weight", "head.bias"})],
)
def test_shared_parameters_are_found_under_each_of_their_names(
    layers: str, expected: set[str]
) -> None:
    task = Task(Shared(), LOSS, layers=layers)
    assert set(task.selected_parameters()) == expected
    scores = fb.GradDot().fit(task, (X, Y)).score((X, Y)).values
    grads = [
        torch.autograd.grad(loss, list(task.selected_parameters().values()), retain_graph=True)
        for loss in LOSS(task.model, (X, Y))
    ]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    assert torch.allclose(scores, flat @ flat.T, rtol=1e-4, atol=1e-6)


def test_select_restricts_and_keeps_everything_else() -> None:
    def measure(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]

    whole = Task(model(), LOSS, measure=measure, checkpoints=[model().state_dict()], collate=list)
    part = whole.select("head")
    assert set(part.selected_parameters()) == {"head.weight", "head.bias"}
    for name in ("model", "loss", "measure", "collate"):
        assert getattr(part, name) is getattr(whole, name)
    assert part.checkpoints[0] is whole.checkpoints[0]


def test_what_is_no_model_or_cannot_learn_is_refused() -> None:
    with pytest.raises(TaskError, match=r"model is a OrderedDict: it must be a torch.nn.Module"):
        Task(model().state_dict(), LOSS)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="ReLU has no trainable parameter"):
        Task(nn.ReLU(), LOSS)


def other() -> Layered:
    changed = model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1.0)
    return changed


@pytest.mark.parametrize("kind", ["state", ".safetensors", ".pt"])
def test_checkpoints_are_states_or_files(kind: str, tmp_path: Path) -> None:
    state: Any = other().state_dict()
    if kind == ".safetensors":
        save_file(state, tmp_path / "a.safetensors")
        state = tmp_path / "a.safetensors"
    elif kind == ".pt":
        torch.save(state, tmp_path / "a.pt")
        state = str(tmp_path / "a.pt")
    mine = model()
    task = Task(mine, LOSS, checkpoints=[state, fb.Checkpoint(state, 0.25)])
    assert [c.learning_rate for c in task.checkpoints] == [1.0, 0.25]
    before = task.model_hash()
    with task.at(task.checkpoints[1]):
        assert task.model_hash() == state_hash(other().state_dict())
    assert task.model_hash() == before


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("this-file-shows-that-code-ran"),))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": Harmful()}, "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt"):
        fb.Checkpoint("a.pt").load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match=r"list\.pt holds a list: save model\.state_dict\(\)"):
        fb.Checkpoint(tmp_path / "list.pt").load()
    with pytest.raises(FormatError, match=r"checkpoint .*nowhere\.pt does not exist"):
        fb.Checkpoint(tmp_path / "nowhere.pt").load()
    for name in ("bad.safetensors", "bad.pt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(FormatError, match=name):
            fb.Checkpoint(tmp_path / name).load()


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing() -> None:
    task = Task(model(), LOSS)
    before = task.model_hash()
    partial = {k: v + 1 for k, v in model().state_dict().items() if k.startswith("h.")}
    wider = nn.Linear(9, 2).state_dict()
    resized = {**other().state_dict(), "head.weight": torch.zeros(3, 4)}
    for state in (partial, wider, resized):
        with (
            pytest.raises(TaskError, match="a checkpoint does not fit the model"),
            task.at(fb.Checkpoint(state)),
        ):
            raise AssertionError("entered")
        assert task.model_hash() == before


def test_weights_and_modes_are_restored_after_an_exception() -> None:
    mine = model()
    mine.drop.train()
    task = Task(mine, LOSS)
    before = task.model_hash()

    def fail_inside() -> None:
        with task.at(fb.Checkpoint(other().state_dict())), task.evaluation():
            assert task.model_hash() != before
            assert not any(module.training for module in mine.modules())
            raise ZeroDivisionError

    with pytest.warns(EvaluationModeWarning, match="Dropout"), pytest.raises(ZeroDivisionError):
        fail_inside()
    assert task.model_hash() == before
    assert [name for name, module in mine.named_modules() if module.training] == ["drop"]


@pytest.mark.parametrize(
    ("layer", "warns"),
    [(nn.Dropout(0.1), True), (nn.Dropout(0.0), False), (nn.BatchNorm1d(4), True),
     (nn.LayerNorm(4), False)],
)  # fmt: skip
def test_only_modes_that_matter_are_warned_about(layer: nn.Module, warns: bool) -> None:
    task = Task(nn.Sequential(nn.Linear(4, 4), layer).train(), LOSS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with task.evaluation():
            pass
    assert [w.category for w in caught] == [EvaluationModeWarning] * warns
    assert layer.training


def test_losses_and_measurements_are_one_value_an_example() -> None:
    task = Task(model(), LOSS)
    expected = nn.functional.cross_entropy(task.model(X), Y, reduction="none")
    assert torch.equal(task.losses(task.model, (X, Y)), expected)
    assert torch.equal(task.measurements(task.model, (X, Y)), -expected)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [(torch.zeros(()), r"\(\)"), (torch.zeros(5, 1), r"\(5, 1\)"), (1.0, "float")],
)
def test_anything_else_than_one_value_an_example_is_refused(returned: Any, shown: str) -> None:
    def bad(model: nn.Module, batch: Any) -> Any:
        return returned

    with pytest.raises(TaskError, match=f"the loss returned {shown} for a batch of 5"):
        Task(model(), bad).losses(model(), (X, Y))
    with pytest.raises(TaskError, match=f"measure returned {shown}"):
        Task(model(), LOSS, measure=bad).measurements(model(), (X, Y))


def test_a_plain_loss_has_no_outputs_to_sample() -> None:
    def plain(model: nn.Module, batch: Any) -> Tensor:
        return LOSS(model, batch)

    assert Task(model(), LOSS).objective is LOSS
    with pytest.raises(TaskError, match=r"'plain' is a plain loss.*forebear.Objective"):
        _ = Task(model(), plain).objective
    with pytest.raises(TaskError, match="'plain' is a plain loss"):
        fb.EKFAC().fit(Task(model(), plain), (X, Y))


def test_a_copy_of_the_model_is_independent() -> None:
    task = Task(model(), LOSS)
    copied = task.copy_model()
    assert state_hash(copied.state_dict()) == task.model_hash()
    nn.init.zeros_(copied.get_parameter("head.weight"))
    assert state_hash(copied.state_dict()) != task.model_hash()
    assert task.device == torch.device("cpu")


def test_the_hash_is_that_of_names_types_shapes_and_content() -> None:
    a = {"w": torch.arange(4.0), "b": torch.tensor(1)}
    assert state_hash(a) == state_hash({"b": torch.tensor(1), "w": torch.arange(4.0)})
    for b in (
        {"v": torch.arange(4.0), "b": torch.tensor(1)},
        {"w": torch.arange(4.0).double(), "b": torch.tensor(1)},
        {"w": torch.arange(4.0).view(2, 2), "b": torch.tensor(1)},
        {"w": torch.arange(4.0), "b": torch.tensor(2)},
        {"w": torch.tensor([0.0, 1.0, 2.0, math.nextafter(3.0, 4.0) + 1e-6]), "b": torch.tensor(1)},
    ):
        assert state_hash(a) != state_hash(b)
    assert len(state_hash({"half": torch.ones(3, dtype=torch.bfloat16)})) == 16


def test_all_refusals_are_one_tree() -> None:
    for error in (DataError, TaskError, FormatError, UnknownNameError, MissingDependencyError):
        assert issubclass(error, fb.ForebearError)
    assert issubclass(EvaluationModeWarning, UserWarning)
