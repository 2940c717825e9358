"""Iterative solvers against dense solves of the same matrix, and what they say when they fail."""

import warnings
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Absolute, ConjugateGradients, Kronecker, LiSSA
from forebear.curvature.conjugate_gradients import conjugate_gradients
from forebear.curvature.lissa import neumann
from forebear.curvature.operator import KeptMatrix
from forebear.curvature.solvers import System
from forebear.data import Data
from forebear.plan import make_plan
from forebear.stream import Stream

N, DAMPING = 30, 0.01
KINDS = ("gauss_newton", "fisher")


def stream(batch_size: int = 512, dtype: torch.dtype = torch.float64) -> Stream:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    data = Data.of((torch.randn(N, 4).to(dtype), torch.randint(3, (N,))))
    task = fb.Task(model, fb.losses.cross_entropy)
    return Stream(task, make_plan(task, data), data, batch_size)


def gradient(values: Tensor, model: nn.Module) -> Tensor:
    """In the order of the plan's blocks, whose last column is the bias."""
    grads = torch.autograd.grad(values, list(model.parameters()), create_graph=True)
    pairs = zip(grads[::2], grads[1::2], strict=True)
    return torch.cat([torch.cat([w, b[:, None]], 1).flatten() for w, b in pairs])


def matrix(kind: str, source: Stream) -> Tensor:
    """The mean curvature, by one backward pass for each row."""
    model, (x, y) = source.task.model, source.data.batch(slice(None))
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    if kind == "hessian":
        return torch.stack([gradient(g, model) for g in gradient(losses.mean(), model)]).detach()
    if kind == "fisher":
        rows = torch.stack([gradient(loss, model) for loss in losses]).detach()
        return rows.T @ rows / len(x)
    total = torch.zeros(43, 43).double()
    for logits in model(x):
        jacobian = torch.stack([gradient(z, model) for z in logits]).detach()
        p = logits.detach().softmax(0)
        total += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
    return total / len(x)


def system(values: Tensor, damping: float, kind: Any = "gauss_newton") -> System:
    """A system whose curvature is a given matrix."""
    return System(kind, KeptMatrix(stream().plan, values), damping)


def fitted(configuration: Any, source: Stream | None = None, damping: float = DAMPING) -> Any:
    source = source or stream()
    return configuration.fit(source, source.task.losses, Absolute(damping), 0)


def vectors(count: int = 6, size: int = 43) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def with_spectrum(values: Tensor) -> Tensor:
    turn = torch.linalg.qr(vectors(len(values), len(values)))[0]
    return turn @ torch.diag(values) @ turn.T


@pytest.mark.parametrize("preconditioner", ["none", "ekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_gradients_solve_the_damped_system(kind: Any, preconditioner: Any) -> None:
    solver = ConjugateGradients(
        kind=kind, tolerance=1e-12, iterations=500, preconditioner=preconditioner
    )
    fit = fitted(solver)
    damped = matrix(kind, stream()) + DAMPING * torch.eye(43).double()
    truth = torch.linalg.solve(damped, vectors().T).T
    assert torch.allclose(fit.solve(vectors()), truth, rtol=1e-8, atol=1e-8)
    details = fit.details()
    assert details["damping_used"] == {"all": DAMPING}
    assert details["residual"] < 1e-12
    assert 0 < details["iterations"] <= 500


def test_a_hessian_that_damping_covers_is_solved() -> None:
    hessian = matrix("hessian", stream())
    damping = 0.1 - torch.linalg.eigvalsh(hessian)[0].item()
    solver = ConjugateGradients(kind="hessian", tolerance=1e-11, iterations=500)
    truth = torch.linalg.solve(hessian + damping * torch.eye(43).double(), vectors().T).T
    assert torch.allclose(fitted(solver, damping=damping).solve(vectors()), truth, rtol=1e-8)


def test_as_many_iterations_as_parameters_are_exact() -> None:
    values = torch.linspace(0.5, 3, 12).double()
    square = with_spectrum(values)
    rows = vectors(3, 12)
    found = conjugate_gradients(system(square, 0.0), rows, tolerance=1e-13, iterations=12)
    assert torch.allclose(found.rows, torch.linalg.solve(square, rows.T).T, rtol=1e-9, atol=1e-11)
    # Few distinct eigenvalues take as few iterations.
    two = with_spectrum(torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 5.0]).double())
    quick = conjugate_gradients(system(two, 0.0), vectors(3, 6), tolerance=1e-12)
    assert quick.iterations == 2


