"""Curvature as an operator: every kind, in every form, against matrices built one row at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import operator as operators
from forebear.curvature.operator import (
    FisherProducts,
    GaussNewtonProducts,
    KeptMatrix,
    KeptRows,
    Operator,
    curvature_operator,
    power_iteration,
)
from forebear.data import Data
from forebear.plan import make_plan
from forebear.projections import Gaussian, KeptStream, ProjectedStream, projected_plan
from forebear.stream import Stream

N = 20
KINDS = ("hessian", "gauss_newton", "fisher")


def linear() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(N, 4).double()


def convolution() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3))
    return model, torch.randn(N, 2, 4, 4).double()


def embedding() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 3)
    )
    return model, torch.randint(6, (N, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(self.mix(h, h, h, need_weights=False)[0].mean(1))


def attention() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randn(N, 3, 4).double()


MODELS = {"linear": linear, "conv": convolution, "embedding": embedding, "attention": attention}


def prepared(name: str, batch_size: int = 7) -> tuple[Stream, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    y = torch.randint(3, (N,))
    task = fb.Task(model.double().eval(), fb.losses.cross_entropy)
    data = Data.of((x, y))
    return Stream(task, make_plan(task, data), data, batch_size), x, y


def blocked(grads: Any, stream: Stream) -> Tensor:
    """Gradients of all parameters in the order of the plan's blocks, by the layers' own layout."""
    named = dict(zip([n for n, _ in stream.task.model.named_parameters()], grads, strict=True))
    return torch.cat([b.matrix(named).reshape(-1) for b in stream.plan.blocks.values()])


def dense(kind: str, stream: Stream, x: Tensor, y: Tensor) -> Tensor:
    """The mean curvature one row at a time, with plain autograd."""
    model = stream.task.model
    parameters = list(model.parameters())
    if kind == "hessian":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            slope = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        return torch.stack(
            [
                blocked(torch.autograd.grad(g, parameters, retain_graph=True), stream)
                for g in blocked(slope, stream)
            ]
        )
    total: Any = 0
    for i in range(len(x)):
        logits = model(x[i : i + 1])[0]
        loss = F.cross_entropy(logits[None], y[i : i + 1])
        if kind == "gauss_newton":
            rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in logits]
            jacobian = torch.stack([blocked(row, stream) for row in rows])
            p = logits.detach().softmax(0)
            total = total + jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
            continue
        flat = blocked(torch.autograd.grad(loss, parameters), stream)
        total = total + torch.outer(flat, flat)
    return total / len(x)


def built(kind: Any, form: str, stream: Stream, patch: pytest.MonkeyPatch) -> Operator:
    patch.setattr(operators, "KEPT_BYTES", 0 if form == "passes" else 2**29)
    loss = stream.task.losses
    return curvature_operator(kind, stream, loss, by_example=form == "rows")


@pytest.mark.parametrize("form", ["smallest", "rows", "passes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_products_trace_and_largest_eigenvalue_are_those_of_the_matrix(
    name: str, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, x, y = prepared(name)
    matrix = dense(kind, stream, x, y)
    operator = built(kind, form, stream, monkeypatch)
    if kind != "hessian":
        kept = isinstance(operator, KeptRows | KeptMatrix)
        assert kept == (form != "passes")
    size = len(matrix)
    assert operator.size == size
    vectors = torch.randn(40, size).double()  # more than are carried at a time
    assert torch.allclose(operator(vectors), vectors @ matrix, rtol=1e-9, atol=1e-12)
    assert operator.mean_eigenvalue == pytest.approx(matrix.trace().item() / size, rel=1e-9)
    largest = torch.linalg.eigvalsh(matrix).abs().max().item()
    found = power_iteration(operator)
    assert 0.9 * largest < found <= largest * (1 + 1e-9)
    if not isinstance(operator, KeptMatrix):
        some = torch.tensor([3, 0, 11])
        part = dense(kind, stream, x[some], y[some])
        assert torch.allclose(operator.on(some)(vectors), vectors @ part, rtol=1e-9, atol=1e-12)


def test_the_smaller_of_rows_and_matrix_is_kept() -> None:
    stream, _, _ = prepared("linear")
    loss = stream.task.losses
    assert isinstance(curvature_operator("fisher", stream, loss), KeptRows)  # 20 rows of 43
    assert isinstance(curvature_operator("gauss_newton", stream, loss), KeptRows)
    few, _, _ = prepared("linear")
    few = Stream(few.task.select("2"), make_plan(few.task.select("2"), few.data), few.data)
    matrix = curvature_operator("gauss_newton", few, loss)
    assert isinstance(matrix, KeptMatrix)  # 40 rows of 18
    with pytest.raises(fb.errors.TaskError, match="by_example=True"):
        matrix.on(torch.tensor([0]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_changes_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(3, 43).double()
    results = []
    for size in (3, N):
        stream, _, _ = prepared("linear", size)
        results.append(built(kind, "passes", stream, monkeypatch)(vectors))
    assert torch.allclose(*results, rtol=1e-12, atol=1e-15)


def test_the_trace_of_many_parameters_is_estimated_by_the_seed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    data = Data.of((torch.randn(30, 20).double(), torch.randint(3, (30,))))
    task = fb.Task(model, fb.losses.cross_entropy)
    stream = Stream(task, make_plan(task, data), data)
    exact = curvature_operator("gauss_newton", stream, task.losses).mean_eigenvalue
    kept = operators.KEPT_BYTES
    operators.KEPT_BYTES = 0
    try:
        passes = [
            curvature_operator("gauss_newton", stream, task.losses, seed=s) for s in (0, 0, 1)
        ]
    finally:
        operators.KEPT_BYTES = kept
    first, again, other = (operator.mean_eigenvalue for operator in passes)
    assert first == again != other
    assert first == pytest.approx(exact, rel=0.25)


def test_an_operator_stays_at_the_weights_it_was_built_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, x, y = prepared("linear")
    model = stream.task.model
    task = fb.Task(model, fb.losses.cross_entropy, checkpoints=[dict(model.state_dict())])
    stream = Stream(task, stream.plan, stream.data)
    vectors = torch.randn(2, 43).double()
    for kind in KINDS:
        operator = built(kind, "passes", stream, monkeypatch)
        before = operator(vectors)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert torch.allclose(operator(vectors), before, rtol=1e-12)
        assert not torch.allclose(dense(kind, stream, x, y) @ vectors[0], before[0])
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ["cg", "ekfac_cg", "lissa"])
def test_methods_score_the_same_by_passes_over_the_data(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream, x, y = prepared("linear")
    damping = fb.Absolute(0.05)
    method = fb.get(name, damping=damping, tolerance=1e-9)
    dense = fb.Exact(curvature="gauss_newton", damping=damping).fit(stream.task, (x, y))
    monkeypatch.setattr(operators, "KEPT_BYTES", 0)
    fitted = method.fit(stream.task, (x, y), batch_size=9)
    assert isinstance(fitted.curvatures[0].system.operator, GaussNewtonProducts)
    expected = dense.score((x, y)).values
    assert torch.allclose(fitted.score((x, y)).values, expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(fitted.self_influence(), dense.self_influence(), rtol=1e-6)
    fitted.save(tmp_path)
    again = fb.load(tmp_path, stream.task, (x, y)).score((x, y)).values
    assert torch.allclose(again, expected, rtol=1e-5, atol=1e-7)


def test_projected_gradients_have_a_fisher_matrix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _, _ = prepared("linear")
    loss = stream.task.losses
    projection = Gaussian(8).prepare(stream.plan, 0)
    plan = projected_plan({"projected": 8}, 1.0)
    projected = ProjectedStream(stream, projection, plan)
    rows = torch.cat([g["projected"][0].left[:, 0] for _, _, g in projected.gradients(loss, "")])
    kept = KeptStream(stream.task, stream.data, projected.plan, rows, torch.ones(N))
    vectors, expected = torch.randn(2, 8).double(), rows.T @ rows / N
    for source in (projected, kept):
        for size in (2**29, 0):
            monkeypatch.setattr(operators, "KEPT_BYTES", size)
            operator = curvature_operator("fisher", source, loss)
            assert torch.allclose(operator(vectors), vectors @ expected, rtol=1e-9)
    assert isinstance(operator, FisherProducts)
    part = rows[[5, 2]].T @ rows[[5, 2]] / 2
    assert torch.allclose(operator.on(torch.tensor([5, 2]))(vectors), vectors @ part, rtol=1e-9)
    with pytest.raises(fb.errors.TaskError, match="projected gradients is not known"):
        curvature_operator("gauss_newton", projected, loss)


class Once(torch.autograd.Function):
    """A sigmoid that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.sigmoid()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grads[0] * out * (1 - out)