def test_so_many_iterations_are_the_best_answer_of_their_krylov_space() -> None:
    """As Lanczos from the same vector, with as many steps."""
    square = with_spectrum(torch.logspace(-1, 1, 15).double())
    (row,) = vectors(1, 15)
    powers = [row]
    for _ in range(5):
        powers.append(square @ powers[-1])
    space = torch.linalg.qr(torch.stack(powers[:5], 1))[0]  # [15, 5]
    small = space.T @ square @ space
    expected = space @ torch.linalg.solve(small, space.T @ row)
    found = conjugate_gradients(system(square, 0.0), row[None], tolerance=0.0, iterations=5)
    assert torch.allclose(found.rows[0], expected, rtol=1e-8, atol=1e-10)


def test_right_hand_sides_do_not_meet() -> None:
    """Those that converge early leave, and zero ones never start."""
    values = with_spectrum(torch.logspace(-2, 1, 20).double())
    easy = torch.linalg.eigh(values)[1][:, :2].T  # one iteration
    rows = torch.cat([easy, vectors(3, 20), torch.zeros(1, 20).double()])
    together = conjugate_gradients(system(values, 0.01), rows, tolerance=1e-10)
    for i, row in enumerate(rows):
        alone = conjugate_gradients(system(values, 0.01), row[None], tolerance=1e-10)
        assert torch.allclose(alone.rows[0], together.rows[i], rtol=1e-7, atol=1e-9)
    assert not together.rows[-1].any()
    assert together.residuals[-1] == 0


def test_converged_right_hand_sides_cost_no_more_products() -> None:
    values = with_spectrum(torch.logspace(-2, 1, 20).double())
    easy = torch.linalg.eigh(values)[1][:, -3:].T
    rows = torch.cat([easy, vectors(1, 20)])
    seen: list[int] = []

    class Counting(KeptMatrix):
        def __call__(self, vectors: Tensor) -> Tensor:
            seen.append(len(vectors))
            return super().__call__(vectors)

    counted = System("gauss_newton", Counting(stream().plan, values), 0.01)
    conjugate_gradients(counted, rows, tolerance=1e-8)
    assert seen[0] == 4
    assert set(seen[1:-1]) == {1}
    assert seen[-1] == 4  # the residual of all, formed anew
    seen.clear()
    neumann(counted, rows, scale=10.01, depth=500, tolerance=1e-2, diverged=pytest.fail)
    assert seen[0] == 4
    assert seen[-2] == 1


def test_an_indefinite_hessian_is_refused_with_its_curvature() -> None:
    values = with_spectrum(torch.tensor([-0.5, 0.2, 1.0, 2.0]).double())
    with pytest.raises(fb.errors.TaskError, match=r"hessian has a direction of curvature -0\.\d+"):
        conjugate_gradients(system(values, 0.1, "hessian"), vectors(4, 4), tolerance=1e-12)
    solved = conjugate_gradients(system(values, 0.6, "hessian"), vectors(4, 4), tolerance=1e-12)
    assert solved.residuals.max() < 1e-10


def test_what_did_not_converge_is_warned_about_and_recorded() -> None:
    fit = fitted(ConjugateGradients(iterations=3), damping=1e-4)
    with pytest.warns(fb.errors.NumericalWarning, match=r"6 of 6 solves.*in 3 iterations") as said:
        solved = fit.solve(vectors())
    damped = matrix("gauss_newton", stream()) + 1e-4 * torch.eye(43).double()
    errors = (solved @ damped - vectors()).norm(dim=1) / vectors().norm(dim=1)
    assert fit.details()["residual"] == pytest.approx(errors.max().item(), rel=1e-9)
    assert f"{errors.max().item():.3g}" in str(said[0].message)


def test_in_single_precision_the_residual_is_the_true_one() -> None:
    fit = fitted(ConjugateGradients(iterations=500), stream(dtype=torch.float32), damping=1e-3)
    solved = fit.solve(vectors().float())
    damped = matrix("gauss_newton", stream()) + 1e-3 * torch.eye(43).double()
    errors = (solved.double() @ damped - vectors()).norm(dim=1) / vectors().norm(dim=1)
    assert errors.max() < 1e-4
    assert fit.details()["residual"] < 1e-4


@pytest.mark.parametrize("updates", [0, 1, 7, 50])
def test_the_series_after_so_many_updates_is_known_exactly(updates: int) -> None:
    square = with_spectrum(torch.linspace(0.1, 2, 10).double())
    rows, scale = vectors(3, 10), 3.0
    found = neumann(system(square, 0.0), rows, scale=scale, depth=updates, diverged=pytest.fail)
    left = torch.linalg.matrix_power(torch.eye(10).double() - square / scale, updates + 1)
    exact = rows @ (torch.eye(10).double() - left) @ torch.linalg.inv(square)
    assert torch.allclose(found.rows, exact, rtol=1e-11, atol=1e-13)
    assert found.iterations == updates


def test_lissa_conjugate_gradients_and_dense_agree() -> None:
    source = stream()
    task, train = source.task, source.data.dataset
    queries = (torch.randn(8, 4).double(), torch.randint(3, (8,)))
    damping = Absolute(0.02)
    dense = fb.Exact(curvature="gauss_newton", damping=damping).fit(task, train).score(queries)
    cg = fb.CG(damping=damping).fit(task, train).score(queries)
    whole = fb.LiSSA(damping=damping).fit(task, train).score(queries)
    drawn = fb.LiSSA(damping=damping, batch=15, scale=20.0, repeats=20)
    with pytest.warns(fb.errors.NumericalWarning, match="LiSSA stopped after 1000 updates"):
        sampled = drawn.fit(task, train).score(queries)
    for other in (cg, whole, sampled):
        pairs = zip(dense.values, other.values, strict=True)
        cosines = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs])
        assert cosines.min() > 0.99
        for a, b in zip(dense.values, other.values, strict=True):
            ranks: Any = spearmanr(a, b)
            assert ranks.statistic > 0.98
    assert torch.allclose(cg.values, dense.values, rtol=1e-3, atol=1e-6)
    settings = whole.provenance.settings
    assert settings["residual"] < 1e-2
    assert settings["scale"] > settings["damping_used"]["all"]