def once(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(Once.apply(model(batch[0])), batch[1], reduction="none")


class Detached(torch.autograd.Function):
    """A sigmoid whose backward pass says nothing of its own dependence on the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.detach().sigmoid() * (1 - x.detach().sigmoid())
        return x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.slope


def detached(model: nn.Module, batch: Any) -> Tensor:
    return 10 * Detached.apply(3 * model(batch[0])).prod(1)


def plain(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0]


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (once, "hessian", "cannot be differentiated twice.*curvature='fisher'"),
        (detached, "hessian", "cannot be differentiated twice.*curvature='fisher'"),
        (plain, "hessian", "no second derivative to speak of.*curvature='fisher'"),
        (plain, "gauss_newton", "plain loss.*curvature='hessian' or 'fisher'"),
    ],
    ids=["once", "detached", "linear", "no objective"],
)
def test_a_loss_without_the_derivatives_is_refused_with_a_remedy(
    loss: Any, kind: Any, message: str
) -> None:
    model = nn.Linear(4, 3).double()
    data = Data.of((torch.randn(N, 4).double(), torch.randint(3, (N,))))
    task = fb.Task(model, loss)
    stream = Stream(task, make_plan(task, data), data)
    with pytest.raises(fb.errors.TaskError, match=message):
        curvature_operator(kind, stream, task.losses)
    assert curvature_operator("fisher", stream, task.losses).size == 15


def test_an_unknown_kind_is_refused_by_name() -> None:
    stream, _, _ = prepared("linear")
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'fisher'"):
        curvature_operator("fischer", stream, stream.task.losses)  # type: ignore[arg-type]