def test_drawn_batches_are_drawn_by_the_seed() -> None:
    solver = LiSSA(depth=20, batch=10, scale=10.0)
    source = stream()
    results = []
    for seed in (0, 0, 1):
        fit = solver.fit(source, source.task.losses, Absolute(0.05), seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(fit.solve(vectors()))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_the_first_preconditioned_step_is_ekfac_and_the_last_is_the_dense_solve() -> None:
    source = stream()
    start = fitted(Kronecker(rank=None), source)
    unit = LiSSA(preconditioner="ekfac", scale=1.0, depth=1).fit(
        source, source.task.losses, Absolute(DAMPING), 0
    )
    none = neumann(unit.system, vectors(), scale=1.0, depth=0, diverged=pytest.fail)
    assert torch.allclose(none.rows, start.solve(vectors()), rtol=1e-10)
    end = fitted(LiSSA(preconditioner="ekfac", depth=5000, tolerance=1e-11), source)
    damped = matrix("gauss_newton", source) + DAMPING * torch.eye(43).double()
    truth = torch.linalg.solve(damped, vectors().T).T
    assert torch.allclose(end.solve(vectors()), truth, rtol=1e-8, atol=1e-9)
    assert end.details()["scale"] >= 1


def test_ekfac_solves_for_written_out_rows() -> None:
    """Against the dense Kronecker products of its own parts."""
    source = stream()
    fit = fitted(Kronecker(rank=None), source)
    pieces = []
    for name, block in fit.blocks.items():
        basis = block.basis
        turn = torch.kron(basis.left_vectors, basis.right_vectors)
        inverse = turn @ torch.diag(1 / (block.eigenvalues.flatten() + DAMPING)) @ turn.T
        start = sum(p.shape[1] for p in pieces)
        pieces.append(vectors()[:, start : start + source.plan.blocks[name].size] @ inverse)
    assert torch.allclose(fit.solve(vectors()), torch.cat(pieces, 1), rtol=1e-9)


def test_ekfac_brings_the_first_digits_sooner() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 10)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(300, 64).double() * torch.linspace(0.1, 2, 64)
    y = (x @ torch.randn(64, 10).double()).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    task = fb.Task(model, fb.losses.cross_entropy)
    data = Data.of((x, y))
    source = Stream(task, make_plan(task, data), data)
    plain = fitted(ConjugateGradients(tolerance=0.1), source, 1e-3)
    operator = plain.system.operator
    gradients = operator(vectors(10, operator.size))  # in the span of the data, as gradients are
    helped = fitted(ConjugateGradients(tolerance=0.1, preconditioner="ekfac"), source, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.solve(gradients)
        helped.solve(gradients)
    assert helped.details()["iterations"] < plain.details()["iterations"]


def test_a_scale_too_small_is_refused_with_the_one_to_use() -> None:
    largest = torch.linalg.eigvalsh(matrix("gauss_newton", stream()))[-1].item()
    for batch in (None, 25):
        fit = fitted(LiSSA(scale=0.2 * largest, batch=batch))
        with pytest.raises(fb.errors.TaskError, match="use a scale above") as caught:
            fit.solve(vectors())
        named = float(str(caught.value).split("use a scale above ")[1].split(",")[0])
        assert named == pytest.approx(largest + DAMPING, rel=0.05)


def test_negative_curvature_makes_the_series_diverge_and_is_named() -> None:
    hessian = matrix("hessian", stream())
    assert torch.linalg.eigvalsh(hessian)[0] < -2e-3
    fit = fitted(LiSSA(kind="hessian"), damping=1e-3)
    with pytest.raises(fb.errors.TaskError, match=r"an eigenvalue is < 0.*gauss_newton"):
        fit.solve(vectors())


def test_damping_relative_to_a_negative_mean_is_refused() -> None:
    model = nn.Linear(3, 1, bias=False).double()

    def bowl(model: nn.Module, batch: Any) -> Tensor:
        return -model(batch[0])[:, 0].square()

    data = (torch.randn(9, 3).double(),)
    with pytest.raises(fb.errors.TaskError, match=r"mean eigenvalue of the hessian is -.*Absolute"):
        fb.CG(curvature="hessian").fit(fb.Task(model, bowl), data)


@pytest.mark.parametrize("method", [fb.CG, fb.LiSSA, fb.EKFACCG])
def test_relative_damping_is_of_the_mean_eigenvalue(method: Any) -> None:
    source = stream()
    fit = method(damping=0.3).fit(source.task, source.data.dataset)
    mean = matrix("gauss_newton", source).trace().item() / 43
    assert fit.details()["damping_used"] == {"all": pytest.approx(0.3 * mean, rel=1e-9)}


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradients(tolerance=1e-12, iterations=500),
        ConjugateGradients(tolerance=1e-12, iterations=500, preconditioner="ekfac"),
        LiSSA(tolerance=1e-12, depth=20_000),
    ],
    ids=["cg", "ekfac_cg", "lissa"],
)
def test_another_damping_needs_no_other_fit(solver: Any) -> None:
    fit = fitted(solver).with_damping(Absolute(0.05))
    damped = matrix("gauss_newton", stream()) + 0.05 * torch.eye(43).double()
    truth = torch.linalg.solve(damped, vectors().T).T
    assert torch.allclose(fit.solve(vectors()), truth, rtol=1e-8, atol=1e-9)
    assert fit.details()["damping_used"] == {"all": 0.05}


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"scale": 0.0}, {"batch": 0}, {"repeats": 0}, {"tolerance": -1.0}],
    ids=str,
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fb.errors.DataError, match=next(iter(options))):
        fb.LiSSA(**options)
    with pytest.raises(fb.errors.DataError, match="iterations 0"):
        fb.CG(iterations=0)
